"""Identities of fewstep.diffusion, in float64, and their agreement with diffusers' schedulers."""

import math
from typing import get_args

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from fewstep.diffusion.guidance import guide
from fewstep.diffusion.losses import l2, pseudo_huber
from fewstep.diffusion.prediction import Prediction, PredictionType, add_noise, ode_step, read
from fewstep.diffusion.schedule import RectifiedFlow, Schedule, VariancePreserving, like

KINDS = get_args(PredictionType)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ddim(prediction_type: str = "epsilon", zero_snr: bool = False, set_alpha_to_one: bool = True) -> DDIMScheduler:
    """Stable Diffusion's betas on an even grid that starts at pure noise, with its tables in float64."""
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        timestep_spacing="trailing",
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_snr,
        set_alpha_to_one=set_alpha_to_one,
    )
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = torch.as_tensor(scheduler.final_alpha_cumprod).double()
    if not set_alpha_to_one:
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    return scheduler


def schedule_for(kind: str) -> Schedule:
    return RectifiedFlow() if kind == "flow" else VariancePreserving(ddim().alphas_cumprod)


def output_of(schedule: Schedule, kind: str, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """What a perfect network of this kind says at x_t."""
    alpha, sigma = (like(v, x0) for v in schedule(t))
    return {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0, "flow": eps - x0}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_read_undoes_add_noise(kind: PredictionType) -> None:
    x0, eps = normal(4, 3, 2, 2), normal(4, 3, 2, 2, seed=1)
    t = torch.tensor([1, 300, 700, 999]).double()
    schedule = schedule_for(kind)
    x_t = add_noise(schedule, x0, eps, t)
    p = read(schedule, kind, output_of(schedule, kind, x0, eps, t), x_t, t)
    torch.testing.assert_close(p.x0, x0, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(p.eps, eps, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ode_step(schedule, p, t), x_t, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_negative_timestep_is_clean_data(kind: str) -> None:
    x0, eps, t = normal(2, 3), normal(2, 3, seed=1), torch.tensor([-1, -1])
    schedule = schedule_for(kind)
    assert torch.equal(add_noise(schedule, x0, eps, t), x0)
    assert torch.equal(ode_step(schedule, Prediction(x0, eps), t), x0)


def test_variance_is_preserved() -> None:
    alpha, sigma = VariancePreserving(ddim().alphas_cumprod)(torch.arange(1000))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1000).double(), rtol=1e-12, atol=0)


def test_half_precision_is_read_in_float32() -> None:
    x, t = normal(2, 3).bfloat16(), torch.tensor([500, 999])
    p = read(VariancePreserving(ddim().alphas_cumprod), "v_prediction", x, x, t)
    assert p.x0.dtype == p.eps.dtype == torch.float32


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="epsilon"):
        read(RectifiedFlow(), "velocity", normal(1, 2), normal(1, 2), torch.zeros(1))  # type: ignore[arg-type]


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_ode_step_is_ddim(kind: PredictionType, set_alpha_to_one: bool) -> None:
    scheduler = ddim(kind, set_alpha_to_one=set_alpha_to_one)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    schedule = VariancePreserving(scheduler.alphas_cumprod)
    end = -1 if set_alpha_to_one else 0
    x = normal(2, 3, 4, 4)
    for i, (t, s) in enumerate([(999, 749), (749, 499), (499, 249), (249, end)]):
        output = normal(2, 3, 4, 4, seed=i + 1)
        p = read(schedule, kind, output, x, torch.full((2,), t))
        ours = ode_step(schedule, p, torch.full((2,), s))
        theirs = scheduler.step(output, t, x).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
        x = theirs


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_ode_step_is_flow_matching_euler(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(4)
    schedule = RectifiedFlow()
    times = [*scheduler.timesteps.tolist(), 0.0]
    x = normal(2, 3, 4, 4)
    for i, t in enumerate(scheduler.timesteps):
        output = normal(2, 3, 4, 4, seed=i + 1)
        p = read(schedule, "flow", output, x, torch.full((2,), times[i]).double())
        ours = ode_step(schedule, p, torch.full((2,), times[i + 1]).double())
        theirs = scheduler.step(output, t, x).prev_sample
        # diffusers computes this step in float32.
        torch.testing.assert_close(ours, theirs.double(), rtol=1e-5, atol=1e-5)
        x = theirs


def test_guidance() -> None:
    cond, uncond = (
        Prediction(normal(3, 2), normal(3, 2, seed=1)),
        Prediction(normal(3, 2, seed=2), normal(3, 2, seed=3)),
    )
    for scale, expected in [(1.0, cond), (0.0, uncond)]:
        for ours, theirs in zip(guide(cond, uncond, scale), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    # One scale per sample.
    each = guide(cond, uncond, torch.tensor([0.0, 1.0, 7.5]).double())
    torch.testing.assert_close(each.x0[2], guide(cond, uncond, 7.5).x0[2], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(each.eps[1], cond.eps[1], rtol=1e-12, atol=1e-12)


def test_guidance_commutes_with_the_reading() -> None:
    """Guiding the raw outputs, as pipelines do, and guiding the readings is the same."""
    schedule, t = VariancePreserving(ddim().alphas_cumprod), torch.tensor([20, 980])
    x, cond, uncond = normal(2, 3), normal(2, 3, seed=1), normal(2, 3, seed=2)
    guided = read(schedule, "v_prediction", uncond + 5 * (cond - uncond), x, t)
    ours = guide(read(schedule, "v_prediction", cond, x, t), read(schedule, "v_prediction", uncond, x, t), 5.0)
    torch.testing.assert_close(ours.x0, guided.x0, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.eps, guided.eps, rtol=1e-10, atol=1e-10)


def test_zero_terminal_snr() -> None:
    schedule = VariancePreserving(ddim("v_prediction", zero_snr=True).alphas_cumprod)
    assert schedule.zero_terminal_snr
    assert not VariancePreserving(ddim().alphas_cumprod).zero_terminal_snr
    x0, eps, t = normal(2, 3), normal(2, 3, seed=1), torch.tensor([999, 999])
    x_t = add_noise(schedule, x0, eps, t)
    torch.testing.assert_close(x_t, eps, rtol=1e-5, atol=1e-5)  # nothing of x0 is left
    p = read(schedule, "v_prediction", output_of(schedule, "v_prediction", x0, eps, t), x_t, t)
    torch.testing.assert_close(p.x0, x0, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(p.eps, eps, rtol=1e-10, atol=1e-10)


def test_pseudo_huber_lies_between_l2_and_l1() -> None:
    a, b = normal(4, 3), normal(4, 3, seed=1)
    assert pseudo_huber(a - a, 1e-3).mean() == 0
    # c far above the differences: the quadratic's start; far below: the absolute value.
    assert 2e4 * pseudo_huber(a - b, 1e4).mean() == pytest.approx(float(l2(a, b)), rel=1e-6)
    assert float(pseudo_huber(a - b, 1e-9).mean()) == pytest.approx(float((a - b).abs().mean()), rel=1e-6)
    assert float(pseudo_huber(torch.tensor([[3.0]]), 4.0)) == pytest.approx(math.hypot(3, 4) - 4)
