"""Encoding ahead of training: the same batches to the bit, nothing encoded in the loop, and what that frees."""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from builders import ROOT
from builders.families import build_dit, build_flux, build_pixart, build_sd3, build_sdxl
from builders.pipelines import build_ddpm, build_sd
from builders.trainer import assert_equal, make, weights
from fewstep.cli.main import main
from fewstep.config import DataConfig, MethodConfig, RunConfig
from fewstep.data import Source, load_source
from fewstep.data.encoding_cache import EncodingCache
from fewstep.data.tensor_store import TensorStore
from fewstep.methods.base import Batch
from fewstep.teachers import Teacher, load_teacher
from fewstep.teachers.fingerprint import image_identity, text_identity
from fewstep.training.batches import Batches

CPU = torch.device("cpu")
BUILDERS: dict[str, Callable[[Path], Path]] = {
    "sd": build_sd,
    "sdxl": build_sdxl,
    "dit": build_dit,
    "pixart": build_pixart,
    "sd3": build_sd3,
    "flux": build_flux,
    "ddpm": build_ddpm,
}


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    folders: dict[str, Path] = {}

    def folder(family: str) -> str:
        if family not in folders:
            folders[family] = BUILDERS[family](tmp_path_factory.mktemp("cached") / family)
        return str(folders[family])

    return folder


def captioned(folder: Path, count: int = 10) -> list[Path]:
    """Images in two sizes, with captions of which some are equal."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, lines, files = np.random.default_rng(0), [], []
    for i in range(count):
        files.append(folder / f"{i}.png")
        Image.fromarray(rng.integers(0, 256, (40 + i, 50, 3), dtype=np.uint8)).save(files[-1])
        lines.append(json.dumps({"file_name": f"{i}.png", "text": "a bag"[: 2 + i % 4]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return files


def classes(folder: Path) -> list[Path]:
    """Images of ten classes."""
    files = []
    for i in range(10):
        (folder / f"class_{i}").mkdir(parents=True)
        files.append(folder / f"class_{i}" / "0.png")
        Image.fromarray(np.full((40, 40, 3), 20 * i, np.uint8)).save(files[-1])
    return files


def run_config(folder: Path, **data: Any) -> RunConfig[Any]:
    values = {"data": data, "output_dir": folder, "teacher": "", "max_iterations": 1, "batch_size": 4, "method": {}}
    return RunConfig[MethodConfig].model_validate(values)


def drawn(config: RunConfig[Any], teacher: Teacher, source: Source, cache: EncodingCache | None) -> list[Batch]:
    torch.manual_seed(0)
    batches = Batches(config, teacher, source, True, CPU, 0, 1, cache)
    return [batches.draw(i, 0) for i in range(4)]


def opened(folder: Path, teacher: Teacher, source: Source) -> EncodingCache:
    """As the trainer opens a cache."""
    cache = EncodingCache(folder, teacher)
    cache.open(source, needs_images=True)
    if teacher.prompts is not None:
        teacher.prompts.stored = cache.conditions
    teacher.placement.release(teacher.placement.parts)
    return cache


@pytest.mark.parametrize("in_memory", [False, True], ids=["on disk", "in memory"])
@pytest.mark.parametrize("family", [pytest.param(f, marks=pytest.mark.slow) if f == "flux" else f for f in BUILDERS])
def test_batches_are_the_same_to_the_bit(
    family: str, in_memory: bool, built: Callable[[str], str], tmp_path: Path
) -> None:
    if in_memory and family not in ("sd", "dit"):
        pytest.skip("no matter of the family")
    images = tmp_path / "images"
    files = classes(images) if family == "dit" else captioned(images)
    labels = {"num_labels": 10} if family == "dit" else {}
    config = run_config(tmp_path, source="folder", path=str(images), **labels)
    teacher = load_teacher(built(family))
    source = load_source(config.data, teacher.image_size)
    expected = drawn(config, teacher, source, None)
    EncodingCache(tmp_path / "cache", teacher).fill(source, teacher, [], True, config.batch_size)

    for file in files:  # whoever opens one from here on fails
        file.write_bytes(bytes(file.stat().st_size))
    teacher = load_teacher(built(family))
    cache = opened(tmp_path / "cache", teacher, source)
    teacher.placement.to(CPU, torch.float32)
    away = {name for name in teacher.placement.parts if teacher.pipeline.config[name][0] is None}
    assert away == set(teacher.placement.parts)
    found = drawn(
        config.model_copy(update={"data": config.data.model_copy(update={"cache_latents": in_memory})}),
        teacher,
        source,
        cache,
    )
    for a, b in zip(found, expected, strict=True):
        assert a.latents is not None and b.latents is not None
        assert torch.equal(a.latents, b.latents)
        for mine, other in ((a.cond, b.cond), (a.uncond, b.uncond)):
            assert mine.keys() == other.keys() and all(torch.equal(mine[k], other[k]) for k in mine)
            assert all(mine[k].dtype == other[k].dtype for k in mine)
    assert set(teacher.placement.away) == away, "something was brought back, so something was encoded"


def test_training_is_the_same_to_the_bit(built: Callable[[str], str], tmp_path: Path) -> None:
    """With scores in between, for which the parts return, and leave again."""
    shown = {"score": {"every": 3, "steps": 1, "num_images": 4}}
    data = {"source": "fashion", "limit": 24}
    assert make(built("sd"), tmp_path / "plain", data=data, **shown).fit()
    arguments = [f"teacher={built('sd')}", f"data.cache={tmp_path / 'cache'}", "data.limit=24", "batch_size=4"]
    main(["cache", str(ROOT / "configs" / "fashion/lcm.yaml"), *arguments])
    trainer = make(built("sd"), tmp_path / "cached", data=data | {"cache": str(tmp_path / "cache")}, **shown)
    assert set(trainer.teacher.placement.away) == {"text_encoder", "vae"}
    assert trainer.fit()
    assert set(trainer.teacher.placement.away) == {"text_encoder", "vae"}
    assert_equal(weights(tmp_path / "cached", 6), weights(tmp_path / "plain", 6))
    scores = [
        [line for line in map(json.loads, (tmp_path / n / "log.jsonl").open()) if "fid" in line]
        for n in ("cached", "plain")
    ]
    assert scores[0] == scores[1] and len(scores[0]) == 2


def test_broken_images_are_left_out_of_both(built: Callable[[str], str], tmp_path: Path) -> None:
    """A training that skips them sees the same batches with and without a cache; one that does not, begins with neither."""
    files = captioned(tmp_path / "images")
    files[3].write_bytes(files[3].read_bytes()[:-2000])
    data = {"source": "folder", "path": str(tmp_path / "images")}
    with pytest.raises(ValueError, match=r"1 of 10 images that cannot be read, such as: .*3\.png.*data\.on_error=skip"):
        make(built("sd"), tmp_path / "run", data=data)
    skip = data | {"on_error": "skip"}
    plain = make(built("sd"), tmp_path / "run", data=skip).batches
    cache = tmp_path / "cache"
    arguments = [f"data={json.dumps(data)}", f"data.cache={cache}", f"teacher={built('sd')}", "batch_size=4"]
    config = str(ROOT / "configs" / "fashion/lcm.yaml")
    with pytest.raises(SystemExit, match="1 of 10 images that cannot be read"):
        main(["cache", config, *arguments])
    main(["cache", config, *arguments, "data.on_error=skip"])
    with pytest.raises(ValueError, match=r"data\.cache: found 9 of 10 images"):
        make(built("sd"), tmp_path / "run", data=data | {"cache": str(cache)})
    cached = make(built("sd"), tmp_path / "run", data=skip | {"cache": str(cache)}).batches
    assert len(plain.stream.source) == len(cached.stream.source) == 9
    for i in range(3):
        found = []
        for batches in (plain, cached):
            torch.manual_seed(i)
            found.append(batches.draw(i, 0))
        assert torch.equal(found[0].x0, found[1].x0)
        assert all(torch.equal(found[0].cond[k], found[1].cond[k]) for k in found[0].cond)


# What is missing --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def filled(built: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of ten images and of their cache."""
    folder = tmp_path_factory.mktemp("filled")
    captioned(folder / "images")
    teacher = load_teacher(built("sd"))
    EncodingCache(folder / "cache", teacher).fill(of(folder / "images"), teacher, ["an extra"], True, 4)
    return folder / "images", folder / "cache"


def of(images: Path, **more: Any) -> Source:
    return load_source(DataConfig.model_validate({"source": "folder", "path": str(images)} | more), 32)


def test_missing_entries_are_named(filled: tuple[Path, Path], built: Callable[[str], str], tmp_path: Path) -> None:
    _, cache = filled
    captioned(tmp_path / "more", 12)
    with (tmp_path / "more" / "metadata.jsonl").open("a") as f:
        f.write('\n{"file_name": "0.png", "text": "a new caption"}')
    teacher = load_teacher(built("sd"))
    with pytest.raises(ValueError, match=r"found 5 of 6 prompts .* without 'a new caption'; .*\. Run `fewstep cache`"):
        EncodingCache(cache, teacher).open(of(tmp_path / "more"), True)
    captioned(tmp_path / "more", 12)
    with pytest.raises(ValueError, match=r"found 10 of 12 images .* without '10.png \d+', '11.png \d+';"):
        EncodingCache(cache, teacher).open(of(tmp_path / "more"), True)
    EncodingCache(cache, teacher).open(of(tmp_path / "more"), False)


def test_no_index_and_another_teacher_find_nothing(
    filled: tuple[Path, Path], built: Callable[[str], str], tmp_path: Path
) -> None:
    images, cache = filled
    with pytest.raises(ValueError, match="found 0 of 5 prompts"):
        EncodingCache(tmp_path / "nothing", load_teacher(built("sd"))).open(of(images), True)
    with pytest.raises(ValueError, match="found 0 of 5 prompts"):
        EncodingCache(cache, load_teacher(built("sdxl"))).open(of(images), True)


def test_a_prompt_outside_the_source_is_an_error(filled: tuple[Path, Path], built: Callable[[str], str]) -> None:
    """The text encoders are not brought back behind the user's back."""
    images, cache = filled
    teacher = load_teacher(built("sd"))
    opened(cache, teacher, of(images))
    assert teacher.condition(["an extra"])["encoder_hidden_states"].shape == (1, 8, 32)
    with pytest.raises(ValueError, match=r"found 0 of 1 prompts .* without 'blurry'"):
        teacher.condition(["blurry"])
    assert "text_encoder" in teacher.placement.away


# Writing ----------------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, torch.Tensor]:
    """All that is indexed below a cache, by key and name."""
    found = {}
    for index in sorted(folder.rglob("index.json")):
        shards = TensorStore(index.parent)
        shards.read_index()
        for key in shards.places:
            found |= {f"{key} {name}": rows[0] for name, rows in shards.read([key]).items()}
    return found


def test_filling_goes_on_where_it_stopped(
    filled: tuple[Path, Path], built: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, cache = filled
    monkeypatch.setattr(EncodingCache, "SHARD_ROWS", 4)
    files = captioned(tmp_path / "images")
    good = files[9].read_bytes()
    files[9].write_bytes(bytes(len(good)))
    teacher, mine = load_teacher(built("sd")), tmp_path / "cache"
    with pytest.raises(ValueError, match=r"9\.png: found a file that cannot be read"):
        EncodingCache(mine, teacher).fill(of(tmp_path / "images"), teacher, ["an extra"], True, 4)
    first = {path: path.stat().st_mtime_ns for path in mine.rglob("*.safetensors")}
    assert len(first) == 3 and not list(mine.rglob("index.json"))
    next(iter(first)).with_name("cut off.safetensors.partial").write_bytes(b"half of")
    files[9].write_bytes(good)
    EncodingCache(mine, teacher).fill(of(tmp_path / "images"), teacher, ["an extra"], True, 4)
    assert all(path.stat().st_mtime_ns == before for path, before in first.items()), "something was encoded twice"
    assert not list(mine.rglob("*.partial"))
    assert_equal(contents(mine), contents(cache))


def test_processes_share_the_work(filled: tuple[Path, Path], built: Callable[[str], str], tmp_path: Path) -> None:
    """Each writes its part; what the three of them write is what one does."""
    images, cache = filled
    mine, barrier = tmp_path / "cache", threading.Barrier(3)
    teachers = [load_teacher(built("sd")) for _ in range(3)]

    def wait() -> None:
        barrier.wait()

    def fill(process: int) -> None:
        teacher = teachers[process]
        EncodingCache(mine, teacher).fill(of(images), teacher, ["an extra"], True, 4, process, 3, wait)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(fill, range(3)))
    assert len(list(mine.rglob("*.safetensors"))) == 6
    assert_equal(contents(mine), contents(cache))


def environment() -> dict[str, str]:
    return os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def command(teacher: str, cache: Path, processes: int = 1) -> list[str]:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    launch += ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else ["--num_machines", "1"]
    return [
        *launch, "-m", "fewstep", "cache", "configs/fashion/lcm.yaml", f"teacher={teacher}",
        f"data.cache={cache}", "data.limit=2000", "batch_size=50",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_command_on_two_processes_after_a_kill(built: Callable[[str], str], tmp_path: Path) -> None:
    killed = subprocess.Popen(
        command(built("sd"), tmp_path / "killed"), cwd=ROOT, env=environment(), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    end = time.monotonic() + 300
    while not list((tmp_path / "killed").rglob("latents/*/*.safetensors")) and time.monotonic() < end:
        assert killed.poll() is None
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not list((tmp_path / "killed").rglob("latents/*/index.json")), "it was done before the kill"
    for name, processes in (("killed", 2), ("whole", 1)):
        done = subprocess.run(
            command(built("sd"), tmp_path / name, processes),
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    # One of images before the kill, then one of each process.
    assert len(list((tmp_path / "killed").rglob("latents/*/*.safetensors"))) == 3
    assert_equal(contents(tmp_path / "killed"), contents(tmp_path / "whole"))


def test_the_command_says_what_it_wants(tmp_path: Path) -> None:
    config = str(ROOT / "configs" / "fashion/lcm.yaml")
    with pytest.raises(
        SystemExit, match=r"data\.cache: found null; expected a folder\. Set it in the config, or as data\.cache=FOLDER"
    ):
        main(["cache", config])
    with pytest.raises(SystemExit, match=r"data\.sauce: unknown key"):
        main(["cache", config, "data.sauce=x"])


def test_prompts_alone(built: Callable[[str], str], tmp_path: Path) -> None:
    """As for BOOT, whose negative prompt is kept too."""
    config = str(ROOT / "configs" / "fashion/boot.yaml")
    main(
        [
            "cache",
            config,
            f"teacher={built('sd')}",
            f"data.cache={tmp_path}",
            "method.guidance.negative_prompt=ugly",
            "--only",
            "prompts",
        ]
    )
    assert not (tmp_path / "latents").exists()
    teacher = load_teacher(built("sd"))
    cache = EncodingCache(tmp_path, teacher)
    cache.open(load_source(DataConfig(source="fashion"), 32), needs_images=False)
    assert cache.conditions(["ugly", ""])["encoder_hidden_states"].shape == (2, 8, 32)


def test_rows_of_parquet_files_have_their_own_keys(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name, count in (("a", 3), ("b", 2)):
        rows = {"image": [b"x" * (i + 1) for i in range(count)], "text": ["t"] * count}
        pq.write_table(pa.table(rows), tmp_path / f"{name}.parquet", row_group_size=2)
    sizes = {n: (tmp_path / f"{n}.parquet").stat().st_size for n in "ab"}
    source = load_source(DataConfig(source="parquet", path=tmp_path), 32)
    expected = [f"a.parquet {sizes['a']} {i}" for i in range(3)] + [f"b.parquet {sizes['b']} {i}" for i in range(2)]
    assert [source.image_key(i) for i in range(5)] == expected
    limited = load_source(DataConfig(source="parquet", path=tmp_path, limit=2), 32)
    assert {limited.image_key(i) for i in range(2)} < set(expected)


# Which teacher ----------------------------------------------------------------------------------------------------------


def test_identities_follow_the_parts_that_encode(built: Callable[[str], str]) -> None:
    def identities(change: Callable[[Any], Any]) -> tuple[str, str]:
        teacher = load_teacher(built("sd"))
        with torch.no_grad():
            change(teacher.pipeline)
        return text_identity(teacher), image_identity(teacher)

    text, image = identities(lambda p: None)
    assert identities(lambda p: p.unet.conv_in.weight.add_(1)) == (text, image)
    assert identities(lambda p: next(p.text_encoder.parameters()).mul_(1.01))[0] != text
    assert identities(lambda p: setattr(p.tokenizer, "model_max_length", 6))[0] != text
    assert identities(lambda p: p.vae.encoder.conv_in.bias.add_(1)) != (text, image)
    assert identities(lambda p: p.vae.register_to_config(scaling_factor=0.5))[1] != image


# Memory -----------------------------------------------------------------------------------------------------------------


def parameter_bytes() -> int:
    """Of all storages of parameters that are alive."""
    gc.collect()
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in _parameters()}
    return sum(storages.values())


def _parameters() -> list[nn.Parameter]:
    return [o for o in gc.get_objects() if type(o) is nn.Parameter]


def size(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_released_parts_free_their_memory_and_return(family: str, built: Callable[[str], str]) -> None:
    teacher = load_teacher(built(family))
    image = torch.rand(2, 3, teacher.image_size, teacher.image_size)
    before = teacher.condition(["a bag"]), teacher.encode(image), teacher.decode(torch.ones(1, *teacher.latent_shape))
    names = teacher.placement.parts
    freed = sum(size(teacher.pipeline.components[name]) for name in names)
    held = parameter_bytes()
    teacher.placement.release(names)
    assert held - parameter_bytes() == freed
    teacher.prompts.clear()  # type: ignore[union-attr]  # these have prompts
    after = teacher.condition(["a bag"]), teacher.encode(image), teacher.decode(torch.ones(1, *teacher.latent_shape))
    assert all(torch.equal(after[0][k], v) for k, v in before[0].items())
    assert torch.equal(after[1].mean, before[1].mean) and torch.equal(after[2], before[2])
    assert not teacher.placement.away and parameter_bytes() == held
    assert all(not p.requires_grad for name in names for p in teacher.pipeline.components[name].parameters())


def test_the_whole_pipeline_can_be_called_and_leaves_again(built: Callable[[str], str]) -> None:
    teacher = load_teacher(built("sdxl"))

    def call() -> Any:
        return teacher.pipeline(
            "a bag", num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type="np"
        ).images

    before, held = call(), parameter_bytes()
    teacher.placement.release(("text_encoder", "text_encoder_2", "vae"))
    released = parameter_bytes()
    with teacher.placement.whole():
        assert np.array_equal(call(), before)
        assert parameter_bytes() == held
    assert parameter_bytes() == released < held
    teacher.placement.recall(("vae",))
    with teacher.placement.whole():
        pass
    assert set(teacher.placement.away) == {"text_encoder", "text_encoder_2"}, "what was there stays"


def test_a_students_pipeline_recalls_its_parts(built: Callable[[str], str]) -> None:
    for family in ("sd", "sdxl", "dit"):
        teacher = load_teacher(built(family))
        teacher.placement.release(teacher.placement.parts)
        pipeline = teacher.students.pipeline(teacher.denoiser, teacher.samplers.jump(4))
        assert pipeline.vae is teacher.pipeline.vae is not None


def test_parts_of_a_pipeline_that_comes_from_no_folder_wait_in_memory(built: Callable[[str], str]) -> None:
    teacher = load_teacher(built("sd"))
    teacher.placement.reload = None
    encoder = teacher.pipeline.text_encoder
    teacher.placement.release(("text_encoder",))
    assert teacher.pipeline.text_encoder is None
    assert teacher.placement.part("text_encoder") is encoder


def test_training_holds_the_networks_alone(
    filled: tuple[Path, Path], built: Callable[[str], str], tmp_path: Path
) -> None:
    """Teacher, student, target, average: what the loop runs, and of the pipeline nothing else."""
    images, cache = filled
    start = parameter_bytes()
    data = {"source": "folder", "path": str(images), "cache": str(cache)}
    trainer = make(built("sd"), tmp_path, data=data, max_iterations=2, checkpoint={"every": 2})
    nets = sum(size(net) for net in trainer.networks().values())
    assert len(trainer.roles) == 4 and parameter_bytes() - start == nets
    assert trainer.fit()
    assert parameter_bytes() - start == nets


def test_the_autoencoder_leaves_where_no_image_will_be_encoded(built: Callable[[str], str], tmp_path: Path) -> None:
    trainer = make(built("sd"), tmp_path, data={"source": "fashion", "limit": 8, "cache_latents": True})
    assert set(trainer.teacher.placement.away) == {"vae"}
