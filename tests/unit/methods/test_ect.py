"""Easy Consistency Tuning (Geng et al. 2024) as settings of the consistency loss."""

import math

import pytest
import torch
from diffusers import DDIMScheduler
from pydantic import ValidationError
from torch import nn

from builders.consistency import config, consistency, nets_for, sections
from builders.pixel import missed, trained
from fewstep.diffusion.grids import log_levels, lognormal_index
from fewstep.diffusion.schedule import RectifiedFlow, VariancePreserving
from fewstep.methods.base import Batch
from fewstep.methods.consistency.points import WEIGHTS, tuned_level, tuned_timestep
from fewstep.methods.consistency.settings import Gap
from fewstep.methods.dropout import random_state, replayed, set_dropout
from fewstep.methods.registry import settings_class
from fewstep.teachers import load_teacher

CPU = torch.device("cpu")
SCHEDULE = VariancePreserving(DDIMScheduler().alphas_cumprod.double())
LEVELS = log_levels(SCHEDULE, 1000)
ECT = {
    "guidance_range": None, "target_step": "same_noise", "tuning": {"q": 2.0, "double_iterations": 10},
    "lognormal": [-1.1, 2.0], "weighting": "inverse_gap", "distance": "pseudo_huber_sample", "huber_c": 0.0,
    "endpoint": "x0_plain", "target_decay": None, "steps": 2,
}  # fmt: skip


def ect(**changes):
    return config(**ECT | changes)


def test_mapping_has_the_papers_values():
    q2 = Gap(double_iterations=1)
    sigma = torch.tensor([1.0, math.log(7) - 1e-6, math.log(7) + 1e-3, 5.0, 80.0], dtype=torch.float64)
    r = tuned_level(sigma, 0, q2)
    assert r[:2].tolist() == [0, 0] and 0 < r[2] < 1e-2  # q = 2: every gap below sigma = ln 7 ends at the data
    assert r[3].item() == pytest.approx(5 * (1 - (1 + 8 / (1 + math.exp(5))) / 2), rel=1e-12)
    assert r[4].item() == pytest.approx(40, rel=1e-12)
    gaps = torch.stack([sigma - tuned_level(sigma, stage, q2) for stage in range(4, 12)])
    torch.testing.assert_close(gaps[1:] * 2, gaps[:-1])  # which halve with every stage
    q256 = Gap(q=256.0, k=0.0, double_iterations=1)
    torch.testing.assert_close(tuned_level(sigma, 0, q256), sigma * 255 / 256)


def test_timesteps_are_the_nearest_and_stages_double():
    tuning, t = Gap(double_iterations=10), torch.arange(1000)
    before = torch.full((1000,), -2)
    for stage in range(8):
        s = tuned_timestep(LEVELS, t, 10 * stage + 9, tuning)
        assert torch.equal(s, tuned_timestep(LEVELS, t, 10 * stage, tuning))
        assert bool((s < t).all()) and bool((s >= before).all())
        before = s
        wanted = tuned_level(LEVELS.exp(), stage, tuning)
        assert bool((s[wanted < 0.5 * LEVELS[0].exp()] == -1).all())
        inner = (s >= 0) & (s < t - 1)
        nearest = (LEVELS[:, None] - wanted.log()[inner]).abs().argmin(0)
        assert torch.equal(s[inner], nearest)
    assert torch.equal(tuned_timestep(LEVELS, t, 10**6, tuning), t - 1)


def test_lognormal_levels():
    torch.manual_seed(0)
    drawn = LEVELS[lognormal_index(LEVELS, 20000, -0.5, 0.8)]
    assert drawn.mean().item() == pytest.approx(-0.5, abs=0.03)
    assert drawn.std().item() == pytest.approx(0.8, abs=0.03)
    assert bool((lognormal_index(log_levels(RectifiedFlow(), 1001), 100, 50.0, 1.0) == 1000).all())


def test_weights():
    t, s = torch.tensor([999, 400]), torch.tensor([900, -1])
    high, low = LEVELS[t].exp(), torch.tensor([LEVELS[900].exp(), 0.0])
    torch.testing.assert_close(WEIGHTS["inverse_gap"](SCHEDULE, t, s), 1 / (high - low))
    torch.testing.assert_close(WEIGHTS["edm"](SCHEDULE, t, s), 1 / high**2 + 4)
    assert WEIGHTS["none"](SCHEDULE, t, s).tolist() == [1, 1]


def test_loss_equals_the_formulas_and_calls_no_teacher(tiny_ddpm):
    teacher = load_teacher(str(tiny_ddpm))
    method = consistency(ect(), teacher)
    assert method.needs_images and method.allowed_steps() == (1, 2)
    nets = nets_for(method)
    calls: list[int] = []
    teacher.denoiser.register_forward_pre_hook(lambda *_: calls.append(1))
    g = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(3, *teacher.latent_shape, generator=g) for _ in range(2))
    index, a = torch.tensor([0, 500, 999]), teacher.pipeline.scheduler.alphas_cumprod.double()
    for iteration in (0, 35):
        batch = Batch(3, {}, {}, CPU, iteration, latents=x0)
        total = []
        with torch.no_grad():
            found = method.loss(nets, batch, index=index, noise=noise).losses["consistency"]
            s = tuned_timestep(log_levels(teacher.schedule, 1000), index, iteration, method.config.gap)
            for i, (u, v) in enumerate(zip(index.tolist(), s.tolist(), strict=True)):
                ends, sigmas = [], []
                for w in (u, v):
                    alpha, sigma = (float(a[w]) ** 0.5, float(1 - a[w]) ** 0.5) if w >= 0 else (1.0, 0.0)
                    x = alpha * x0[i : i + 1] + sigma * noise[i : i + 1]
                    out = nets["student"].net(x, torch.tensor([max(w, 0)])).sample
                    ends.append(x if w < 0 else (x - sigma * out) / alpha)
                    sigmas.append(sigma / alpha)
                total.append((ends[0] - ends[1]).square().sum().sqrt() / (sigmas[0] - sigmas[1]))
        assert found.item() == pytest.approx(torch.stack(total).mean().item(), rel=1e-3)
    assert not calls


def test_three_forwards_while_targets_are_the_data_then_four(tiny_ddpm):
    """Of networks: the student's with its backward (3 F), and the target's (1 F)."""
    teacher = load_teacher(str(tiny_ddpm))
    method = consistency(ect(), teacher)
    nets, x0 = nets_for(method), torch.randn(2, *teacher.latent_shape)
    calls: list[int] = []
    nets["student"].register_forward_pre_hook(lambda *_: calls.append(1))
    for index, expected in ((300, 1), (999, 2)):  # sigma 0.8 and 157
        calls.clear()
        batch = Batch(2, {}, {}, CPU, latents=x0)
        method.loss(nets, batch, index=torch.full((2,), index)).losses["consistency"].backward()
        assert len(calls) == expected


def test_target_has_the_students_masks():
    net = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.0), nn.Linear(64, 8))
    set_dropout(net, 0.5)
    x, state = torch.randn(4, 8), random_state(CPU)
    first = net(x)
    after = random_state(CPU)
    with replayed(state, CPU):
        assert torch.equal(net(x), first)
    assert torch.equal(random_state(CPU), after) and not torch.equal(net(x), first)


def test_dropout_is_the_students_and_shared_with_its_target(tiny_ddpm):
    teacher = load_teacher(str(tiny_ddpm))
    method = consistency(ect(dropout=0.3), teacher)
    nets = nets_for(method)
    shares = {name: {m.p for m in net.modules() if isinstance(m, nn.Dropout)} for name, net in nets.items()}
    assert shares == {"teacher": {0.0}, "student": {0.3}}
    kept: list[torch.Tensor] = []
    dropout = next(m for m in nets["student"].modules() if isinstance(m, nn.Dropout))
    dropout.register_forward_hook(lambda _m, given, out: kept.append((out == 0) & (given[0] != 0)))
    batch = Batch(2, {}, {}, CPU, latents=torch.randn(2, *teacher.latent_shape))
    method.loss(nets, batch, index=torch.full((2,), 999))
    assert len(kept) == 2 and kept[0].any() and torch.equal(*kept)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance": {"range": (1.0, 2.0)}}, "calls no teacher"),
        ({"states": {"kind": "shared_trajectories"}}, "states"),
        ({"endpoint": {"kind": "boundary"}}, "endpoint"),
        ({"grid": {"kind": "even"}}, "grid"),
        ({"distance": {"kind": "pseudo_huber", "c": 0.0}}, "distance"),
        ({"gap": {"q": 1.0, "double_iterations": 5}}, "q"),
    ],
)
def test_impossible_configs(changes, message):
    with pytest.raises(ValidationError, match=message):
        settings_class("ect").model_validate(sections(**ECT) | changes)


def test_tuning_makes_the_model_a_generator_in_one_step(trained_pixels, tmp_path):
    """Nothing but images and noise: nearer to where the ODE ends than the diffusion model's own single step is."""
    method = ECT | {"tuning": {"q": 4.0, "double_iterations": 30}}
    trainer = trained(trained_pixels, tmp_path, method, 120)
    before, after = missed(trainer, "teacher"), missed(trainer, "ema")
    assert after < 0.75 * before, (before, after)
