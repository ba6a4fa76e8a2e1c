"""The same images and scores for every batch size, number of processes, and interruption."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from builders.rewards import small_rewards
from fewstep.assets import asset_path
from fewstep.cli.main import main
from fewstep.data.fashion import load_embedded
from fewstep.evaluate import PathOverrides, Protocol, evaluate_protocol, load_features, load_protocol, sample
from fewstep.evaluate.generate import batches, remaining_batches
from fewstep.evaluate.references import collect
from fewstep.evaluate.resume import BatchStore
from fewstep.evaluate.statistics import save_statistics

PROMPTS = ["a bag", "", "ein Kleid, rot 👗", 'a "quoted", dress', "a coat"]
NOT_SCORES = ("fingerprints", "model", "guidance_scale", "seconds_per_image", "peak_memory_gib")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """$FEWSTEP_DATA, here and in the processes that are started, with small rewards."""
    root = tmp_path_factory.mktemp("data")
    small_rewards(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_DATA", str(root))
        yield root


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A protocol of 13 images, its prompts and its statistics."""
    path = tmp_path_factory.mktemp("resume")
    (path / "words.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PROMPTS))
    save_statistics(
        collect(torch.from_numpy(load_embedded()[0][::40].copy()), load_features("fashion")), path / "real.npz"
    )
    metrics = ["fid", "kid", "precision_recall", "density_coverage", "diversity"]
    c = {"features": "fashion", "reference": str(path / "real.npz"), "metrics": metrics, "nearest_k": 3}
    settings = {
        "about": "a test",
        "images": 13,
        "conditions": {"source": "prompts", "file": str(path / "words.jsonl")},
        "comparisons": [c],
        "clip": {"model": "fashion"},
        "rewards": ["pickscore", "aesthetic"],
    }
    (path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def protocol(folder: Path) -> Protocol:
    return load_protocol(str(folder / "tiny.yaml"))[1]


def open_pipeline(dtype: torch.dtype = torch.float32) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(asset_path("fashion") / "pipeline", dtype=dtype)


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return open_pipeline()


def score(
    pipeline: Any, protocol: Protocol, batch_size: int, keep: Path | None = None, **options: Any
) -> dict[str, Any]:
    (row,) = evaluate_protocol(
        pipeline, protocol, name="x", steps=(1,), batch_size=batch_size, guidance_scale=1.0, keep=keep, **options
    )
    return {key: value for key, value in row.items() if key not in NOT_SCORES}


@pytest.fixture(scope="module")
def whole(pipeline: Any, protocol: Protocol) -> dict[str, Any]:
    return score(pipeline, protocol, 4)


def test_images_are_identical_for_every_batch_size() -> None:
    """In float64, where the arithmetic of another batch size rounds in digits that no pixel shows."""
    pipeline = open_pipeline(torch.float64)
    prompts = [PROMPTS[i % 5] for i in range(13)]

    def draw(size: int) -> torch.Tensor:
        parts = batches(13, size)
        return torch.cat([sample(pipeline, [prompts[i] for i in part], part, steps=2, seed=0) for part in parts])

    one = draw(1)
    for size in (7, 64):
        assert torch.equal(draw(size), one)


def test_the_command_in_fp64_gives_the_same_scores_for_every_batch_size(folder: Path, tmp_path: Path) -> None:
    """`--dtype fp64` scores in float64 too: features, CLIP and rewards."""
    rows = []
    for size in (1, 7, 13):
        output, keep = tmp_path / f"{size}.json", tmp_path / str(size)
        options = f"--dtype fp64 --steps 1 --batch-size {size} --keep {keep} --output {output}".split()
        main(["evaluate", "fashion", "--protocol", str(folder / "tiny.yaml"), *options])
        report = json.loads(output.read_text())
        rows.append({key: value for key, value in report["results"][0].items() if key not in NOT_SCORES})
        values = BatchStore.load(next((keep / "1_steps").glob("batch_*"))).values
        assert {value.dtype for value in values.values()} == {torch.float64}
    assert rows[0]["fid"] > 0 and rows[0]["kid"] != 0 and rows[0]["pickscore"] != 0
    for row in rows[1:]:
        assert row == pytest.approx(rows[0], rel=1e-9)


def test_what_was_kept_in_fp32_is_not_gone_on_with_in_fp64(folder: Path, tmp_path: Path) -> None:
    """The weights are the same to the last digit; noises and features are not."""
    command = ["evaluate", "fashion", "--protocol", str(folder / "tiny.yaml"), "--steps", "1", "--keep", str(tmp_path)]
    command += ["--output", str(tmp_path / "evaluation.json")]
    main(command)
    with pytest.raises(SystemExit, match="keep: found images of another evaluation"):
        main([*command, "--dtype", "fp64"])


def test_an_interrupted_evaluation_goes_on_to_identical_scores(
    pipeline: Any, protocol: Protocol, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []

    def interrupted(pipeline: Any, conditions: Sequence[Any], indices: Sequence[int], **options: Any) -> torch.Tensor:
        drawn.extend(indices)
        # The first call is the warm-up of image 0.
        if len(drawn) > 1 + 8:
            raise KeyboardInterrupt
        return sample(pipeline, conditions, indices, **options)

    monkeypatch.setattr("fewstep.evaluate.rows.sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        score(pipeline, protocol, 4, tmp_path)
    drawn.clear()
    monkeypatch.setattr("fewstep.evaluate.rows.sample", lambda *a, **k: drawn.extend(a[2]) or sample(*a, **k))  # type: ignore[func-returns-value]
    again = score(pipeline, protocol, 4, tmp_path)
    assert drawn == [0, *range(8, 13)]
    assert again == whole
    # Nothing is left to draw: scores from what was kept alone.
    drawn.clear()
    assert score(pipeline, protocol, 4, tmp_path) == whole and drawn == [0]


def test_another_batch_size_goes_on_with_what_is_left(
    pipeline: Any, protocol: Protocol, whole: dict[str, Any], tmp_path: Path
) -> None:
    score(pipeline, protocol, 4, tmp_path)
    files = sorted((tmp_path / "1_steps").glob("batch_*"))
    assert len(files) == 4
    files[1].unlink()
    again = score(pipeline, protocol, 3, tmp_path)
    # The four images that were drawn anew may round differently in another batch size.
    assert again == pytest.approx(whole, rel=2e-2) and again["images"] == 13


def test_what_was_kept_of_another_evaluation_is_refused(
    pipeline: Any, protocol: Protocol, tmp_path: Path, folder: Path
) -> None:
    score(pipeline, protocol, 13, tmp_path)
    with pytest.raises(ValueError, match="found images of another evaluation \\(protocol: "):
        score(pipeline, protocol.model_copy(update={"seed": 1}), 13, tmp_path)
    other = folder / "other.jsonl"
    other.write_text('"a"\n')
    with pytest.raises(ValueError, match=r"\(conditions: "):
        score(pipeline, protocol, 13, tmp_path, overrides=PathOverrides({}, other))
    changed = open_pipeline()
    with torch.no_grad():
        next(changed.unet.parameters()).add_(1e-3)
    with pytest.raises(ValueError, match=r"\(pipeline: "):
        score(changed, protocol, 13, tmp_path)
    (file,) = (tmp_path / "1_steps").glob("batch_*")
    file.write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"which is broken .*\. Remove it to sample its images again"):
        score(pipeline, protocol, 13, tmp_path)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_every_index_is_drawn_once_whatever_was_done(batch_size: int) -> None:
    for world in (1, 2, 3):
        for done in ([], [0, 5, 99], list(range(100))):
            parts = [p for r in range(world) for p in remaining_batches(done, 100, batch_size, r, world)]
            assert sorted([i for p in parts for i in p] + list(done)) == list(range(100))
    # Whole batches that are done leave the others as they were.
    fresh = [list(b) for b in batches(100, batch_size)]
    left = remaining_batches(fresh[0], 100, batch_size, 0, 1)
    assert left == fresh[1:]


def score_in_process(rank: int, world: int, folder: str, keep: str | None, out: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    torch.set_num_threads(1)  # an Accelerator sets them anew, and another count rounds float32 otherwise
    protocol = load_protocol(f"{folder}/tiny.yaml")[1]
    row = score(open_pipeline(), protocol, 7, Path(keep) if keep else None, accelerator=accelerator)
    Path(out, f"{rank}.json").write_text(json.dumps(row))
    accelerator.end_training()


@pytest.mark.slow
@pytest.mark.parametrize(("world", "kept"), [(3, False), (2, True)])
def test_scores_do_not_depend_on_the_number_of_processes(
    world: int, kept: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three processes, one has no batch at all; with `kept`, two go on from what one process left."""
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(s.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    protocol, keep = load_protocol(str(folder / "tiny.yaml"))[1], tmp_path / "kept"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = score(open_pipeline(), protocol, 7, keep if kept else None)
    torch.set_num_threads(threads)
    if kept:
        for file in sorted((keep / "1_steps").glob("batch_*"))[1:]:
            file.unlink()
    arguments = (world, str(folder), str(keep) if kept else None, str(tmp_path))
    torch.multiprocessing.spawn(score_in_process, arguments, nprocs=world)
    rows = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world)]
    assert all(row == rows[0] for row in rows)
    assert rows[0] == pytest.approx(alone, rel=1e-9)


class Sums(nn.Module):
    """Features that no order of arithmetic changes: whole numbers, the sums of the pixels of sixteen squares; logits of them."""

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        sums = images[:, 0].double().unflatten(2, (4, 8)).unflatten(1, (4, 8)).sum((2, 4)).flatten(1)
        return {"features": sums, "logits": sums / 4096}


def sums() -> nn.Module:
    return Sums()


SIZES = (1, 7, 64)
EXACT_REWARDS = ("pickscore", "aesthetic", "image_reward")


def exact_scores(folder: Path, **options: Any) -> list[dict[str, Any]]:
    """Scores of 70 images, all in float64, for every batch size, and the SHA-256 of what was kept of them, in order."""
    protocol = load_protocol(str(folder / "exact.yaml"))[1]
    rows = []
    for size in SIZES:
        row = score(open_pipeline(torch.float64), protocol, size, folder / f"kept_{size}", **options)
        files = [BatchStore.load(file) for file in sorted((folder / f"kept_{size}" / "1_steps").glob("batch_*"))]
        order = torch.tensor([i for file in files for i in file.indices]).argsort()
        kept = torch.cat([file.values["0.features"] for file in files])[order]
        rows.append({**row, "sha256": hashlib.sha256(kept.numpy().tobytes()).hexdigest()})
    return rows


def exact_in_process(rank: int, world: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    torch.set_num_threads(1)
    rows = exact_scores(Path(folder), accelerator=accelerator)
    Path(folder, f"{rank}.json").write_text(json.dumps(rows))
    accelerator.end_training()


@pytest.mark.slow
def test_every_batch_size_and_number_of_processes_gives_the_same_images_and_scores(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To 1e-9, where the networks are in float64: in float32 another batch size rounds otherwise, by at most one level."""
    import socket

    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    metrics = [
        "fid", "fid_infinity", "kid", "cmmd", "precision_recall", "density_coverage", "inception_score", "diversity",
    ]  # fmt: skip
    results = []
    for world in (1, 2, 3):
        folder = tmp_path / str(world)
        folder.mkdir()
        (folder / "words.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PROMPTS))
        real = torch.from_numpy(load_embedded()[0][::20].copy())
        save_statistics(collect(real, load_features(f"{__name__}:sums")), folder / "real.npz")
        c = {"features": f"{__name__}:sums", "reference": str(folder / "real.npz"), "metrics": metrics}
        settings = {
            "about": "a test",
            "images": 70,
            "conditions": {"source": "prompts", "file": str(folder / "words.jsonl")},
            "comparisons": [c],
            "rewards": list(EXACT_REWARDS),
        }
        (folder / "exact.yaml").write_text(yaml.safe_dump(settings))
        if world == 1:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            results += exact_scores(folder)
            torch.set_num_threads(threads)
            continue
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            monkeypatch.setenv("MASTER_PORT", str(s.getsockname()[1]))
        torch.multiprocessing.spawn(exact_in_process, (world, str(folder)), nprocs=world)
        ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]
        assert all(rows == ranks[0] for rows in ranks)
        results += ranks[0]
    assert all(results[0][score] > 0 for score in ("fid", "kid", "cmmd", "diversity"))
    assert results[0]["inception_score"] > 1 and all(abs(results[0][reward]) > 1e-3 for reward in EXACT_REWARDS)
    assert len({row.pop("sha256") for row in results}) == 1 and {row.pop("clip_score") for row in results} == {None}
    for row in results[1:]:
        assert row == pytest.approx(results[0], rel=1e-9)


def test_a_file_of_a_batch_is_whole_or_absent(tmp_path: Path) -> None:
    keeper = BatchStore(tmp_path / "k", {"a": 1})
    from fewstep.evaluate.resume import MeasuredBatch

    batch = MeasuredBatch([3, 1], {"0.features": torch.ones(2, 4)}, 0.5, 7)
    keeper.save(batch)
    assert [f.name for f in sorted((tmp_path / "k").iterdir())] == [
        "batch_00000003_00000001.safetensors",
        "settings.json",
    ]
    back = keeper.load(keeper.files()[0])
    assert back.indices == [3, 1] and back.seconds == 0.5 and back.evaluations == 7
    assert torch.equal(back.values["0.features"], batch.values["0.features"])
    shutil.rmtree(tmp_path / "k")
