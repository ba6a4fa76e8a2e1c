"""What stock diffusers does to a few-step student that is saved in the obvious way, each beside what BOOT exports instead."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
)
from torch import Tensor

from builders.families import build_dit, build_pixart, build_sd3, build_sdxl
from fewstep.diffusion.prediction import PredictionType, ode_step, read
from fewstep.diffusion.schedule import ShiftedFlow, VariancePreserving
from fewstep.teachers import load_teacher
from fewstep.teachers.flow_schedulers import even_grid_scheduler
from fewstep.teachers.schedulers import deterministic_scheduler, jump_grid


def ddim(**settings: Any) -> DDIMScheduler:
    return DDIMScheduler(**{"timestep_spacing": "trailing", "clip_sample": False} | settings)


def noise() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sample, output = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    return sample, output


@pytest.mark.parametrize("kind", ["sample", "epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_one_step_returns_x0_at_any_timestep_input(kind: PredictionType, spacing: str) -> None:
    """The spacing decides the timestep alone: 999 or 0."""
    scheduler = ddim(prediction_type=kind, timestep_spacing=spacing)
    scheduler.set_timesteps(1)
    (t,) = scheduler.timesteps
    assert t == (999 if spacing == "trailing" else 0)
    x, output = noise()
    schedule = VariancePreserving(scheduler.alphas_cumprod)
    found = scheduler.step(output, t, x, eta=0.0).prev_sample
    expected = read(schedule, kind, output, x, t.expand(2)).x0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    # Without set_alpha_to_one, noise comes back; LCM's scheduler, which one step has elsewhere, asks for no such key.
    noisy = ddim(prediction_type=kind, timestep_spacing=spacing, set_alpha_to_one=False)
    noisy.set_timesteps(1)
    assert (noisy.step(output, t, x, eta=0.0).prev_sample - expected).abs().max() > 1e-3
    ours: Any = deterministic_scheduler(scheduler, 1)
    assert isinstance(ours, LCMScheduler) and jump_grid(ours, 1).tolist() == [999, -1]
    expected = read(schedule, kind, output, x, torch.full((2,), 999)).x0
    torch.testing.assert_close(ours.step(output, 999, x).prev_sample, expected, rtol=1e-4, atol=1e-3)


def test_ddims_own_clipping_is_off() -> None:
    """DDIMScheduler clips x0 by default: harmless for the last pixels, not for the steps before and not for latents."""
    x, output = noise()
    plain = ddim(prediction_type="sample")
    clipped = DDIMScheduler(prediction_type="sample", timestep_spacing="trailing")
    assert clipped.config.clip_sample
    moved = []
    for scheduler in (plain, clipped):
        scheduler.set_timesteps(2)
        moved.append(scheduler.step(3 * output, 499, x, eta=0.0).prev_sample)
    assert (moved[0] - moved[1]).abs().max() > 0.1
    for steps in (1, 2, 4):
        ours: Any = deterministic_scheduler(clipped, steps)
        assert not ours.config.get("clip_sample", False) and not ours.config.thresholding
        t, s = jump_grid(ours, steps)[:2]
        p = read(VariancePreserving(plain.alphas_cumprod), "sample", 3 * output, x, t.expand(2))
        expected = ode_step(VariancePreserving(plain.alphas_cumprod), p, s.expand(2))
        torch.testing.assert_close(ours.step(3 * output, t, x).prev_sample, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", range(1, 9))
def test_ddims_trailing_grid_is_not_one_for_three_six_and_seven(steps: int) -> None:
    """Where its step arrives is the next timestep that it tells, and clean data at last, or it is not."""
    x, output = noise()
    scheduler = ddim()
    scheduler.set_timesteps(steps)
    schedule = VariancePreserving(scheduler.alphas_cumprod)
    errors = []
    for t, s in pairwise([*scheduler.timesteps, torch.tensor(-1)]):
        found = scheduler.step(output, t, x, eta=0.0).prev_sample
        expected = ode_step(schedule, read(schedule, "epsilon", output, x, t.expand(2)), s.expand(2))
        errors.append(((found - expected).abs() / expected.abs().max()).max().item())
    assert (max(errors) > 1e-4) == (steps in (3, 6, 7)), errors


def test_stable_diffusion_rewrites_the_offset(tiny_sd: Path) -> None:
    """A student saved to be told timestep 0 is told 1. An exported folder's scheduler stays as it is."""
    teacher = load_teacher(str(tiny_sd))
    parts: dict[str, Any] = dict(teacher.pipeline.components)
    saved = ddim(timestep_spacing="leading", steps_offset=0)
    saved.set_timesteps(1)
    assert saved.timesteps.tolist() == [0]
    stock = StableDiffusionPipeline(**parts | {"scheduler": saved}, requires_safety_checker=False)
    stock.scheduler.set_timesteps(1)
    assert stock.scheduler.timesteps.tolist() == [1]
    ours: Any = teacher.samplers.jump(4)
    before = dict(ours.config)
    kept = StableDiffusionPipeline(**parts | {"scheduler": ours}, requires_safety_checker=False)
    assert dict(kept.scheduler.config) == before


def test_flow_matchings_own_few_steps_are_degenerate() -> None:
    own = FlowMatchEulerDiscreteScheduler()
    own.set_timesteps(2)
    torch.testing.assert_close(own.sigmas, torch.tensor([1, 0.001, 0]), rtol=0, atol=1e-6)
    shifted = FlowMatchEulerDiscreteScheduler(shift=3.0)
    shifted.set_timesteps(4)
    assert (shifted.sigmas - torch.tensor([1, 0.9, 0.75, 0.5, 0])).abs().max() > 0.1
    # A terminal shift divides by zero for one step.
    terminal = FlowMatchEulerDiscreteScheduler(shift_terminal=0.02)
    terminal.set_timesteps(1)
    assert terminal.sigmas.isnan().any()
    for steps in (1, 2, 4):
        ours: Any = even_grid_scheduler(ShiftedFlow(3.0), steps, stochastic=False)
        ours.set_timesteps(steps, **({"mu": ours.config.base_shift} if ours.config.use_dynamic_shifting else {}))
        u = torch.arange(steps, -1, -1) / steps
        torch.testing.assert_close(ours.sigmas, 3 * u / (1 + 2 * u), rtol=0, atol=2e-6)


def test_pixart_cannot_take_one_step_of_dpm_solver(tmp_path: Path) -> None:
    teacher = load_teacher(str(build_pixart(tmp_path / "pixart")))
    pipeline: Any = teacher.pipeline
    assert isinstance(pipeline.scheduler, DPMSolverMultistepScheduler)
    with pytest.raises(IndexError):
        pipeline("a bag", num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    ours: Any = teacher.students.pipeline(teacher.students.new(progress_embedding=True), teacher.samplers.jump(1))
    drawn = ours("a bag", num_inference_steps=1, guidance_scale=1.0, output_type="latent").images
    assert drawn.isfinite().all()


@pytest.mark.parametrize("build", [partial(build_dit, num_labels=1000), build_pixart, build_sd3, build_sdxl])
def test_pipelines_guide_by_default(build: Callable[[Path], Path], tmp_path: Path) -> None:
    """A second half of the batch, unless the caller says no: in SDXL the folder itself does, for the others the card."""
    teacher = load_teacher(str(build(tmp_path / "teacher")))
    ours: Any = teacher.students.pipeline(teacher.students.new(progress_embedding=True), teacher.samplers.jump(1))
    inputs = {"prompt": "a bag"} if teacher.conditions == "prompt" else {"class_labels": [3]}
    said = {} if teacher.guidance.scale_to_pass is None else {"guidance_scale": teacher.guidance.scale_to_pass}
    assert (said == {}) == (build is build_sdxl)
    rows = []
    for pipeline, more in ((teacher.pipeline, {}), (ours, {}), (ours, said)):
        net = pipeline.unet if build is build_sdxl else pipeline.transformer
        sizes = []

        def counted(_: Any, args: Any, kwargs: Any, sizes: list[int] = sizes) -> None:
            sizes.append(len(args[0] if args else kwargs["hidden_states"]))

        handle = net.register_forward_pre_hook(counted, with_kwargs=True)
        steps = 1 if pipeline is ours else 2
        pipeline(**inputs, num_inference_steps=steps, output_type="np", **more)
        handle.remove()
        rows.append(sizes)
    assert rows == [[2, 2], [1] if build is build_sdxl else [2], [1]]


def test_sdxls_own_scheduler_scales_noise_and_begins_late(tmp_path: Path) -> None:
    """EulerDiscreteScheduler counts in sigma / alpha: its noise is of another size. One leading step is at t = 1."""
    teacher = load_teacher(str(build_sdxl(tmp_path / "sdxl")))
    stock: Any = teacher.pipeline.scheduler
    own = EulerDiscreteScheduler.from_config(stock.config, timestep_spacing="trailing")
    for scheduler in (stock, own):
        scheduler.set_timesteps(1)
    assert stock.timesteps.tolist() == [1] and own.timesteps.tolist() == [999]
    assert own.init_noise_sigma == pytest.approx(14.6, abs=0.1)
    x, _ = noise()
    for steps in (1, 4):
        ours: Any = teacher.samplers.jump(steps)
        ours.set_timesteps(steps)
        assert (
            ours.timesteps[0] == 999 and ours.init_noise_sigma == 1 and torch.equal(ours.scale_model_input(x, 999), x)
        )
