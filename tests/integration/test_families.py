"""Every family: the stock pipeline's own calls of its network, and every method on it, from training to a stranger's process.

A new family joins by a line in BUILDERS, a new method by one in METHODS.
"""

import inspect
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from torch import Tensor

from builders.consistency import grid_of
from builders.contract import BUILDERS, CONTRACT, MATRIX, METHODS, noise, raw, settings_of
from builders.families import build_dit, build_edm, build_flux, build_pixart, build_sana, build_sd3, build_sdxl
from builders.teachers import perturbed
from fewstep.config import DataConfig, RunConfig
from fewstep.data import load_source
from fewstep.data.encoding_cache import EncodingCache
from fewstep.diffusion.guidance import concatenate
from fewstep.diffusion.prediction import add_noise, ode_step
from fewstep.diffusion.schedule import ShiftedFlow
from fewstep.evaluate import sample
from fewstep.export.pipeline import export
from fewstep.methods.consistency.cd import CD
from fewstep.methods.consistency.lcm import LCM
from fewstep.methods.consistency.method_settings import CdSettings, LcmSettings
from fewstep.methods.distribution_matching.dmd2 import DMD2, DMD2Config
from fewstep.methods.registry import METHODS as REGISTERED
from fewstep.methods.registry import method_class
from fewstep.teachers import FAMILIES, Inputs, Teacher, load_teacher
from fewstep.teachers.families.edm import Edm
from fewstep.teachers.families.flux import Flux, pack, unpack
from fewstep.teachers.families.sana import Sana
from fewstep.training.init_from import start_from
from fewstep.training.trainer import Trainer

TESTED = {"sd", "ddpm"}
"""On which the methods' own tests are."""
QUICK = {("sdxl", "dmd2"), ("sd3", "boot"), ("dit", "scm"), ("edm", "consistency")}
"""What is exported in every run of the tests; the rest is slow, for each is a process of its own."""


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    built: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in built:
            built[family] = CONTRACT[family](tmp_path_factory.mktemp("families") / family)
        return built[family]

    return folder


@pytest.fixture(params=BUILDERS)
def teacher(request: pytest.FixtureRequest, folders: Callable[[str], Path]) -> Teacher:
    return load_teacher(str(folders(request.param)))


def called(teacher: Teacher, size: int = 2) -> dict[str, Any]:
    """The conditions as arguments of a pipeline's call."""
    if teacher.conditions == "prompt":
        return {"prompt": raw(teacher, size)}
    return {"class_labels": raw(teacher, size)} | ({"batch_size": size} if isinstance(teacher, Edm) else {})


# The network's calls ----------------------------------------------------------------------------------------------------


def leaves(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(f"{name}.{key}", inner)


@contextmanager
def recorded(net: Any) -> Iterator[list[dict[str, Tensor]]]:
    """The tensors that the network is given, by the names of its parameters."""
    calls: list[dict[str, Tensor]] = []
    signature = inspect.signature(type(net).forward)

    def hook(module: Any, args: Any, kwargs: Any) -> None:
        bound = signature.bind(module, *args, **kwargs).arguments
        calls.append({k: v for name, value in bound.items() if name != "self" for k, v in leaves(name, value)})

    handle = net.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@pytest.mark.parametrize("family", [*BUILDERS, "pixart_sigma", "pixart_1024", "sd35", "schnell", "sana_euler"])
def test_the_network_is_given_what_the_stock_pipeline_gives_it(
    family: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    """Values, shapes and types, of the conditional and of the unconditional half, for a call with the default guidance."""
    variants: dict[str, Callable[[Path], Path]] = {
        "pixart_sigma": partial(build_pixart, sigma=True),
        "pixart_1024": partial(build_pixart, sample_size=128, patch_size=16),
        "sd35": partial(build_sd3, medium=True),
        "schnell": partial(build_flux, schnell=True),
        "sana_euler": partial(build_sana, solver=False),
    }
    folder = variants[family](tmp_path / family) if family in variants else folders(family)
    teacher = load_teacher(str(folder))
    net: Any = teacher.denoiser.net
    with recorded(net) as stock:
        latent = {"output_type": "latent"} if teacher.conditions == "prompt" else {}
        teacher.pipeline(**called(teacher), num_inference_steps=2, **latent)
    halves = [teacher.null_condition(2), teacher.condition(raw(teacher))]
    halves = halves[::-1] if teacher.conditions == "label" else halves  # DiTPipeline's order
    if isinstance(teacher, Flux):  # guides by an embedding alone
        halves = halves[1:]
    elif not teacher.guidance.guidable:
        halves = halves[:1]
    x = torch.cat([noise(teacher)] * len(halves))
    t = torch.full((len(x),), teacher.num_train_timesteps - 1)
    with recorded(net) as own:
        teacher.denoiser(x, t, concatenate(*halves) if len(halves) == 2 else halves[0])
    expected, found = stock[0], own[0]
    assert found.keys() == expected.keys()
    for name in expected:
        if name == "timestep" and not isinstance(teacher.pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
            continue  # flow matching's own first one is pure noise; the others' is a matter of their schedulers
        assert expected[name].dtype == found[name].dtype, name
        if name not in ("sample", "hidden_states"):
            # A prompt encoded alone differs in the last bit from one encoded beside another.
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)


def test_encoding_inverts_decoding_as_the_pipeline_decodes(teacher: Teacher) -> None:
    images = torch.rand(1, 3, teacher.image_size, teacher.image_size) * 2 - 1
    posterior = teacher.encode(images)
    assert posterior.mean.shape == (1, *teacher.latent_shape)
    if isinstance(teacher, Edm):
        assert torch.equal(teacher.decode(posterior.mean), images)
        return
    encoded = teacher.pipeline.vae.encode(images)
    z = encoded.latent if isinstance(teacher, Sana) else encoded.latent_dist.mean
    assert (teacher.decode(posterior.mean) - teacher.pipeline.vae.decode(z).sample).abs().max() < 1e-4


# Students ---------------------------------------------------------------------------------------------------------------


def passed(teacher: Teacher) -> dict[str, Any]:
    scale = teacher.guidance.scale_to_pass
    return {} if scale is None else {"guidance_scale": scale}


def test_student_starts_as_the_teacher_with_any_embedding(teacher: Teacher) -> None:
    x, t, cond = noise(teacher), torch.tensor([999, 400]), teacher.condition(raw(teacher))
    expected = teacher.denoiser(x, t, cond).x0
    student = teacher.students.new(progress_embedding=True)
    for progress in (0.0, 0.7):
        found = student(x, t, cond, progress=torch.full((2,), progress)).x0
        # A consistency model of pixels differs from the diffusion model by sigma_min / sigma, here 2e-3.
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=5e-3 if isinstance(teacher, Edm) else 1e-4)


def test_stock_pipeline_draws_the_student_at_the_jump_grid(teacher: Teacher) -> None:
    """Its jumps, written out with the timesteps that `jump_grid` tells, are the stock pipeline's image."""
    student = teacher.students.new(progress_embedding=True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.02)
    student.eval()
    cond = teacher.condition(raw(teacher, 1))
    for steps in (1,) if isinstance(teacher, Edm) else (1, 2):
        scheduler = teacher.samplers.jump(steps)
        grid = teacher.samplers.grid(scheduler, steps)
        assert len(grid) == steps + 1 and grid[0] == teacher.num_train_timesteps - 1
        x = noise(teacher, 1)
        with torch.no_grad():
            for t, s in pairwise(grid):
                x = ode_step(teacher.schedule, student(x, t[None], cond, progress=torch.ones(1)), s[None])
            expected = (teacher.decode(x)[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1)
        pipeline: Any = teacher.students.pipeline(student, scheduler)
        drawn = pipeline(
            **called(teacher, 1), num_inference_steps=steps, generator=torch.Generator().manual_seed(0),
            output_type="np", **passed(teacher),
        ).images  # fmt: skip
        torch.testing.assert_close(torch.tensor(drawn[0]), expected, rtol=0, atol=2e-3)


def test_networks_whose_weights_wait_in_main_memory_answer_the_same(teacher: Teacher) -> None:
    """To the bit, and in gradients that pass through; between calls there are none, and they come back as they were."""
    x, t, cond = noise(teacher).requires_grad_(), torch.tensor([999, 400]), teacher.condition(raw(teacher))
    before = {key: v.clone() for key, v in teacher.denoiser.state_dict().items()}
    answers: list[Tensor] = []
    for _ in range(2):
        answers.append(teacher.denoiser(x, t, cond).x0)
        answers += torch.autograd.grad(answers[-1].square().mean(), x)
        if not teacher.placement.offloaded:
            teacher.placement.offload()
        assert {p.device.type for p in teacher.denoiser.parameters()} == {"meta"}
        assert teacher.placement.device.type == teacher.null_condition(1)[next(iter(cond))].device.type == "cpu"
    assert torch.equal(answers[0], answers[2]) and torch.equal(answers[1], answers[3]) and answers[1].any()
    with teacher.placement.whole():
        assert all(torch.equal(before[key], v) for key, v in teacher.denoiser.state_dict().items())
    assert next(teacher.denoiser.parameters()).device.type == "meta"
    teacher.placement.onload()
    assert all(torch.equal(before[key], v) for key, v in teacher.denoiser.state_dict().items())


def test_features_are_maps(teacher: Teacher) -> None:
    found: list[Tensor] = []
    module = teacher.denoiser.feature_module()
    handle = module.register_forward_hook(lambda _, __, output: found.append(teacher.denoiser.feature_map(output)))
    teacher.denoiser(noise(teacher), torch.tensor([999, 10]), teacher.condition(raw(teacher)))
    handle.remove()
    assert found[0].ndim == 4 and len(found[0]) == 2 and found[0].shape[2] == found[0].shape[3]


# Methods ----------------------------------------------------------------------------------------------------------------


def test_every_family_and_every_method_is_here(folders: Callable[[str], Path]) -> None:
    kinds = {json.loads((folders(family) / "model_index.json").read_text())["_class_name"] for family in CONTRACT}
    assert {FAMILIES[kind] for kind in kinds} == set(FAMILIES.values())
    # Of those that compose the same parts, LCM and MLCM stand for all.
    composed = {method_class(name) for name in ("cd", "ect", "pcm", "trajectory")}
    assert {method for method, _, _ in METHODS.values()} == {method_class(name) for name in REGISTERED} - composed


def trainer_for(
    folder: Path, output: Path, method: str, iterations: int = 2, every: int = 1, steps: int | None = None
) -> Trainer:
    kind, config_kind, _ = METHODS[method]
    teacher = load_teacher(str(folder))
    settings = settings_of(method, teacher, steps)
    labels = {"num_labels": 10} if teacher.conditions == "label" else {}
    size = 1 if folder.name in ("flux", "sana") else 2  # their many tokens and pixels take their time
    config = RunConfig[config_kind].model_validate(
        {
            "teacher": str(folder), "output_dir": str(output), "data": {"source": "fashion", "limit": 8} | labels,
            "max_iterations": iterations, "train": {"cpu_threads": 1, "mixed_precision": "no"}, "batch_size": size,
            "checkpoint": {"every": every}, "log": {"every": 1},
            "method": {"optim": {"lr": 1e-3}} | settings,
        }
    )  # fmt: skip
    return Trainer(config, kind(config.method, teacher), teacher, load_source(config.data, teacher.image_size))


def weights(output: Path, name: str) -> dict[str, Tensor]:
    return load_file(output / "checkpoints" / "2" / f"{name}.safetensors")


@pytest.mark.parametrize(
    ("family", "method"),
    [pytest.param(f, m, marks=pytest.mark.slow if f in TESTED and m != "mlcm" else ()) for f, m in MATRIX],
)
def test_methods_train_and_resume(family: str, method: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    """Two iterations; and the second alone, in a new Trainer from the first one's checkpoint, to the same bits."""
    whole = trainer_for(folders(family), tmp_path / "whole", method)
    before = {k: v.clone() for k, v in whole.roles["student"].net.state_dict().items()}
    assert whole.fit()
    after = whole.roles["student"].net.state_dict()
    assert all(torch.isfinite(v).all() for v in after.values() if v.is_floating_point())
    assert any(not torch.equal(before[k], v) for k, v in after.items())
    second = trainer_for(folders(family), tmp_path / "parts", method)
    second.resume(str(tmp_path / "whole" / "checkpoints" / "1"))
    assert second.fit()
    for name in ("student", "ema", "student_optimizer"):
        one, two = weights(tmp_path / "whole", name), weights(tmp_path / "parts", name)
        assert one.keys() == two.keys()
        assert not [k for k in one if not torch.equal(one[k], two[k])]


@pytest.mark.parametrize(
    ("family", "method"),
    [pytest.param(f, m, marks=() if (f, m) in QUICK else pytest.mark.slow) for f, m in MATRIX],
)
def test_methods_export(family: str, method: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    """Ten iterations; then export compares the folder, in a process without fewstep that passes `num_inference_steps` alone
    (and what the card says), with the student in memory: images and timesteps at every allowed count."""
    _train_and_export(trainer_for(folders(family), tmp_path / "run", method, iterations=10, every=10), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2, 8])
@pytest.mark.parametrize(("family", "method"), MATRIX)
def test_methods_export_for_other_counts(
    family: str, method: str, steps: int, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    if family == "edm" and method in ("boot", "mlcm"):
        pytest.skip("one deterministic step is all that its stock pipeline takes")
    trainer = trainer_for(folders(family), tmp_path / "run", method, iterations=2, every=2, steps=steps)
    assert steps in trainer.method.allowed_steps()
    _train_and_export(trainer, tmp_path)


@pytest.mark.parametrize("method", [pytest.param(m, marks=() if m == "dmd2" else pytest.mark.slow) for m in METHODS])
def test_stable_diffusion_3_5_exports(method: str, tmp_path: Path) -> None:
    """Its transformer has normalised queries and keys, and blocks with a second attention."""
    folder = build_sd3(tmp_path / "sd35", medium=True)
    _train_and_export(trainer_for(folder, tmp_path / "run", method), tmp_path)


def _train_and_export(trainer: Trainer, folder: Path) -> None:
    own, teacher = trainer.method, trainer.teacher
    before = {k: v.clone() for k, v in trainer.roles["student"].net.state_dict().items()}
    assert trainer.fit()
    lines = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    losses = [line for line in lines if "warning" not in line]
    assert len(losses) == trainer.iteration
    figures = [value for line in losses for value in line.values()]
    places = [
        value for figure in figures if isinstance(figure, dict) for value in figure.values()
    ]  # such as BOOT's sub-steps
    assert all(math.isfinite(value) for value in figures + places if not isinstance(value, dict))
    assert any(not torch.equal(before[k], v) for k, v in trainer.roles["student"].net.state_dict().items())
    path = export(
        teacher, trainer.exported_weights(), own.scheduler(), folder / "pipeline", allowed_steps=own.allowed_steps(),
        guidance=own.student_guidance, card={"method": own.name, "prompt": "a bag"},
    )  # fmt: skip
    assert (path / "README.md").exists()


@pytest.mark.parametrize("family", ["sdxl", "dit", "sd3", "edm"])
def test_images_of_renoising_students_depend_on_seed_and_index_only(
    family: str, folders: Callable[[str], Path]
) -> None:
    """Also where the pipeline passes its scheduler no generator."""
    teacher = load_teacher(str(folders(family)))
    pipeline = teacher.students.pipeline(perturbed(teacher, False), teacher.samplers.renoise(2))
    settings = {"steps": 2, "seed": 1, "guidance_scale": teacher.guidance.scale_to_pass}
    whole = sample(pipeline, raw(teacher), [5, 6], **settings)
    alone = sample(pipeline, raw(teacher)[1:], [6], **settings)
    assert (alone[0].int() - whole[1].int()).abs().max() <= 1
    assert torch.equal(sample(pipeline, raw(teacher), [5, 6], **settings), whole)


# SDXL -------------------------------------------------------------------------------------------------------------------


def test_sdxl_null_prompt_is_the_configs(folders: Callable[[str], Path], tmp_path: Path) -> None:
    zeros = load_teacher(str(folders("sdxl"))).null_condition(2)
    assert not zeros["encoder_hidden_states"].any() and not zeros["text_embeds"].any()
    assert zeros["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]] * 2
    teacher = load_teacher(str(build_sdxl(tmp_path / "sdxl", force_zeros=False)))
    null, empty = teacher.null_condition(1), teacher.condition([""])
    assert null["text_embeds"].any() and torch.equal(null["text_embeds"], empty["text_embeds"])


def test_sdxl_vae_stays_in_float32_where_it_asks_for_it(folders: Callable[[str], Path]) -> None:
    teacher = load_teacher(str(folders("sdxl")))
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    expected = teacher.encode(images).mean
    teacher.placement.to(torch.device("cpu"), torch.bfloat16)
    assert teacher.pipeline.vae.dtype == torch.bfloat16
    rounded = (
        teacher.pipeline.vae.encode(images.bfloat16()).latent_dist.mean * teacher.pipeline.vae.config.scaling_factor
    )
    difference = (teacher.encode(images).mean - expected).abs().max()
    # The weights are rounded once; its activations are not.
    assert difference < (rounded.float() - expected).abs().max()


@pytest.mark.parametrize("guidance", [False, True])
def test_sdxl_has_no_guidance_of_its_own(guidance: bool, folders: Callable[[str], Path]) -> None:
    teacher = load_teacher(str(folders("sdxl")))
    student, x = perturbed(teacher, guidance), noise(teacher, 1)
    scale = 2.0 if guidance else None
    pipeline: Any = teacher.students.pipeline(student, teacher.samplers.renoise(4), scale)
    with torch.no_grad():
        embedded = None if scale is None else torch.tensor([scale])
        x0 = student(x, torch.tensor([999]), teacher.condition(["a bag"]), embedded).x0
    for given in ({}, {"guidance_scale": 9.0}):
        found = pipeline("a bag", num_inference_steps=1, latents=x, output_type="latent", **given).images
        torch.testing.assert_close(found, x0, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError):
        pipeline("a bag", num_inference_steps=5)


# DiT --------------------------------------------------------------------------------------------------------------------


def test_dit_keeps_its_labels_in_training_mode(folders: Callable[[str], Path]) -> None:
    """diffusers would drop one label in ten, in each block anew."""
    teacher = load_teacher(str(folders("dit")))
    student = teacher.students.new()
    assert student.net.training
    x, t, cond = noise(teacher, 1).expand(64, -1, -1, -1), torch.full((64,), 500), teacher.condition([3] * 64)
    with torch.no_grad():
        torch.testing.assert_close(student(x, t, cond).eps, teacher.denoiser(x, t, cond).eps)
        null = student(x[:1], t[:1], teacher.null_condition(1)).eps
    assert (null - student(x[:1], t[:1], teacher.condition([3])).eps).abs().max() > 1e-3


def test_dit_student_keeps_the_names_of_classes(folders: Callable[[str], Path], tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    teacher = load_teacher(str(folders("dit")))
    teacher.students.pipeline(teacher.students.new(), teacher.samplers.renoise(4)).save_pretrained(tmp_path)
    assert DiffusionPipeline.from_pretrained(tmp_path).get_label_ids(["boot", "bag"]) == [3, 0]


def test_dit_refuses_labels_that_it_does_not_have(tmp_path: Path) -> None:
    teacher = load_teacher(str(build_dit(tmp_path / "dit", num_labels=10)))
    with pytest.raises(ValueError, match="found condition 10; expected labels 0 to 9"):
        teacher.condition([10])
    # The stock pipeline's own null label is 1000 for any number of classes, so that it cannot guide this one at all.
    pipeline: Any = teacher.students.pipeline(teacher.students.new(), teacher.samplers.renoise(4))
    with pytest.raises(IndexError):
        pipeline([3], num_inference_steps=4)
    for scale, said in ((None, "4 by default"), (1.5, "1.5")):
        with pytest.raises(
            ValueError, match=f"guidance_scale: found {said}; expected 1, for DiTPipeline .* has 10 labels"
        ):
            sample(pipeline, [3], [0], steps=4, seed=0, guidance_scale=scale)
    assert sample(pipeline, [3], [0], steps=1, seed=0, guidance_scale=1.0).shape == (1, 3, 32, 32)


@pytest.mark.parametrize("family", ["dit", "pixart", "sd3", "sana"])
def test_guidance_inputs_fold_exactly(family: str, folders: Callable[[str], Path]) -> None:
    teacher = load_teacher(str(folders(family)))
    student = teacher.students.new(guidance_embedding=True, progress_embedding=True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.02)
    x, t, cond = noise(teacher), torch.tensor([999, 10]), teacher.condition(raw(teacher))
    one, scale = torch.ones(2), torch.full((2,), 3.5)
    with torch.no_grad():
        live = student.eval()(x, t, cond, scale, one).x0
        net: Any = teacher.students.pipeline(student, teacher.samplers.renoise(4), 3.5)
        folded = teacher.denoiser.with_net(net.transformer)(x, t, cond).x0
        other = student(x, t, cond, scale - 2, one).x0
        middle = student(x, t, cond, scale, one / 2).x0
    torch.testing.assert_close(folded, live, rtol=1e-4, atol=1e-4)
    assert (other - live).abs().max() > 1e-3 and (middle - live).abs().max() > 1e-3
    with pytest.raises(ValueError, match="Set the one to fold"):
        teacher.students.pipeline(student, teacher.samplers.renoise(4))
    with pytest.raises(ValueError, match="the student embeds no guidance"):
        teacher.students.pipeline(teacher.students.new(), teacher.samplers.renoise(4), 2.0)
    with pytest.raises(ValueError, match="guidance: found none"):
        student(x, t, cond)


def test_live_guidance_is_refused_before_training(folders: Callable[[str], Path]) -> None:
    config = LcmSettings.model_validate({"optim": {"lr": 1e-3}})
    with pytest.raises(ValueError, match=r"method\.guidance\.export_scale"):
        LCM(config, load_teacher(str(folders("dit"))))


# Flows ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd3", "flux", "sana"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("stochastic", [False, True])
def test_flow_students_run_the_even_grid_under_the_shift(
    family: str, steps: int, stochastic: bool, folders: Callable[[str], Path]
) -> None:
    """Not the stock one of SD3, which is degenerate for few steps: 1000, 8.9 for two."""
    teacher = load_teacher(str(folders(family)))
    assert isinstance(teacher.schedule, ShiftedFlow)
    h = teacher.schedule.shift
    scheduler: Any = teacher.samplers.renoise(steps) if stochastic else teacher.samplers.jump(steps)
    grid = teacher.samplers.grid(scheduler, steps)
    u = torch.arange(steps, 0, -1) / steps
    expected = torch.cat([h * u / (1 + (h - 1) * u), torch.zeros(1)])
    torch.testing.assert_close(scheduler.sigmas, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(scheduler.timesteps, 1000 * expected[:-1], rtol=0, atol=2e-3)
    torch.testing.assert_close(teacher.schedule(grid)[1], expected, rtol=0, atol=2e-6)
    assert grid.is_floating_point() == (steps == 3)


def test_flow_shift_is_the_teachers(folders: Callable[[str], Path]) -> None:
    sd3, flux = (load_teacher(str(folders(family))) for family in ("sd3", "flux"))
    assert isinstance(sd3.schedule, ShiftedFlow) and isinstance(flux.schedule, ShiftedFlow)
    assert sd3.schedule.shift == 3.0
    flux.pipeline("a bag", num_inference_steps=4, output_type="latent")
    stock = flux.pipeline.scheduler.timesteps / 1000
    torch.testing.assert_close(flux.schedule(torch.tensor([999, 749, 499, 249]))[1], stock, rtol=0, atol=1e-5)


def test_flow_schedule_and_its_inverse() -> None:
    schedule = ShiftedFlow(3.0)
    t = torch.tensor([-1, 0, 249, 999])
    alpha, sigma = schedule(t)
    assert sigma[0] == 0 and sigma[3] == 1 and torch.equal(alpha, 1 - sigma)
    assert abs(sigma[2].item() - 0.5) < 1e-6
    torch.testing.assert_close(schedule.timestep(sigma.double()), t.double(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("family", ["sd3", "flux", "sana"])
def test_stock_pipeline_renoises_as_the_method_does(family: str, folders: Callable[[str], Path]) -> None:
    teacher = load_teacher(str(folders(family)))
    student, cond = perturbed(teacher, False), teacher.condition(["a bag"])
    scheduler = teacher.samplers.renoise(2)
    pipeline: Any = teacher.students.pipeline(student, scheduler)
    torch.manual_seed(5)
    images = pipeline(
        "a bag",
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **passed(teacher),
    ).images
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, *teacher.latent_shape, generator=generator)
    torch.manual_seed(5)
    grid = teacher.samplers.grid(scheduler, 2)
    with torch.no_grad():
        for t, s in pairwise(grid):
            x0 = student(x, t[None], cond).x0
            # Sana's pipeline alone passes its generator on.
            fresh = torch.randn(images.shape, generator=generator if family == "sana" else None)
            x = add_noise(teacher.schedule, x0, unpack(fresh) if family == "flux" else fresh, s[None])
    torch.testing.assert_close(images, pack(x) if family == "flux" else x, rtol=1e-3, atol=1e-3)


def test_flow_refuses_what_its_scheduler_cannot_do(folders: Callable[[str], Path]) -> None:
    teacher = load_teacher(str(folders("sd3")))
    with pytest.raises(ValueError, match="starts at pure noise"):
        teacher.samplers.renoise(1, spacing=400)
    with pytest.raises(ValueError, match="timestep_scaling"):
        teacher.samplers.renoise(4, timestep_scaling=0.1)
    assert teacher.samplers.counts(4) == (4,)
    assert load_teacher(str(folders("flux"))).samplers.counts(4) == (1, 2, 4)


def test_flux_packing_is_the_pipelines() -> None:
    from diffusers import FluxPipeline

    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(pack(x), FluxPipeline._pack_latents(x, 2, 4, 6, 6))
    assert torch.equal(unpack(pack(x)), x)


def test_flux_student_has_its_guidance_in_its_weights(folders: Callable[[str], Path]) -> None:
    """FLUX.1-dev embeds a scale; its student was trained at the default, and the caller's has no effect."""
    teacher = load_teacher(str(folders("flux")))
    student, cond = perturbed(teacher, False), teacher.condition(["a bag"])
    assert cond["guidance"].tolist() == [3.5]
    x, t = noise(teacher, 1), torch.tensor([999])
    pipeline: Any = teacher.students.pipeline(student, teacher.samplers.renoise(1))
    assert not pipeline.transformer.config.guidance_embeds
    plain = {key: v for key, v in cond.items() if key != "guidance"}
    with torch.no_grad():
        live = student(x, t, cond).x0
        other = student(x, t, cond | {"guidance": torch.tensor([1.0])}).x0
        folded = teacher.denoiser.with_net(pipeline.transformer)(x, t, plain).x0
    torch.testing.assert_close(folded, live, rtol=1e-4, atol=1e-4)
    assert (other - live).abs().max() > 1e-3


def test_a_student_with_folded_guidance_is_no_start_for_one_that_embeds_it(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    """Flux-dev's scale would count twice."""
    teacher = load_teacher(str(folders("flux")))
    teacher.students.pipeline(teacher.students.new(), teacher.samplers.renoise(4)).save_pretrained(tmp_path)
    roles = DMD2(DMD2Config.model_validate({"optim": {"lr": 1e-3}, "steps": 4}), teacher).roles()
    with pytest.raises(ValueError, match=r"train.init_from: .* without .*guidance_embedder"):
        start_from(roles, tmp_path)


# Sana -------------------------------------------------------------------------------------------------------------------


def test_sana_has_no_instruction_for_what_guidance_leads_away_from(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    """As its stock call; and so it is with encodings made ahead."""
    teacher = load_teacher(str(folders("sana")))
    net: Any = teacher.denoiser.net
    with recorded(net) as stock:
        teacher.pipeline(["a bag"], negative_prompt="a coat", num_inference_steps=1, output_type="latent")
    found = teacher.condition([teacher.negative("a coat"), "a bag"])
    for name, value in found.items():
        torch.testing.assert_close(value, stock[0][name], rtol=1e-5, atol=1e-5)
    instructed, null, empty = teacher.condition(["a coat"]), teacher.null_condition(1), teacher.condition([""])
    assert not torch.equal(instructed["encoder_hidden_states"][0], found["encoder_hidden_states"][0])
    assert not torch.equal(null["encoder_hidden_states"], empty["encoder_hidden_states"])

    (tmp_path / "prompts.txt").write_text("a bag\n")
    data = DataConfig(source="prompts", path=tmp_path / "prompts.txt")
    source, cache = load_source(data, teacher.image_size), EncodingCache(tmp_path, teacher)
    cache.fill(source, teacher, [teacher.negative("a coat")], False, 1)
    cache.open(source, needs_images=False)
    teacher.prompts.clear()
    teacher.prompts.stored = cache.conditions
    teacher.placement.release(teacher.placement.text_parts)
    assert torch.equal(teacher.null_condition(1)["encoder_hidden_states"], null["encoder_hidden_states"])
    again = teacher.condition([teacher.negative("a coat"), "a bag"])
    torch.testing.assert_close(again, found, rtol=1e-5, atol=1e-5)


# EDM --------------------------------------------------------------------------------------------------------------------


def edm(folder: Path, **settings: Any) -> Edm:
    teacher = load_teacher(str(build_edm(folder, **settings)))
    assert isinstance(teacher, Edm)
    return teacher


@pytest.mark.parametrize("labels", [10, None])
def test_edm_networks_are_called_and_read_as_the_stock_scheduler_does(labels: int | None, tmp_path: Path) -> None:
    """At every level: scaled input, time and, for a student, x0; a teacher's x0 has the scalings without an end."""
    teacher = edm(tmp_path / "edm", num_labels=labels, levels=40)
    student, cond = perturbed(teacher, False), teacher.condition([3])
    stock: Any = CMStochasticIterativeScheduler(clip_denoised=False)
    z = noise(teacher, 1)
    for t in (0, 1, 13, 39):
        stock.set_timesteps(timesteps=[39 - t])
        time, k = stock.timesteps[0], stock.sigmas[0]
        alpha, sigma = teacher.schedule(torch.tensor([t]))
        torch.testing.assert_close((sigma / alpha)[0], k.double(), rtol=1e-6, atol=0)
        assert (alpha**2 + sigma**2).item() == pytest.approx(1, rel=1e-12)
        with recorded(student.net) as calls, torch.no_grad():
            p = student(alpha.float() * k * z, torch.tensor([t]), cond)
            output: Any = student.net(calls[0]["sample"], time, class_labels=cond.get("class_labels")).sample
            torch.testing.assert_close(calls[0]["timestep"][0], time.double(), rtol=1e-6, atol=1e-6)
            plain = teacher.denoiser.with_net(student.net)(alpha.float() * k * z, torch.tensor([t]), cond)
        torch.testing.assert_close(calls[0]["sample"], stock.scale_model_input(k * z, time), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(p.x0, stock.step(output, time, k * z).prev_sample, rtol=1e-4, atol=1e-5)
        c_skip, c_out = stock.get_scalings(k)
        torch.testing.assert_close(plain.x0, c_skip * k * z + c_out * output, rtol=1e-4, atol=1e-5)
        assert t or torch.equal(p.x0, k * z) or (p.x0 - k * z).abs().max() < 1e-8  # the identity at sigma_min
    assert (stock.sigmas[0] - 80).abs() < 1e-3


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_edm_students_run_the_even_grid(steps: int, tmp_path: Path) -> None:
    teacher = edm(tmp_path / "edm", levels=40)
    scheduler: Any = teacher.samplers.renoise(steps)
    for n in teacher.samplers.counts(steps):
        scheduler.set_timesteps(n)
        grid = teacher.samplers.grid(scheduler, n)
        expected = torch.arange(40, 0, -40 // n) - 1
        assert torch.equal(grid, torch.cat([expected, torch.tensor([-1])]))
        torch.testing.assert_close(teacher.schedule.level(expected), scheduler.sigmas[:-1].double(), rtol=1e-6, atol=0)


def test_edm_stock_pipeline_renoises_as_the_method_does(folders: Callable[[str], Path]) -> None:
    teacher = load_teacher(str(folders("edm")))
    student, cond, scheduler = perturbed(teacher, False), teacher.condition([3]), teacher.samplers.renoise(4)
    pipeline: Any = teacher.students.pipeline(student, scheduler)
    drawn = pipeline(
        class_labels=[3], num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="np"
    ).images
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, *teacher.latent_shape, generator=generator)
    with torch.no_grad():
        for t, s in pairwise(teacher.samplers.grid(scheduler, 4)):
            x0 = student(x, t[None], cond).x0
            x = add_noise(teacher.schedule, x0, torch.randn(x.shape, generator=generator), s[None])
    expected = (x[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(torch.tensor(drawn[0]), expected, rtol=0, atol=2e-3)


def test_edm_progress_folds_beside_labels(folders: Callable[[str], Path]) -> None:
    teacher = load_teacher(str(folders("edm")))
    student = teacher.students.new(progress_embedding=True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.05)
    x, t, cond = noise(teacher), torch.tensor([999, 400]), teacher.condition(raw(teacher))
    with torch.no_grad():
        live, middle = (student.eval()(x, t, cond, progress=torch.full((2,), v)).x0 for v in (1.0, 0.5))
        folded = student.with_net(teacher.students.fold(student))
        torch.testing.assert_close(folded(x, t, cond).x0, live, rtol=1e-4, atol=1e-4)
        other = folded(x, t, teacher.condition([1, 2])).x0
    assert (middle - live).abs().max() > 1e-3 and (other - live).abs().max() > 1e-3


def test_edm_time_is_differentiable(folders: Callable[[str], Path]) -> None:
    """As sCM needs it: not a table's constant."""
    teacher = load_teacher(str(folders("edm")))
    x, cond = noise(teacher, 1).double(), teacher.condition([3])
    net = teacher.denoiser.net.double()

    def x0(t: Tensor) -> Tensor:
        return teacher.denoiser.call(net, Inputs(x, t, cond))

    t = torch.tensor([700.0], dtype=torch.float64)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _, rate = torch.func.jvp(x0, (t,), (torch.ones_like(t),))
    with torch.no_grad():
        difference = (x0(t + 0.02) - x0(t - 0.02)) / 0.04
    torch.testing.assert_close(rate, difference, rtol=0.02, atol=1e-2 * float(rate.abs().max()))


def test_edm_refuses_what_its_pipeline_cannot_do(tmp_path: Path) -> None:
    teacher = edm(tmp_path / "edm", levels=40)
    with pytest.raises(ValueError, match="one deterministic step"):
        teacher.samplers.jump(2)
    with pytest.raises(ValueError, match="a divisor of num_train_timesteps 40"):
        teacher.samplers.renoise(3)
    with pytest.raises(ValueError, match="a grid from timestep 19; expected one from 39"):
        teacher.samplers.renoise(2, spacing=10)
    with pytest.raises(ValueError, match="with 40 steps"):
        teacher.samplers.renoise(40)
    with pytest.raises(ValueError, match="found condition 10; expected labels 0 to 9"):
        teacher.condition([10])
    with pytest.raises(ValueError, match=r"guidance: found guidance; .* no unconditional prediction"):
        LCM(LcmSettings.model_validate({"optim": {"lr": 1e-3}}), teacher)


def test_the_papers_levels_are_the_published_schedulers(tmp_path: Path) -> None:
    settings = CdSettings.model_validate({"optim": {"lr": 1e-3}, "steps": 2})
    grid = grid_of(CD(settings, edm(tmp_path / "edm", levels=40)))
    assert torch.equal(grid.t, torch.arange(1, 40)) and torch.equal(grid.s, torch.arange(39)) and not grid.end.any()
