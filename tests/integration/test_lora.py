"""Students under adapters: one base for all networks, exact resume, files for stock diffusers; what else saves memory."""

import re
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from peft.tuners.lora import LoraLayer
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from builders import ROOT, changed
from builders.contract import CONTRACT, MATRIX, METHODS, noise, raw, settings_of
from builders.trainer import environment
from fewstep import io
from fewstep.config import LoraConfig, OptimConfig, RunConfig
from fewstep.data import load_source
from fewstep.export.card import Call
from fewstep.export.lora import FILE, KOHYA_FILE, export_lora, update_of
from fewstep.export.pipeline import export
from fewstep.export.verify import sample_in_memory
from fewstep.methods.discriminator import features, named_layers
from fewstep.methods.distribution_matching.dmd2 import DMD2Config
from fewstep.methods.noisy_batch import NoisyBatch
from fewstep.methods.registry import method_class, settings_class
from fewstep.teachers import Denoiser, load_teacher
from fewstep.teachers.denoiser import own_tensors
from fewstep.teachers.lora import adapted_modules, adapters
from fewstep.teachers.students import StudentGuidance
from fewstep.training.offloading import Offloading
from fewstep.training.optim import new_optimizer
from fewstep.training.trainer import Trainer

QUICK = {("sd", "dmd2"), ("ddpm", "boot"), ("dit", "consistency"), ("sd3", "dmd2")}
EXPORTED = {("sdxl", "consistency"), ("dit", "dmd2")}


def marked(quick: set[tuple[str, str]]) -> list[Any]:
    return [pytest.param(f, m, marks=() if (f, m) in quick else pytest.mark.slow) for f, m in MATRIX]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    built: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in built:
            built[family] = CONTRACT[family](tmp_path_factory.mktemp("lora") / family)
        return built[family]

    return folder


NAMES = {"consistency": "lcm"}
"""A method of the contract -> its name in the registry, where that is another."""


def make(
    folder: Path, output: Path, method: str, iterations: int = 2, more: dict[str, Any] | None = None, **changes: Any
) -> Trainer:
    """more: changes of the method's settings."""
    name = NAMES.get(method, method)
    kind, config_kind = method_class(name), settings_class(name)
    teacher = load_teacher(str(folder))
    settings = (settings_of(method, teacher) if method in METHODS else {}) | (more or {})
    data = {"source": "fashion", "limit": 8} | ({"num_labels": 10} if teacher.conditions == "label" else {})
    values = {
        "teacher": str(folder), "output_dir": str(output), "data": data, "max_iterations": iterations,
        "train": {"cpu_threads": 1, "mixed_precision": "no", "student": {"kind": "lora", "rank": 4, "alpha": 8.0}},
        "batch_size": 1, "checkpoint": {"every": 1}, "log": {"every": 1}, "method": {"optim": {"lr": 1e-3}} | settings,
    }  # fmt: skip
    config = RunConfig[config_kind].model_validate(changed(values, changes))
    return Trainer(config, kind(config.method, teacher), teacher, load_source(config.data, teacher.image_size))


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def stirred(net: Denoiser) -> Denoiser:
    """Every own tensor with some size: adapters start as nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in own_tensors(net).values():
            value.add_(torch.randn(value.shape, generator=generator), alpha=0.05)
    return net


# Adapters ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "count"),
    [("sd", 79), ("sdxl", 79), ("ddpm", 47), ("dit", 14), ("pixart", 21), ("sd3", 25), ("flux", 20), ("sana", 21)],
)
def test_targets_are_the_familys(family: str, count: int, folders: Callable[[str], Path]) -> None:
    """79 modules of a UNet with an attention block on each side: what LCM-LoRA's list gives there. Each network starts as the
    teacher."""
    teacher = load_teacher(str(folders(family)))
    names = adapted_modules(teacher.denoiser.net, teacher.students.lora_targets)
    assert len(names) == count
    assert not [name for name in names if name in ("proj_out", "conv_in", "conv_out")]
    teacher.students.adapt(LoraConfig(rank=2))
    student = teacher.students.new()
    assert sorted(name for name, _ in adapters(student.net)) == sorted(names)
    assert len(own_tensors(student)) == 2 * count
    x, t, cond = noise(teacher), torch.tensor([999, 400]), teacher.condition(raw(teacher))
    assert torch.equal(student(x, t, cond).x0, teacher.denoiser(x, t, cond).x0)


def test_unknown_targets_are_refused(folders: Callable[[str], Path]) -> None:
    teacher = load_teacher(str(folders("sd")))
    with pytest.raises(ValueError, match=r"train\.student\.targets: found 'to_qq'; .* Did you mean 'to_q'"):
        teacher.students.adapt(LoraConfig(targets=("to_v", "to_qq")))


def test_all_networks_share_one_base(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """Storages counted: the teacher's, and the adapters (and heads) of each role."""
    trainer = make(folders("sdxl"), tmp_path, "dmd2")
    before = tensors(trainer.teacher.denoiser)

    def storages(*modules: nn.Module) -> dict[int, int]:
        parts = [v for module in modules for v in (*module.parameters(), *module.buffers())]
        return {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in parts}

    base = storages(trainer.teacher.denoiser)
    learnt = {name: own_tensors(trainer.roles[name].net) for name in ("student", "critic", "ema")}
    expected = sum(v.numel() * 4 for own in learnt.values() for v in own.values())
    assert sum(storages(*trainer.networks().values()).values()) == sum(base.values()) + expected
    adapter = sum(v.numel() * 4 for v in learnt["student"].values())
    assert adapter == sum(v.numel() * 4 for v in learnt["ema"].values()) < sum(base.values()) / 4
    trainer.fit()
    assert all(torch.equal(before[key], v) for key, v in trainer.teacher.denoiser.state_dict().items())
    saved = load_file(tmp_path / "checkpoints" / "2" / "student.safetensors")
    assert len(saved) == 2 * 79 and all("lora_" in key for key in saved)
    critic = load_file(tmp_path / "checkpoints" / "2" / "critic.safetensors")
    assert {key.split(".")[0] for key in critic} == {"denoiser", "heads"}
    assert all("lora_" in key for key in critic if key.startswith("denoiser"))


@pytest.mark.parametrize(("family", "method"), marked(QUICK))
def test_methods_train_and_resume(family: str, method: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    """Two iterations; and the second alone, in a new Trainer, to the same bits; the teacher stays as it was."""
    whole = make(folders(family), tmp_path / "whole", method)
    before, start = tensors(whole.teacher.denoiser), tensors(whole.roles["student"].net)
    assert whole.fit()
    assert all(torch.equal(before[key], v) for key, v in whole.teacher.denoiser.state_dict().items())
    moved = [key for key, v in whole.roles["student"].net.state_dict().items() if not torch.equal(v, start[key])]
    assert moved and all(key in own_tensors(whole.roles["student"].net) for key in moved)
    second = make(folders(family), tmp_path / "parts", method)
    second.resume(str(tmp_path / "whole" / "checkpoints" / "1"))
    assert second.fit()
    for name in ("student", "ema", "student_optimizer"):
        one, two = (
            load_file(tmp_path / part / "checkpoints" / "2" / f"{name}.safetensors") for part in ("whole", "parts")
        )
        assert one.keys() == two.keys()
        assert not [k for k in one if not torch.equal(one[k], two[k])]


def test_whole_weights_are_no_adapters(folders: Callable[[str], Path], tmp_path: Path) -> None:
    assert make(folders("sd"), tmp_path / "full", "dmd2", iterations=1, train={"student": {"kind": "full"}}).fit()
    checkpoint = tmp_path / "full" / "checkpoints" / "1"
    trainer = make(folders("sd"), tmp_path / "lora", "dmd2")
    before = tensors(trainer.teacher.denoiser)
    with pytest.raises(ValueError, match="of another kind of network"):
        trainer.resume(str(checkpoint))
    with pytest.raises(ValueError, match="weights of the student"):
        make(folders("sd"), tmp_path / "lora", "dmd2", train={"init_from": str(checkpoint)})
    with pytest.raises(ValueError, match=r"train.init_from: .*, a pipeline of whole weights"):
        trainer.teacher.students.pipeline(
            trainer.teacher.students.new(), trainer.method.scheduler()
        ).save_pretrained(tmp_path / "pipeline")  # fmt: skip
        make(folders("sd"), tmp_path / "lora", "dmd2", train={"init_from": str(tmp_path / "pipeline")})
    assert all(torch.equal(before[key], v) for key, v in trainer.teacher.denoiser.state_dict().items())


def test_adapters_start_from_those_of_an_earlier_run(folders: Callable[[str], Path], tmp_path: Path) -> None:
    assert make(folders("sd"), tmp_path / "first", "dmd2", iterations=1).fit()
    checkpoint = tmp_path / "first" / "checkpoints" / "1"
    second = make(folders("sd"), tmp_path / "second", "dmd2", train={"init_from": str(checkpoint)})
    for name, role in (("student", "student"), ("critic", "critic")):
        saved = load_file(checkpoint / f"{name}.safetensors")
        assert all(torch.equal(saved[key], v) for key, v in own_tensors(second.roles[role].net).items())


@pytest.mark.slow
def test_two_processes_agree_and_resume_exactly(folders: Callable[[str], Path], tmp_path: Path) -> None:
    def command(output: Path, *overrides: str) -> list[str]:
        return [
            sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--multi_gpu", "--main_process_port",
            "0", "train/dmd2.py", "--config", "configs/fashion/dmd2.yaml", f"teacher={folders('sd')}",
            f"output_dir={output}",
            "train.init_from=null",
            "data.limit=16", "batch_size=2", "max_iterations=4", "checkpoint.every=2", "log.samples_every=0",
            "evaluate=null",
            "log.every=1", "train.cpu_threads=1", "train.student.kind=lora", "train.student.rank=4",
            "memory.gradient_checkpointing=true",
            "score.every=0", *overrides,
        ]  # fmt: skip

    for name, overrides in (("whole", ()), ("parts", ("max_iterations=2",)), ("parts", ("checkpoint.resume=latest",))):
        done = subprocess.run(
            command(tmp_path / name, *overrides), cwd=ROOT, env=environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
    for name in ("student", "critic", "ema", "critic_optimizer"):
        one, two = (
            load_file(tmp_path / part / "checkpoints" / "4" / f"{name}.safetensors") for part in ("whole", "parts")
        )
        assert not [k for k in one if not torch.equal(one[k], two[k])]
    assert io.read_json(tmp_path / "whole" / "checkpoints" / "4" / "state.json")["num_processes"] == 2
    assert (tmp_path / "whole" / "lora" / FILE).exists()


# Files ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "method"), marked(EXPORTED))
def test_methods_export(family: str, method: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    """Both exports compare what a process without fewstep draws, beside and merged, with the student in memory."""
    trainer = make(folders(family), tmp_path / "run", method, iterations=1)
    teacher, own = trainer.teacher, trainer.method
    student = trainer.exported_weights()
    stirred(student)
    common: dict[str, Any] = {
        "allowed_steps": own.allowed_steps(), "guidance": own.student_guidance,
        "card": {"method": own.name, "prompt": "a bag"},
    }  # fmt: skip
    export(teacher, student, own.scheduler(), tmp_path / "pipeline", **common)
    path = export_lora(teacher, student, own.scheduler(), tmp_path / "lora", base=str(folders(family)), **common)
    assert sorted(p.name for p in path.iterdir()) == ["README.md", KOHYA_FILE, FILE, "scheduler"]
    with safe_open(path / FILE, "pt") as file:
        assert '"lora_alpha": 8.0' in (file.metadata() or {})["lora_adapter_metadata"].replace("unet.", "").replace(
            "transformer.", ""
        )


KEPT: dict[str, Any] = {"steps": 2, "phases": 2, "null_share": 0.1}


def by_card(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The pipeline that the code of a folder's card makes, in this process."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    assert code is not None
    scope: dict[str, Any] = {}
    with monkeypatch.context() as patched:
        patched.chdir(folder)
        exec(code[1], scope)
    return scope["pipeline"]


@pytest.mark.parametrize(
    ("family", "process"),
    [
        ("sd", "here"),
        pytest.param("sdxl", "here", marks=pytest.mark.slow),
        pytest.param("sd", "isolated", marks=pytest.mark.slow),
    ],
)
def test_adapters_that_keep_guidance_are_guided(
    family: str, process: str, folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card's own call guides, as the export compared; so do a scale and a negative prompt of the caller's.

    here: what a process without fewstep does for the export is done in this one, beside the weights only, to save its start.
    """

    def here(folder: Path, call: Call, adapted: str, merges: bool) -> dict[str, Any]:
        pipeline = by_card(folder, monkeypatch)
        count = sum(isinstance(module, LoraLayer) for module in getattr(pipeline, adapted).modules())
        found = sample_in_memory(pipeline, call, True)
        return found | {f"merged_{key}": v for key, v in found.items()} | {"adapted": count, "too_many_raised": True}

    if process == "here":
        monkeypatch.setattr("fewstep.export.lora.run_isolated", here)
    trainer = make(folders(family), tmp_path / "run", "pcm", more=KEPT)
    assert trainer.fit() and trainer.method.student_guidance.by_caller
    teacher, own = trainer.teacher, trainer.method
    student = stirred(trainer.exported_weights())
    path = export_lora(
        teacher, student, own.scheduler(), tmp_path / "lora", base=str(folders(family)), allowed_steps=own.allowed_steps(),
        guidance=StudentGuidance(by_caller=True), card={"method": own.name, "prompt": "a bag"},
    )  # fmt: skip
    card = (path / "README.md").read_text()
    assert "pipeline('a bag', num_inference_steps=2)" in card
    assert "`negative_prompt` do what they do in the teacher's pipeline" in card and "needs none" not in card
    assert "| 2 | 999, 499 |" in card

    stock, memory = by_card(path, monkeypatch), teacher.students.guided_pipeline(student, own.scheduler())
    rows: list[int] = []
    stock.unet.register_forward_hook(lambda net, args, out: rows.append(len(args[0])))

    def drawn(pipeline: Any, **options: Any) -> Tensor:
        given: dict[str, Any] = {"generator": torch.Generator().manual_seed(0), "output_type": "pt"} | options
        images: Tensor = pipeline("a coat", num_inference_steps=2, **given).images
        return images

    found = []
    for options in ({}, {"guidance_scale": 3.0}, {"guidance_scale": 3.0, "negative_prompt": "a shirt"}):
        found.append(drawn(stock, **options))
        torch.testing.assert_close(found[-1], drawn(memory, **options), rtol=0, atol=1e-4)
    assert rows == [2] * 6
    plain = drawn(stock, guidance_scale=1.0)
    assert all((one - other).abs().max() > 1e-3 for one, other in pairwise([*found, plain]))


LOADS = """
import sys; sys.modules["fewstep"] = None
import torch
from diffusers import DiffusionPipeline
from peft.tuners.lora import LoraLayer
folder, part, inputs, result, *files = sys.argv[1:]
pipeline = DiffusionPipeline.from_pretrained(folder)
net = getattr(pipeline, part).double()
given = torch.load(inputs, weights_only=True)
found = {}
for file in files:
    pipeline.load_lora_weights(".", weight_name=file)
    with torch.no_grad():
        found[f"beside {file}"] = net(**given, return_dict=False)[0]
        found[f"count {file}"] = torch.tensor(sum(isinstance(module, LoraLayer) for module in net.modules()))
        pipeline.fuse_lora()
        found[f"fused {file}"] = net(**given, return_dict=False)[0]
    pipeline.unfuse_lora()
    pipeline.unload_lora_weights()
torch.save(found, result)
"""


@pytest.mark.parametrize(
    "family", ["sdxl", *(pytest.param(f, marks=pytest.mark.slow) for f in ("sd", "sd3", "flux", "sana"))]
)
def test_stock_diffusers_loads_every_module(family: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    """In a process without fewstep: every module counted, outputs equal to the student's, beside and fused, alpha not rank.

    Kohya's layout, too, where diffusers knows it by these names: for UNets.
    In float64: in float32, weights that are fused round otherwise than those beside, to some 1e-6 of the output.
    """
    from safetensors.torch import save_file

    teacher = load_teacher(str(folders(family)))
    teacher.students.adapt(LoraConfig(rank=4, alpha=6.0))
    student = stirred(teacher.students.new()).eval()
    part = "unet" if family in ("sd", "sdxl") else "transformer"
    update = update_of(teacher, student)
    tensors, metadata = update.diffusers(part, torch.float32)
    save_file(tensors, tmp_path / FILE, metadata=metadata)
    files = [FILE]
    if part == "unet":
        save_file(update.kohya(part, torch.float32), tmp_path / KOHYA_FILE)
        files.append(KOHYA_FILE)
    student.double()
    given: list[dict[str, Any]] = []
    hook = student.net.register_forward_pre_hook(
        lambda _, args, kwargs: given.append(dict(kwargs, _args=args)), with_kwargs=True
    )
    x, t, cond = noise(teacher), torch.tensor([999, 400]), teacher.condition(raw(teacher))
    captured: list[Tensor] = []
    out = student.net.register_forward_hook(lambda _, __, output: captured.append(output.sample))
    with torch.no_grad():
        student(x, t, cond)
    hook.remove(), out.remove()
    inputs = {k: v for k, v in given[0].items() if k != "_args" and v is not None}
    inputs |= dict(zip(("sample", "timestep"), given[0]["_args"], strict=False))
    torch.save(inputs, tmp_path / "inputs.pt")
    command = [sys.executable, "-c", LOADS, str(folders(family)), part, "inputs.pt", "result.pt", *files]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "result.pt", weights_only=True)
    assert len(update.up) == len(list(adapters(student.net)))
    size = float(captured[0].abs().max())
    with torch.no_grad():
        plain = teacher.denoiser.net(**inputs, return_dict=False)[0]
    assert (plain - captured[0]).abs().max() > 1e-2 * size
    for file in files:
        assert int(found[f"count {file}"]) == len(update.up)
        for name in (f"beside {file}", f"fused {file}"):
            assert found[name].dtype == torch.float64
            assert (found[name] - captured[0]).abs().max() <= 1e-12 * size, name


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_kohya_names_are_those_that_comfyui_knows(family: str, folders: Callable[[str], Path]) -> None:
    """lora_unet_ or lora_transformer_, and diffusers' name with underscores; the update is alpha / rank up @ down."""
    teacher = load_teacher(str(folders(family)))
    teacher.students.adapt(LoraConfig(rank=4, alpha=6.0))
    student = stirred(teacher.students.new())
    part = "unet" if family == "sdxl" else "transformer"
    file = update_of(teacher, student).kohya(part, torch.float32)
    weights = teacher.denoiser.net.state_dict()
    known = {f"lora_{part}_{k.removesuffix('.weight').replace('.', '_')}": k for k in weights if k.endswith(".weight")}
    patches = {key.partition(".")[0] for key in file}
    assert patches <= known.keys()
    after = teacher.students.fold(student).state_dict()
    changed = {known[name] for name in patches}
    for name in patches:
        up, down, alpha = (file[f"{name}.{kind}"] for kind in ("lora_up.weight", "lora_down.weight", "alpha"))
        delta = (up.flatten(1) @ down.flatten(1)).reshape(weights[known[name]].shape) * alpha / down.shape[0]
        torch.testing.assert_close(weights[known[name]] + delta, after[known[name]], rtol=1e-5, atol=1e-5)
    assert all(torch.equal(after[k], v) for k, v in weights.items() if k not in changed)


def test_live_guidance_has_no_place_in_a_file_of_adapters(folders: Callable[[str], Path]) -> None:
    teacher = load_teacher(str(folders("sd")))
    teacher.students.adapt(LoraConfig(rank=4))
    student = stirred(teacher.students.new(guidance_embedding=True))
    with pytest.raises(ValueError, match=r"Set method\.guidance\.export_scale"):
        update_of(teacher, student)
    assert set(update_of(teacher, student, 2.0).shift) == {"time_embedding.linear_1"}


# Memory and time --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("sd", "lora"),
        ("sd3", "lora"),
        ("dit", "full"),
        *(
            pytest.param(f, "lora", marks=pytest.mark.slow)
            for f in ("sdxl", "ddpm", "dit", "pixart", "flux", "sana", "edm")
        ),
        *(
            pytest.param(f, "full", marks=pytest.mark.slow)
            for f in ("sd", "sdxl", "pixart", "sd3", "flux", "sana", "edm")
        ),
    ],
)
def test_checkpointed_gradients_are_the_same(
    family: str, kind: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    """Of student and critic, on one base or whole; also of the discriminator, whose features end the network's call early.

    Compared are Adam's first moments after one update: a tenth of the gradient, and not its sign alone as in the weights.
    """
    runs = {}
    for on in (False, True):
        changes: dict[str, Any] = {} if kind == "lora" else {"train": {"student": {"kind": "full"}}}
        trainer = make(folders(family), tmp_path / str(on), "dmd2", 1, memory={"gradient_checkpointing": on}, **changes)
        assert trainer.fit()
        files = {name: f"{name}_optimizer.safetensors" for name in ("student", "critic")}
        runs[on] = {n: load_file(tmp_path / str(on) / "checkpoints" / "1" / file) for n, file in files.items()}
    for name, one in runs[False].items():
        moments = {key: v for key, v in one.items() if key.endswith("exp_avg")}
        size = max(float(v.abs().max()) for v in moments.values())
        assert size > 0
        for key, value in moments.items():
            torch.testing.assert_close(runs[True][name][key], value, rtol=1e-3, atol=1e-5 * size)


def test_checkpointing_saves_activations(folders: Callable[[str], Path]) -> None:
    teacher = load_teacher(str(folders("sd")))
    x, t, cond = noise(teacher), torch.tensor([999, 400]), teacher.condition(raw(teacher))
    saved = {}
    for on in (False, True):
        student: Any = teacher.students.new()
        if on:
            student.net.enable_gradient_checkpointing()
        kept: dict[int, int] = {}

        def pack(v: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[v.untyped_storage().data_ptr()] = v.untyped_storage().nbytes()
            return v

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
            student(x, t, cond)
        saved[on] = sum(kept.values())
    assert saved[True] < saved[False]


def test_half_base_is_shared_and_adapters_learn_in_float32(folders: Callable[[str], Path], tmp_path: Path) -> None:
    AcceleratorState._reset_state()  # of another precision, in tests before
    trainer = make(
        folders("sd"),
        tmp_path,
        "consistency",
        train={"mixed_precision": "bf16", "student": {"kind": "lora", "rank": 4, "base_dtype": "bf16"}},
    )
    assert trainer.teacher.denoiser.net.dtype == torch.bfloat16
    assert {v.dtype for v in own_tensors(trainer.roles["student"].net).values()} == {torch.float32}
    assert trainer.fit()
    pipeline: Any = trainer.validation.pipeline()
    assert {p.dtype for p in pipeline.unet.parameters()} == {torch.bfloat16}
    AcceleratorState._reset_state()


def test_parts_that_visit_change_nothing(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """Without a GPU the option does nothing; as with one, parts leave after each call, and the run is the same to the bit."""
    found = {}
    for name, offload, leave in (("off", False, False), ("on", True, False), ("left", True, True)):
        trainer = make(folders("sd"), tmp_path / name, "dmd2", memory={"offload": offload})
        assert not trainer.offloading.parts
        if leave:
            trainer.offloading = Offloading(trainer.teacher, parts=True)
            trainer.teacher.placement.reload = None
        assert trainer.fit()
        assert set(trainer.teacher.placement.away) == ({"text_encoder", "vae"} if leave else set())
        found[name] = load_file(tmp_path / name / "checkpoints" / "2" / "student.safetensors")
    for name in ("on", "left"):
        assert not [key for key, value in found["off"].items() if not torch.equal(value, found[name][key])]


@pytest.mark.parametrize(
    "changes",
    [{}, {"adversarial": {"weight": 0.1, "feature_source": "teacher"}}],
    ids=["critic", "through the teacher"],
)
def test_a_teacher_in_main_memory_changes_nothing(
    changes: dict[str, Any], folders: Callable[[str], Path], tmp_path: Path
) -> None:
    """As on a GPU, weights leave after each layer's call; without one the option does nothing."""
    found = {}
    for name, leave in (("stays", False), ("leaves", True)):
        trainer = make(
            folders("sd"),
            tmp_path / name,
            "dmd2",
            more=changes,
            train={"student": {"kind": "full"}},
            memory={"offload_teacher": leave},
        )
        assert not trainer.offloading.network and not trainer.teacher.placement.offloaded
        if leave:
            trainer.teacher.placement.offload()
        assert trainer.fit()
        assert {p.device.type for p in trainer.roles["teacher"].net.parameters()} == ({"meta"} if leave else {"cpu"})
        assert "meta" not in {
            p.device.type for role in ("student", "critic", "ema") for p in trainer.roles[role].net.parameters()
        }
        found[name] = load_file(tmp_path / name / "checkpoints" / "2" / "student.safetensors")
    assert not [key for key, value in found["stays"].items() if not torch.equal(value, found["leaves"][key])]


def test_eight_bit_optimizer_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match="adamw8bit without the package bitsandbytes"):
        new_optimizer([nn.Parameter(torch.zeros(2))], OptimConfig(lr=1.0, optimizer="adamw8bit"))


def test_eight_bit_optimizer_trains_and_resumes_exactly(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """On any device; moments of the larger weights are in eight bits, and smaller than torch's."""
    pytest.importorskip("bitsandbytes")
    kind, config_kind, settings = METHODS["boot"]
    method = settings | {"optim": {"lr": 1e-3, "optimizer": "adamw8bit"}}

    def run(name: str, iterations: int) -> Trainer:
        made = make(folders("sd"), tmp_path / name, "boot", iterations, train={"student": {"kind": "full"}})
        config = made.config.model_copy(update={"method": config_kind.model_validate(method)})
        return Trainer(config, kind(config.method, made.teacher), made.teacher, made.batches.stream.source)

    whole = run("whole", 2)
    before = tensors(whole.roles["student"].net)
    assert whole.fit()
    assert any(not torch.equal(before[key], v) for key, v in whole.roles["student"].net.state_dict().items())
    assert run("parts", 1).fit()
    second = run("parts", 2)
    second.resume("latest")
    assert second.fit()
    for name in ("student", "ema", "student_optimizer"):
        one, two = (
            load_file(tmp_path / part / "checkpoints" / "2" / f"{name}.safetensors") for part in ("whole", "parts")
        )
        assert one.keys() == two.keys()
        assert not [k for k in one if not torch.equal(one[k], two[k])]
    kept = load_file(tmp_path / "whole" / "checkpoints" / "2" / "student_optimizer.safetensors")
    moments = [v for key, v in kept.items() if key.endswith((".state1", ".state2"))]
    size = sum(v.numel() for v in moments if v.dtype == torch.uint8)
    assert size > 0.9 * sum(v.numel() for v in moments)


def test_settings_of_adapters_belong_to_adapters() -> None:
    values = {
        "teacher": "fashion", "output_dir": "runs/x", "data": {"source": "fashion"}, "max_iterations": 1,
        "batch_size": 1,
        "method": {"optim": {"lr": 1e-3}},
    }  # fmt: skip
    for wrong, message in (
        ({"train": {"student": {"kind": "full", "rank": 4}}}, "Extra inputs are not permitted"),
        ({"train": {"student": {"kind": "lora", "base_dtype": "bf16"}}}, "Set train.mixed_precision=bf16"),
        ({"train": {"student": {"kind": "lora", "rank": 0}}}, "greater than 0"),
        (
            {"train": {"student": {"kind": "lora"}}, "memory": {"offload_teacher": True}},
            "memory.offload_teacher: .* Set memory.offload_teacher=false or train.student.kind=full",
        ),
    ):
        with pytest.raises(ValidationError, match=message):
            RunConfig[DMD2Config].model_validate(values | wrong)
    lora = RunConfig[DMD2Config].model_validate(values | {"train": {"student": {"kind": "lora"}}}).train.lora
    assert lora is not None and lora.rank == 64


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind", "again"), [("dit", "full", False), ("sd", "lora", True)])
def test_compiled_runs_train_resume_and_export(
    family: str, kind: str, again: bool, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    """`again`: with activations that are computed again. The files are those of plain networks."""
    changes: dict[str, Any] = {
        "train": {"compile": True, "student": {"kind": kind}},
        "memory": {"gradient_checkpointing": again},
    }
    whole = make(folders(family), tmp_path / "whole", "boot", **changes)
    before = tensors(whole.roles["student"].net)
    assert whole.fit()
    assert any(not torch.equal(before[key], v) for key, v in whole.roles["student"].net.state_dict().items())
    second = make(folders(family), tmp_path / "parts", "boot", **changes)
    second.resume(str(tmp_path / "whole" / "checkpoints" / "1"))
    assert second.fit()
    plain = make(folders(family), tmp_path / "plain", "boot", **changed(changes, {"train": {"compile": False}}))
    plain.resume(str(tmp_path / "whole" / "checkpoints" / "2"))
    for name in ("student", "ema"):
        one, two = (
            load_file(tmp_path / part / "checkpoints" / "2" / f"{name}.safetensors") for part in ("whole", "parts")
        )
        assert one.keys() == two.keys() == own_tensors(plain.roles[name].net).keys()
        assert not [k for k in one if not torch.equal(one[k], two[k])]
    teacher, own = second.teacher, second.method
    common: dict[str, Any] = {"allowed_steps": own.allowed_steps(), "card": {"method": own.name, "prompt": "a bag"}}
    export(teacher, second.exported_weights(), own.scheduler(), tmp_path / "pipeline", **common)
    if kind == "lora":
        base = str(folders(family))
        export_lora(teacher, second.exported_weights(), own.scheduler(), tmp_path / "lora", base=base, **common)


@pytest.mark.slow
def test_compiled_networks_are_the_same(folders: Callable[[str], Path]) -> None:
    """Outputs, gradients of adapters, and features, which are heard where the network runs as written."""
    teacher = load_teacher(str(folders("sd")))
    teacher.students.adapt(LoraConfig(rank=4))
    plain = stirred(teacher.students.new())
    compiled = plain.clone()
    compiled.compile_net()
    x, t, cond = noise(teacher), torch.tensor([999, 400]), teacher.condition(raw(teacher))
    for student in (plain, compiled):
        student(x, t, cond).eps.square().mean().backward()
    for (name, one), two in zip(own_tensors(plain).items(), own_tensors(compiled).values(), strict=True):
        assert one.grad is not None and two.grad is not None and one.grad.any(), name
        size = float(one.grad.abs().max())
        torch.testing.assert_close(two.grad, one.grad, rtol=1e-3, atol=1e-4 * size)
    layers = named_layers(teacher, None, "layers")
    one, two = (features(student, layers, NoisyBatch(x, t, cond))[0] for student in (plain, compiled))
    assert torch.equal(one, two)
