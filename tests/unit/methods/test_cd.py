"""Consistency models of pixels (Song et al. 2023): Karras' levels, Heun's steps, LPIPS, and a student that learns."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, DDIMScheduler
from pydantic import ValidationError
from torch.utils.flop_counter import FlopCounterMode

from builders.consistency import config, consistency, grid_of, nets_for
from builders.pixel import missed, trained
from fewstep.config import OptimConfig
from fewstep.diffusion.grids import even_steps, karras_grid, karras_levels
from fewstep.diffusion.losses import l2, pseudo_huber, sample_distance
from fewstep.diffusion.prediction import Prediction, ode_step
from fewstep.diffusion.schedule import RectifiedFlow, VariancePreserving, noise_level
from fewstep.diffusion.solvers import RULES, heun, solve
from fewstep.methods.base import Batch
from fewstep.methods.registry import settings_class
from fewstep.teachers import load_teacher
from fewstep.training.optim import new_optimizer

ALPHAS = DDIMScheduler().alphas_cumprod.double()
CD = {
    "guidance_range": None, "grid": "karras", "solver": "heun", "solver_steps": 40, "steps": 4, "target_decay": 0.95,
}  # fmt: skip


# The grid -----------------------------------------------------------------------------------------------------------------


def test_levels_are_diffusers_and_the_papers():
    found = karras_levels(0.002, 80.0, 40)
    stock = CMStochasticIterativeScheduler(num_train_timesteps=40)
    expected = torch.from_numpy(stock._convert_to_karras(np.arange(40) / 39))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert found[0].item() == pytest.approx(80, rel=1e-12) and found[-1].item() == pytest.approx(0.002, rel=1e-12)
    middle = karras_levels(0.002, 80.0, 3, rho=1.0)[1].item()
    assert middle == pytest.approx(40.001, rel=1e-12)


def test_grid_is_nearest_to_the_levels_and_holds_the_samplers_timesteps():
    schedule = VariancePreserving(ALPHAS)
    met = torch.tensor([999, 749, 499, 249])
    grid = karras_grid(schedule, 40, 1000, met)
    times = torch.cat([grid.s[:1], grid.t])
    assert torch.equal(grid.s[1:], grid.t[:-1]) and bool((grid.t > grid.s).all())
    assert times[0] == 0 and times[-1] == 999 and set(met.tolist()) <= set(times.tolist())
    assert not grid.end.any() and len(times) == 40
    levels = noise_level(schedule, torch.arange(1000)).log()
    wanted = karras_levels(float(levels[0].exp()), float(levels[-1].exp()), 40).log()
    off = torch.stack([(levels[times] - w).abs().min() for w in wanted])
    step = levels.diff()[torch.bucketize(wanted, levels).clamp(1, 999) - 1]
    assert int((off > step / 2 + 1e-12).sum()) <= 3  # those that were moved onto 749, 499, 249


def test_no_karras_levels_to_pure_noise_or_in_phases():
    with pytest.raises(ValueError, match="ends in pure noise"):
        karras_grid(RectifiedFlow(), 8, 1001, torch.tensor([1000]))
    with pytest.raises(ValidationError, match=r"grid\n.*Extra inputs"):
        settings_class("pcm").model_validate({"optim": {"lr": 1.0}, "grid": {"kind": "karras"}})


# The solver ---------------------------------------------------------------------------------------------------------------

MEAN, STD = 0.7, 0.4


def exact(schedule: Any, x: Any, t: Any) -> Prediction:
    """Data from N(MEAN, STD^2)."""
    alpha, sigma = (v.double().view(-1, 1) for v in schedule(t))
    spread = alpha**2 * STD**2 + sigma**2
    eps = sigma * (x - alpha * MEAN) / spread
    return Prediction(MEAN + alpha * STD**2 * (x - alpha * MEAN) / spread, eps)


def error(schedule: Any, solver: Any, steps: int, t: float, s: float) -> float:
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    t, s = (torch.full((5,), v, dtype=torch.float64) for v in (t, s))

    def denoise(x: Any, times: Any) -> Prediction:
        return exact(schedule, x, times)

    found = solve(denoise, schedule, x, even_steps(t, s, steps), RULES[solver], denoise(x, t))
    (a, b), (c, d) = ((v.double().view(-1, 1) for v in schedule(u)) for u in (t, s))
    wanted = c * MEAN + ((c**2 * STD**2 + d**2) / (a**2 * STD**2 + b**2)).sqrt() * (x - a * MEAN)
    return (found - wanted).abs().max().item()


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("heun", 2)])
@pytest.mark.parametrize("start", [900.0, 1000.0])
def test_order_of_the_solver(solver, order, start):
    """Error against the closed form as the steps are halved; from pure noise too, where alpha is 0."""
    errors = [error(RectifiedFlow(), solver, n, start, 100.0) for n in (32, 64, 128)]
    for coarse, fine in pairwise(errors):
        assert np.log2(coarse / fine) == pytest.approx(order, abs=0.15)


def test_heun_is_that_of_edm():
    """One step on a variance-preserving table, written out in x / alpha and sigma / alpha as Song et al. have it."""
    schedule = VariancePreserving(ALPHAS)
    t, s = torch.tensor([700, 60]), torch.tensor([650, 0])
    x = torch.randn(2, 3, dtype=torch.float64)

    def denoise(x: Any, times: Any) -> Prediction:
        return exact(schedule, x, times)

    found = solve(denoise, schedule, x, torch.stack([t, s]), heun)
    high, low = (noise_level(schedule, u)[:, None] for u in (t, s))
    scale = [schedule(u)[0][:, None] for u in (t, s)]

    def slope(z: Any, level: Any) -> Any:
        return (z - (MEAN + STD**2 / (STD**2 + level**2) * (z - MEAN))) / level

    z = x / scale[0]
    first = slope(z, high)
    second = slope(z + (low - high) * first, low)
    torch.testing.assert_close(found / scale[1], z + (low - high) * (first + second) / 2, rtol=1e-10, atol=1e-10)


def test_no_teacher_at_clean_data():
    """A last step to it is DDIM's, whatever a network would say there."""
    schedule, t, s = RectifiedFlow(), torch.tensor([200.0]), torch.tensor([-1.0])
    x = torch.randn(1, 3, dtype=torch.float64)
    first = exact(schedule, x, t)
    found = solve(lambda x, t: Prediction(x * torch.nan, x), schedule, x, torch.stack([t, s]), heun, first)
    assert torch.equal(found, ode_step(schedule, first, s))


# The loss -----------------------------------------------------------------------------------------------------------------


def test_sample_distances():
    a, b = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64)
    assert sample_distance("l2", a, b, 0.1).mean().item() == pytest.approx(l2(a, b).item(), rel=1e-12)
    found = sample_distance("pseudo_huber", a, b, 0.1).mean().item()
    assert found == pytest.approx(pseudo_huber(a - b, 0.1).mean().item(), rel=1e-12)
    norm = (a - b).flatten(1).square().sum(1)
    torch.testing.assert_close(sample_distance("pseudo_huber_sample", a, b, 0.3), (norm + 0.09).sqrt() - 0.3)
    torch.testing.assert_close(sample_distance("pseudo_huber_sample", a, b, 0.0), norm.sqrt())
    same = a.clone().requires_grad_()
    sample_distance("pseudo_huber_sample", same, a, 0.0).sum().backward()
    assert torch.equal(same.grad, torch.zeros_like(a))


def test_loss_on_the_karras_grid_is_the_papers(tiny_ddpm):
    """Student at t against target at the end of the teacher's Heun step, the lowest pair against that end itself."""
    teacher = load_teacher(str(tiny_ddpm))
    method = consistency(config(**CD), teacher)
    nets, grid = nets_for(method), grid_of(method)
    g = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(3, *teacher.latent_shape, generator=g) for _ in range(2))
    index = torch.tensor([0, 20, len(grid.t) - 1])
    unet, a = teacher.pipeline.unet, teacher.pipeline.scheduler.alphas_cumprod
    total = []
    with torch.no_grad():
        batch = Batch(3, {}, {}, torch.device("cpu"), latents=x0)
        found = method.loss(nets, batch, index=index, noise=noise).losses["consistency"]
        for i in range(3):
            t, s = int(grid.t[index[i]]), int(grid.s[index[i]])
            at, st, a_s, ss = (float(v) ** 0.5 for v in (a[t], 1 - a[t], a[s], 1 - a[s]))
            x = at * x0[i : i + 1] + st * noise[i : i + 1]
            one = unet(x, torch.tensor([t])).sample
            z = x / at + (ss / a_s - st / at) * one
            two = unet(a_s * z, torch.tensor([s])).sample
            x_s = a_s * (x / at + (ss / a_s - st / at) * (one + two) / 2)
            own = (x - st * nets["student"].net(x, torch.tensor([t])).sample) / at
            there = (x_s - ss * nets["target"].net(x_s, torch.tensor([s])).sample) / a_s
            total.append((own - (there if s else x_s)).square().mean())
    assert found.item() == pytest.approx(torch.stack(total).mean().item(), rel=1e-3)


def test_cost_is_six_forwards(tiny_ddpm):
    """3 of the student, 1 of its target, 2 of Heun's teacher."""
    teacher = load_teacher(str(tiny_ddpm))
    method = consistency(config(**CD), teacher)
    nets, x0 = nets_for(method), torch.randn(2, *teacher.latent_shape)
    with FlopCounterMode(display=False) as one, torch.no_grad():
        teacher.denoiser(x0, torch.tensor([5, 9]), {})
    with FlopCounterMode(display=False) as all_:
        method.loss(nets, Batch(2, {}, {}, torch.device("cpu"), latents=x0)).losses["consistency"].backward()
    assert all_.get_total_flops() / one.get_total_flops() == pytest.approx(6, abs=0.1)


def test_lpips_needs_its_weights(tiny_ddpm, monkeypatch):
    def unreachable(*_args: Any, **_kwargs: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    with pytest.raises(ValueError, match=r"method\.distance: found lpips without.*set it to l2 or pseudo_huber"):
        consistency(config(**CD, distance="lpips"), load_teacher(str(tiny_ddpm)))


def test_lpips_is_taken_of_decoded_images(tiny_ddpm_grey, monkeypatch):
    """With VGG16's architecture and weights that are drawn: a distance of its own for each sample, 0 between equal ones."""
    from torchvision.models import vgg16

    with torch.device("meta"):
        shapes = vgg16(weights=None).state_dict()
    weights = {
        key: torch.randn(v.shape) * 0.05 if "features" in key else torch.zeros(v.shape) for key, v in shapes.items()
    }
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_a, **_k: weights)
    method = consistency(config(**CD, distance="lpips"), load_teacher(str(tiny_ddpm_grey)))
    a = torch.rand(2, 1, 16, 16) * 2 - 1
    b = torch.stack([a[0], -a[1]])
    found = method.stages[0].parts.distance(a, b)
    assert found.shape == (2,) and found[0] == 0 and found[1] > 0


def test_radam_and_its_state(tmp_path):
    from fewstep.training.checkpoint import pack_optimizer, unpack_optimizer

    def descend(parameter: Any, optimizer: Any, turns: int) -> None:
        for _ in range(turns):
            (parameter - 1).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    o = OptimConfig(lr=0.01, optimizer="radam")
    one, two = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    whole, half = new_optimizer([one], o), new_optimizer([two], o)
    assert type(whole) is torch.optim.RAdam
    descend(one, whole, 8)
    descend(two, half, 4)
    again = new_optimizer([two], o)
    unpack_optimizer(again, pack_optimizer(half))
    descend(two, again, 4)
    assert torch.equal(one, two) and one.mean() > 0


# A student that learns ----------------------------------------------------------------------------------------------------


def test_cd_learns_the_teachers_trajectories(trained_pixels, tmp_path):
    method = CD | {"solver_steps": 12, "optim": {"lr": 6e-3, "optimizer": "radam", "decay": "cosine"}}
    trainer = trained(trained_pixels, tmp_path, method, 120)
    before, after = missed(trainer, "teacher"), missed(trainer, "ema")
    assert after < 0.7 * before, (before, after)
