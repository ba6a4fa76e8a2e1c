"""The anchored Signal-ODE on a mixture of Gaussians, whose denoiser is known: exact targets, their order, every schedule."""

import math
from itertools import pairwise

import pytest
import torch

from builders.signal_ode import denoiser
from fewstep.diffusion.grids import segment_grid
from fewstep.diffusion.guidance import threshold
from fewstep.diffusion.prediction import Prediction, ode_step, output_of, read
from fewstep.diffusion.schedule import RectifiedFlow, VariancePreserving, like
from fewstep.diffusion.signal_ode import bootstrap, finite_difference, log_noise_slope, shares
from fewstep.diffusion.solvers import mean_in_signal


def tables():
    n = torch.arange(1000, dtype=torch.float64)
    linear = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    scaled = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    bar = torch.cos(((n + 1) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    start = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    return {
        "vp": VariancePreserving(linear),
        "cosine": VariancePreserving((bar / start).clamp_min(1e-9)),
        "sd": VariancePreserving(scaled),
        "flow": RectifiedFlow(1000),
    }


SCHEDULES = tables()


def noise(size=64):
    return torch.randn(size, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def at(value, size):
    return torch.as_tensor(value).expand(size)


def ddim(schedule, x, times):
    """The textbook step, written out: x_s = alpha_s x0 + sigma_s (x - alpha_t x0) / sigma_t."""
    for t, s in pairwise(times):
        x0 = denoiser(schedule, x, at(t, len(x))).x0
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (schedule(v[None]) for v in (t, s))
        x = alpha_s * x0 + sigma_s * (x - alpha_t * x0) / sigma_t
    return x


def chain(schedule, z, times, step=denoiser):
    """The anchored pair at the last of `times` by bootstrapping alone, from nonsense at the first."""
    anchor = at(times[0], len(z))
    alpha, sigma = (like(v, z) for v in schedule(anchor))
    nonsense = torch.sin(5 * z)
    own = Prediction(nonsense, (z - alpha * nonsense) / sigma)
    for t, s in pairwise(times):
        t, s = at(t, len(z)), at(s, len(z))
        own = bootstrap(schedule, own, step(schedule, ode_step(schedule, own, t), t), anchor, t, s)
    return own


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("segments", [1, 2, 3, 4, 8])
def test_bootstrapped_jumps_are_the_fine_solution(name, segments):
    schedule, n = SCHEDULES[name], 240
    whole = name != "flow"
    times = segment_grid(999, -1, n, whole) if whole else segment_grid(1000, 0, n, whole)
    x = z = noise()
    for k in range(segments):
        part = times[k * n // segments : (k + 1) * n // segments + 1]
        x = ode_step(schedule, chain(schedule, x, part), at(part[-1], len(x)))
    torch.testing.assert_close(x, ddim(schedule, z, times), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_both_readings_stay_on_the_line_through_the_start(name):
    schedule, z = SCHEDULES[name], noise()
    times = segment_grid(999, 100, 30, True).double() if name == "flow" else segment_grid(999, 100, 30, True)
    own = chain(schedule, z, times)
    torch.testing.assert_close(ode_step(schedule, own, at(times[0], len(z))), z, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_first_target_is_the_teachers_output_and_targets_are_convex(name):
    schedule, z = SCHEDULES[name], noise()
    anchor = at(torch.tensor(999.0 if name == "flow" else 999), len(z))
    t, s = anchor - 100, anchor - 130
    own, teacher = denoiser(schedule, z, anchor), denoiser(schedule, 0.3 * z, t)
    first = bootstrap(schedule, Prediction(own.x0 + 9, own.eps - 9), own, anchor, anchor, s)
    assert torch.equal(first.x0, own.x0) and torch.equal(first.eps, own.eps)
    for share in shares(schedule, anchor, t, s):
        assert ((share >= 0) & (share < 1)).all()
    target = bootstrap(schedule, own, teacher, anchor, t, s)
    low, high = torch.minimum(own.x0, teacher.x0), torch.maximum(own.x0, teacher.x0)
    assert ((target.x0 >= low - 1e-12) & (target.x0 <= high + 1e-12)).all()


def test_zero_terminal_snr_and_clean_end():
    """alpha = 0 at the anchor, sigma = 0 at the end: nothing divides by them."""
    schedule, z = SCHEDULES["flow"], noise()
    own = chain(schedule, z, torch.tensor([1000.0, 500.0, 0.0], dtype=torch.float64))
    assert own.x0.isfinite().all() and own.eps.isfinite().all()
    assert shares(schedule, *(at(torch.tensor(v), 1) for v in (1000.0, 500.0, 0.0)))[0] == 0


@pytest.mark.parametrize("name", SCHEDULES)
def test_twins_give_the_same_state(name):
    """Every native output that stands for the pair jumps to the same state; eps and velocity follow formulas of their own."""
    schedule, z = SCHEDULES[name], noise()
    kind = torch.float64 if name == "flow" else torch.long
    a, t, s = (at(torch.tensor(v, dtype=kind), len(z)) for v in (990, 600, 550))
    own = denoiser(schedule, z, a)
    teacher = denoiser(schedule, ode_step(schedule, own, t), t)
    target = bootstrap(schedule, own, teacher, a, t, s)
    state = ode_step(schedule, target, s)
    for twin in ("epsilon", "sample", "flow" if name == "flow" else "v_prediction"):
        again = read(schedule, twin, output_of(schedule, twin, target, a), z, a)
        torch.testing.assert_close(ode_step(schedule, again, s), state, atol=1e-10, rtol=0)
    (alpha_a, sigma_a), (alpha_t, sigma_t), (alpha_s, sigma_s) = (
        tuple(like(v, z) for v in schedule(u)) for u in (a, t, s)
    )
    ka, kt, ks = sigma_a / alpha_a, sigma_t / alpha_t, sigma_s / alpha_s
    torch.testing.assert_close((ka - ks) * target.eps, (ka - kt) * own.eps + (kt - ks) * teacher.eps)
    if name == "flow":
        v_own, v_teacher, v_target = (p.eps - p.x0 for p in (own, teacher, target))
        expected = (sigma_a - sigma_t) * v_own + (sigma_t - sigma_s) * v_teacher
        torch.testing.assert_close((sigma_a - sigma_s) * v_target, expected)


class Trigonometric:
    """The cosine schedule in continuous time, so that steps can shrink."""

    def __call__(self, t):
        angle = t.double() / 1000 * math.pi / 2
        return angle.cos(), angle.sin()


@pytest.mark.parametrize("schedule", [Trigonometric(), RectifiedFlow(1000)], ids=["cosine", "flow"])
@pytest.mark.parametrize(("solver", "order"), [("ddim", 2), ("heun", 3), ("paper", 2)])
def test_local_error_has_its_order(schedule, solver, order):
    z, anchor, start = noise(32), 950.0, 500.0
    width = (anchor - start) / 600

    def fine(schedule, x, t):
        return heun_at(schedule, x, t, t - width)

    own = chain(schedule, z, torch.linspace(anchor, start, 601, dtype=torch.float64), fine)
    x = ode_step(schedule, own, at(torch.tensor(start), len(z)))
    errors = []
    for step in (16.0, 8.0):
        a, t, s = (at(torch.tensor(v, dtype=torch.float64), len(z)) for v in (anchor, start, start - step))
        truth = x
        for u in range(60):
            here, there = (t - step * v / 60 for v in (u, u + 1))
            truth = ode_step(schedule, heun_at(schedule, truth, here, there), there)
        if solver == "paper":
            # The paper's ODE for y = (x - sigma eps) / alpha holds for every constant eps.
            alpha, sigma = (like(v, x) for v in schedule(t))
            y = finite_difference(schedule, (x - sigma * z) / alpha, denoiser(schedule, x, t).x0, t, s)
            found = ode_step(schedule, Prediction(y, z), s)
        else:
            f = denoiser(schedule, x, t) if solver == "ddim" else heun_at(schedule, x, t, s)
            found = ode_step(schedule, bootstrap(schedule, own, f, a, t, s), s)
        errors.append((found - truth).square().mean().sqrt())
    slope = math.log2(errors[0] / errors[1])
    assert slope == pytest.approx(order, abs=0.25), errors


def heun_at(schedule, x, t, s):
    first = denoiser(schedule, x, t)
    return mean_in_signal(schedule, first, denoiser(schedule, ode_step(schedule, first, s), s), x, t)


def test_slope_of_log_noise():
    t = torch.tensor([300.0, 700.0], dtype=torch.float64)
    u = t / 1000
    torch.testing.assert_close(log_noise_slope(RectifiedFlow(1000), t), 1 / (u * (1 - u)) / 1000, rtol=1e-4, atol=0)
    bar = SCHEDULES["sd"].alphas_cumprod
    table = 0.5 * torch.log((1 - bar) / bar)
    whole = torch.tensor([1, 500, 998])
    torch.testing.assert_close(log_noise_slope(SCHEDULES["sd"], whole), (table[whole + 1] - table[whole - 1]) / 2)


def test_grid():
    assert segment_grid(999, -1, 4, True).tolist() == [999, 749, 499, 249, -1]
    assert segment_grid(1.0, 0.0, 2, False).tolist() == [1.0, 0.5, 0.0]
    times = segment_grid(249, 0, 100, True)
    assert (times[:-1] > times[1:]).all()
    with pytest.raises(ValueError, match="found 30 between timesteps 20 and -1; expected at most 21"):
        segment_grid(20, -1, 30, True)


def test_thresholds_are_diffusers():
    from diffusers import DDPMScheduler

    schedule, stock = (
        SCHEDULES["sd"],
        DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1e9),
    )
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([999, 500, 100, 3])
    alpha, sigma = (like(v, x) for v in schedule(t))
    p = Prediction(2 * x.roll(1, 0), (x - alpha * 2 * x.roll(1, 0)) / sigma)
    found = threshold(schedule, p, x, t, 0.9)
    torch.testing.assert_close(found.x0, stock._threshold_sample(p.x0))
    torch.testing.assert_close(threshold(schedule, p, x, t, None).x0, p.x0.clamp(-1, 1))
    torch.testing.assert_close(alpha * found.x0 + sigma * found.eps, x)
