"""Continuous-time consistency models (Lu & Song 2024): the rotation, the derivative, the fixed point, a student that learns."""

import math
from dataclasses import dataclass
from typing import Any, get_args

import pytest
import torch
from accelerate.state import AcceleratorState
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fewstep.config import OptimConfig, RunConfig
from fewstep.data import load_source
from fewstep.diffusion.prediction import Prediction, PredictionType, add_noise, read
from fewstep.diffusion.schedule import RectifiedFlow, ShiftedFlow, VariancePreserving, like
from fewstep.diffusion.trigflow import rotation, slopes, tangent, velocity, velocity_rate
from fewstep.methods.base import Batch
from fewstep.methods.dropout import set_dropout
from fewstep.methods.scm.method import LogVariance, Scm, ScmConfig
from fewstep.teachers import Inputs, load_teacher
from fewstep.training.trainer import Trainer

CPU = torch.device("cpu")
MEAN, STD = 0.3, 0.6


@dataclass(frozen=True)
class Cosine:
    """alpha = cos of an angle that is even in t, but not from 0: variance-preserving, differentiable in t."""

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angle = (t + 20) * (math.pi / 2 / 1050)
        return angle.cos(), angle.sin()


TABLE = VariancePreserving(Cosine()(torch.arange(1000).double())[0].square())
SMOOTH = [Cosine(), RectifiedFlow(), ShiftedFlow(3.0)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The change of variables --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [TABLE, *SMOOTH], ids=repr)
def test_states_are_rotations(schedule):
    t, x0, eps = torch.tensor([1, 300, 950]), normal(3, 4), normal(3, 4, seed=1)
    at = rotation(schedule, t)
    x = add_noise(schedule, x0, eps, t if schedule is TABLE else t.double()) / like(at.size, x0)
    torch.testing.assert_close(x, like(at.tau.cos(), x0) * x0 + like(at.tau.sin(), x0) * eps, rtol=1e-12, atol=1e-12)


def test_v_of_a_process_that_keeps_the_variance_is_the_velocity():
    t, x, v = torch.tensor([1, 300, 950]), normal(3, 4), normal(3, 4, seed=1)
    at = rotation(TABLE, t)
    torch.testing.assert_close(velocity(read(TABLE, "v_prediction", v, x, t), at.tau), v, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(at.size, torch.ones_like(at.size), rtol=1e-12, atol=0)


def test_flow_is_the_published_bridge():
    t, x, v = torch.tensor([1.0, 300.0, 1000.0], dtype=torch.float64), normal(3, 4), normal(3, 4, seed=1)
    at, s = rotation(RectifiedFlow(), t), (t / 1000)[:, None]
    size = (s**2 + (1 - s) ** 2).sqrt()
    torch.testing.assert_close(at.size[:, None], size)
    torch.testing.assert_close(s[:, 0], at.tau.sin() / (at.tau.sin() + at.tau.cos()))
    expected = ((1 - 2 * s) * x + (1 - 2 * s + 2 * s**2) * v) / size
    torch.testing.assert_close(
        velocity(read(RectifiedFlow(), "flow", v, x, t), at.tau), expected, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("schedule", SMOOTH, ids=repr)
def test_rates_are_derivatives(schedule):
    t, h = torch.tensor([5.0, 400.0, 990.0], dtype=torch.float64), 1e-3
    at, low, high = (rotation(schedule, u) for u in (t, t - h, t + h))
    weight, d_tau = at.tau.cos() * at.tau.sin(), (high.tau - low.tau) / (2 * h)
    torch.testing.assert_close(at.time_rate, weight / d_tau, rtol=1e-6, atol=0)
    torch.testing.assert_close(at.size_rate, weight * (high.size - low.size) / (2 * h) / d_tau, rtol=1e-5, atol=1e-9)


def test_a_tables_slopes_are_its_functions():
    t = torch.tensor([0, 400, 999])
    for found, wanted in zip(slopes(TABLE, t), slopes(Cosine(), t), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)
    pure = rotation(ShiftedFlow(3.0), torch.tensor([999]))
    assert pure.time_rate.abs().item() < 1e-12 and pure.size_rate.abs().item() < 1e-12


# The derivative -----------------------------------------------------------------------------------------------------------


def central(answer: Any, schedule: Any, x: Tensor, t: Tensor, slope: Tensor, h: float) -> Tensor:
    """cos sin dF/dtau by moving state and time a little along the trajectory."""
    at, found = rotation(schedule, t), []
    for sign in (1, -1):
        # dt/dtau to second order by the midpoint; the angle actually reached says how far x has to go.
        u = t + sign * h
        there = rotation(schedule, u)
        moved = x + like(there.tau - at.tau, x) * slope
        found.append((velocity(answer(like(there.size, x) * moved, u), there.tau), there.tau))
    return like(at.tau.cos() * at.tau.sin() / (found[0][1] - found[1][1]), x) * (found[0][0] - found[1][0])


@pytest.mark.parametrize("kind", get_args(PredictionType))
@pytest.mark.parametrize("schedule", SMOOTH, ids=repr)
def test_forward_mode_is_central_differences(schedule, kind):
    if {"flow": True, "v_prediction": False}.get(kind) == isinstance(schedule, Cosine):
        pytest.skip("v is for processes that keep the variance, flow for alpha + sigma = 1")
    x, slope, w = normal(3, 4), normal(3, 4, seed=1), normal(4, 4, seed=2)
    t = torch.tensor([40.0, 500.0, 900.0], dtype=torch.float64)

    def answer(x_t: Tensor, u: Tensor) -> Prediction:
        output = (x_t @ w + (u / 300).sin()[:, None]).tanh()
        return read(schedule, kind, output, x_t, u)

    own, rate = velocity_rate(answer, schedule, kind, x, t, rotation(schedule, t), slope)
    at = rotation(schedule, t)
    torch.testing.assert_close(own, velocity(answer(like(at.size, x) * x, t), at.tau))
    torch.testing.assert_close(rate, central(answer, schedule, x, t, slope, 1e-3), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["tiny_ddpm_grey", "tiny_sd"])
def test_forward_mode_goes_through_real_networks(name, request):
    """With attention; central differences over a timestep's fraction on a table, whose angle is then straight."""
    teacher = load_teacher(str(request.getfixturevalue(name)))
    net, kind = teacher.denoiser.net.double(), teacher.denoiser.prediction_type
    t, cond = torch.tensor([300, 700]), {k: v.double() for k, v in teacher.condition(["a", "b"]).items()}
    x, slope = normal(2, *teacher.latent_shape), normal(2, *teacher.latent_shape, seed=1)
    schedule, at = teacher.schedule, rotation(teacher.schedule, t)

    def answer(x_t: Tensor, u: Tensor) -> Prediction:
        output = teacher.denoiser.call(net, Inputs(x_t, u, cond))
        return read(schedule, kind, output, x_t, u)

    def moved(h: float) -> Tensor:
        weight, tau = at.tau.cos() * at.tau.sin(), at.tau + h * at.tau.cos() * at.tau.sin()
        x_t = x + h * like(weight, x) * slope
        output = teacher.denoiser.call(net, Inputs(x_t, t + h * at.time_rate, cond))
        return velocity(read(lambda _: (tau.cos(), tau.sin()), kind, output, x_t, t), tau)

    with torch.no_grad():
        own, rate = velocity_rate(answer, schedule, kind, x, t, at, slope)
        torch.testing.assert_close(own, moved(0.0), rtol=1e-4, atol=1e-4)
        expected = (moved(5e-4) - moved(-5e-4)) / 1e-3  # the networks' sinusoids are in float32
    assert (rate - expected).norm() < 1e-2 * expected.norm()


# The fixed point ----------------------------------------------------------------------------------------------------------


def spread(tau: Tensor) -> Tensor:
    return ((tau.cos() * STD) ** 2 + tau.sin() ** 2).sqrt()


def solution(schedule: Any, x_t: Tensor, t: Tensor) -> Prediction:
    """The consistency function of data from N(MEAN, STD^2), exactly, as a prediction of x0."""
    alpha, sigma = schedule(t)
    size = torch.hypot(alpha, sigma)
    tau = torch.atan2(sigma, alpha)
    x0 = MEAN + like(STD / spread(tau), x_t) * (x_t / like(size, x_t) - like(tau.cos(), x_t) * MEAN)
    return Prediction(x0, (x_t - like(alpha, x_t) * x0) / like(sigma, x_t))


def posterior(x: Tensor, tau: Tensor) -> Prediction:
    gain = like(tau.cos() * STD**2 / spread(tau) ** 2, x)
    x0 = MEAN + gain * (x - like(tau.cos(), x) * MEAN)
    return Prediction(x0, (x - like(tau.cos(), x) * x0) / like(tau.sin(), x))


@pytest.mark.parametrize(("schedule", "tolerance"), [*((s, 1e-12) for s in SMOOTH), (TABLE, 1e-5)], ids=repr)
def test_the_gaussians_consistency_function_has_no_tangent(schedule, tolerance):
    """On a table to the accuracy of its slopes; and another function has one."""
    t, x = torch.tensor([10, 400, 980]), normal(3, 5)
    t = t if schedule is TABLE else t.double()
    at, smooth = rotation(schedule, t), Cosine() if schedule is TABLE else schedule
    slope = velocity(posterior(x, at.tau), at.tau)

    def tangent_of(scale: float) -> Tensor:
        def answer(x_t: Tensor, u: Tensor) -> Prediction:
            x0 = scale * solution(smooth, x_t, u).x0
            alpha, sigma = (like(v, x_t) for v in schedule(u))
            return Prediction(x0, (x_t - alpha * x0) / sigma)

        own, rate = velocity_rate(answer, schedule, "sample", x, t, at, slope)
        return tangent(own, rate, x, slope, at.tau, 1.0)

    assert tangent_of(1.0).abs().max().item() < tolerance
    # cos(tau) df/dtau of a scaled function is still 0; of one that is not constant it is not.
    assert tangent_of(0.5).abs().max().item() < tolerance
    own, rate = velocity_rate(
        lambda x_t, u: posterior_at(schedule, smooth, x_t, u), schedule, "sample", x, t, at, slope
    )
    assert tangent(own, rate, x, slope, at.tau, 1.0).abs().max() > 1e-2


def posterior_at(schedule: Any, smooth: Any, x_t: Tensor, t: Tensor) -> Prediction:
    """The diffusion model itself, whose x0 moves along the ODE."""
    alpha, sigma = smooth(t)
    size, tau = torch.hypot(alpha, sigma), torch.atan2(sigma, alpha)
    x0 = posterior(x_t / like(size, x_t), tau).x0
    alpha, sigma = (like(v, x_t) for v in schedule(t))
    return Prediction(x0, (x_t - alpha * x0) / sigma)


def test_cold_tangent_is_the_difference_of_velocities():
    own, rate, x, slope = (normal(2, 3, seed=i) for i in range(4))
    tau = torch.tensor([0.2, 1.1], dtype=torch.float64)
    expected = -(tau.cos() ** 2)[:, None] * (own - slope)
    torch.testing.assert_close(tangent(own, rate, x, slope, tau, 0.0), expected)


# The method ---------------------------------------------------------------------------------------------------------------


def scm(teacher: Any, **changes: Any) -> Scm:
    return Scm(ScmConfig(**{"optim": OptimConfig(lr=1e-3), "warmup_iterations": 10} | changes), teacher)


@pytest.mark.parametrize("kind", ["teacher", "data"])
def test_loss_and_its_gradient(tiny_ddpm_grey, kind):
    """Value: weight |g|^2 / D with the normalised tangent; gradient in F: -2 weight g / D, whatever else there is in g."""
    teacher = load_teacher(str(tiny_ddpm_grey))
    method = scm(teacher, velocity=kind, adaptive_weight=False)
    nets = {name: role.net for name, role in method.roles().items()}
    with torch.no_grad():
        for p in nets["student"].parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    x0, noise = (normal(2, 1, 16, 16, seed=i).float() for i in range(2))
    t, batch = torch.tensor([300, 700]), Batch(2, {}, {}, CPU, 5, latents=x0)
    outputs: list[Tensor] = []

    def keep(_module: Any, _given: Any, output: Prediction) -> None:
        if output.x0.requires_grad:
            output.eps.retain_grad()
            outputs.append(output.eps)

    nets["student"].register_forward_hook(keep)
    output = method.loss(nets, batch, t=t, noise=noise)
    loss = output.losses["scm"]
    loss.backward()
    at = rotation(teacher.schedule, t)
    x = add_noise(teacher.schedule, x0, noise, t)
    with torch.no_grad():
        guess = teacher.denoiser(x, t, {}) if kind == "teacher" else Prediction(x0, noise)
        slope = velocity(guess, at.tau)
        own, rate = velocity_rate(lambda x, u: nets["student"](x, u, {}), teacher.schedule, "epsilon", x, t, at, slope)
        g = tangent(own, rate, x, slope, at.tau, 0.5)  # half of the warm-up
        assert output.logs["tangent"].item() == pytest.approx(g.square().mean().sqrt().item(), rel=1e-4)
        g = g / (g.flatten(1).norm(dim=1) + 0.1).view(-1, 1, 1, 1)
        weight = 1 / at.tau.tan()
        expected = (weight * g.square().flatten(1).mean(1)).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    (eps,) = outputs
    # F = cos eps - sin x0 with x0 = (x - sin eps) / cos: dF/deps = 1 / cos.
    gradient = -2 * (weight / at.tau.cos() / (2 * 256)).view(-1, 1, 1, 1) * g
    direct = eps.grad + 0  # of eps alone; that through x0 goes back into the same output
    assert torch.nn.functional.cosine_similarity(direct.flatten(), gradient.float().flatten(), 0) > 0.99


def test_weight_of_noise_levels_learns_the_log_of_the_loss(tiny_ddpm_grey):
    method = scm(load_teacher(str(tiny_ddpm_grey)))
    net, level = LogVariance(), torch.linspace(-4, 4, 64)
    assert not net(level).any()
    optimizer = torch.optim.Adam(net.parameters(), 0.05)
    carry = {"level": level, "each": (1 + level.sin()).exp()}
    for _ in range(400):
        optimizer.zero_grad()
        method.variance_loss({"log_variance": net}, Batch(64, {}, {}, CPU), carry).losses["log_variance"].backward()
        optimizer.step()
    assert (net(level) - 1 - level.sin()).abs().max() < 0.2


def test_clipped_tangent(tiny_ddpm_grey):
    method = scm(load_teacher(str(tiny_ddpm_grey)), tangent="clip")
    assert method._bounded(torch.tensor([[-3.0, 0.5, 2.0]])).tolist() == [[-1.0, 0.5, 1.0]]


def test_levels_are_lognormal_and_guidance_is_an_input(tiny_sd):
    teacher = load_teacher(str(tiny_sd))
    method = scm(teacher, guidance={"range": (1.0, 4.0)}, lognormal=(0.2, 0.01))
    nets = {name: role.net for name, role in method.roles().items()}
    seen: list[Tensor] = []
    embedded: list[Tensor] = []
    nets["student"].register_forward_pre_hook(lambda _m, given: seen.append(given[3]))
    nets["student"].net.register_forward_pre_hook(
        lambda _m, _a, given: embedded.append(given["timestep_cond"]), with_kwargs=True
    )
    batch = Batch(2, teacher.condition(["a", "b"]), teacher.null_condition(2), CPU, latents=torch.randn(2, 4, 8, 8))
    output = method.loss(nets, batch)
    assert torch.isfinite(output.losses["scm"]) and output.carry["level"].tolist() == pytest.approx(
        [0.2, 0.2], abs=0.05
    )
    (scale,), (derived, found) = seen, embedded
    assert ((scale >= 1) & (scale <= 4)).all() and torch.equal(derived, found)


@pytest.mark.parametrize(
    ("name", "changes", "forwards"),
    [
        ("tiny_sd", {"guidance": {"range": (1.0, 4.0)}}, 8.0),
        ("tiny_sd", {}, 7.0),
        ("tiny_sd", {"velocity": "data"}, 6.0),
        ("tiny_ddpm_grey", {}, 7.2),
        ("tiny_ddpm_grey", {"velocity": "data"}, 6.2),
    ],
)
def test_forwards_per_sample(request, name, changes, forwards):
    """In units of one forward of the network: student 3 with its backward, derivative 3 (3.2 where attention is much of it),
    teacher 2, 1 or 0."""
    teacher = load_teacher(str(request.getfixturevalue(name)))
    method = scm(teacher, adaptive_weight=False, **changes)
    nets = {name: role.net for name, role in method.roles().items()}
    cond = teacher.condition(["a", "b"]) if teacher.guidance.guidable else {}
    uncond = teacher.null_condition(2) if teacher.guidance.guidable else {}
    latents, t = torch.randn(2, *teacher.latent_shape), torch.tensor([300, 700])
    batch = Batch(2, cond, uncond, CPU, latents=latents)
    with FlopCounterMode(display=False) as one, torch.no_grad():
        teacher.denoiser(latents, t, cond)
    with FlopCounterMode(display=False) as counted:
        method.loss(nets, batch, t=t).losses["scm"].backward()
    assert counted.get_total_flops() / one.get_total_flops() == pytest.approx(forwards, abs=0.06)


def test_derivative_is_that_of_the_network_without_dropout(tiny_ddpm_grey):
    """Dropout that the teacher's network was built with is the student's; only the pass that learns has it."""
    teacher = load_teacher(str(tiny_ddpm_grey))
    set_dropout(teacher.denoiser, 0.3)
    method = scm(teacher, adaptive_weight=False, velocity="data")
    student, tangents = method.roles()["student"].net, []
    dropped: list[bool] = []
    layer = next(m for m in student.modules() if isinstance(m, nn.Dropout))
    layer.register_forward_hook(lambda module, _given, _output: dropped.append(module.training))
    batch = Batch(2, {}, {}, CPU, latents=torch.randn(2, 1, 16, 16))
    for _ in range(2):
        output = method.loss({"student": student}, batch, t=torch.tensor([300, 700]), noise=torch.ones(2, 1, 16, 16))
        tangents.append(output.logs["tangent"].item())
    assert dropped == [False, True] * 2 and tangents[0] == tangents[1]


def test_derivative_is_in_float32_whatever_the_precision_of_the_run(tiny_sd, tmp_path):
    """Also beneath the autocast that accelerate puts around the student's own call."""
    AcceleratorState._reset_state()  # of another precision, in tests before
    values = {
        "teacher": str(tiny_sd), "output_dir": str(tmp_path), "data": {"source": "fashion", "limit": 2},
        "batch_size": 2,
        "method": {"optim": {"lr": 1e-4}}, "max_iterations": 1, "train": {"cpu_threads": 1, "mixed_precision": "bf16"},
    }  # fmt: skip
    config = RunConfig[ScmConfig].model_validate(values)
    teacher = load_teacher(str(tiny_sd))
    trainer = Trainer(config, Scm(config.method, teacher), teacher, load_source(config.data, teacher.image_size))
    half: list[bool] = []
    net = trainer.roles["student"].net.get_submodule("net")
    net.register_forward_pre_hook(lambda *_: half.append(torch.is_autocast_enabled("cpu")))
    assert trainer.fit()
    assert half == [False, True]
    AcceleratorState._reset_state()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance": {"range": (0.5, 2.0)}}, "expected two ascending scales"),
        ({"guidance": {"range": (1.0, 2.0)}, "velocity": "data"}, "no teacher to guide"),
        ({"guidance": {"range": (1.0, 1.5), "export_scale": 2.0}}, "expected a scale in the trained range"),
        ({"lognormal": (0.0, 0.0)}, "lognormal"),
    ],
)
def test_impossible_configs(changes, message):
    with pytest.raises(ValidationError, match=message):
        ScmConfig(**{"optim": OptimConfig(lr=1e-3)} | changes)


def test_unconditional_teachers_have_no_guidance(tiny_ddpm):
    with pytest.raises(ValueError, match=r"method\.guidance:"):
        scm(load_teacher(str(tiny_ddpm)), guidance={"range": (1.0, 2.0)})


class Waves(nn.Module):
    """v = g(t) x with g a sum of cosines."""

    def __init__(self, schedule: Any) -> None:
        super().__init__()
        self.schedule, self.weight = schedule, nn.Parameter(torch.zeros(12))

    def gain(self, t: Tensor) -> Tensor:
        return (torch.arange(12) * math.pi * t[:, None] / 1000).cos() @ self.weight

    def forward(self, x: Tensor, t: Tensor, cond: Any, scale: Any = None) -> Prediction:
        return read(self.schedule, "v_prediction", like(self.gain(t), x) * x, x, t)


class Posterior(nn.Module):
    """Data from N(0, STD^2)."""

    def __init__(self, schedule: Any) -> None:
        super().__init__()
        self.schedule = schedule

    def forward(self, x: Tensor, t: Tensor, cond: Any) -> Prediction:
        alpha, sigma = (like(v, x) for v in self.schedule(t))
        x0 = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * x
        return Prediction(x0, (x - alpha * x0) / sigma)


@pytest.mark.parametrize("kind", ["teacher", "data"])
def test_student_becomes_the_consistency_function(tiny_sd, kind):
    """From the diffusion model, whose x0 at high noise is near 0, to the end of the ODE, which keeps the deviation."""
    teacher = load_teacher(str(tiny_sd))
    method = scm(teacher, velocity=kind, warmup_iterations=50, adaptive_weight=False, lognormal=(0.5, 1.4))
    student, t = Waves(teacher.schedule), torch.arange(150, 851, 50)
    angle = rotation(teacher.schedule, t).tau
    exact = (angle.cos() - STD / spread(angle)) / angle.sin()
    diffusion = angle.cos() * angle.sin() * (1 - STD**2) / spread(angle) ** 2
    basis = (torch.arange(12) * math.pi * t[:, None].double() / 1000).cos()
    student.weight.data = torch.linalg.lstsq(basis, diffusion[:, None]).solution[:, 0].float()
    nets = {"teacher": Posterior(teacher.schedule), "student": student}
    optimizer = torch.optim.Adam(student.parameters(), 0.02)
    g = torch.Generator().manual_seed(0)

    def off() -> float:
        with torch.no_grad():
            return (student.gain(t) - exact).square().mean().sqrt().item()

    before = off()
    torch.manual_seed(0)
    for i in range(300):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - i / 300)
        x0 = STD * torch.randn(8, *teacher.latent_shape, generator=g)
        loss = method.loss(nets, Batch(8, {}, {}, CPU, i, latents=x0)).losses["scm"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert off() < 0.5 * before, (before, off())
