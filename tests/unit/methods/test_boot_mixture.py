"""BOOT trained on a teacher that is known: a mixture of Gaussians in the plane. The bounds are a first study's, on a
mixture of its own, as shares of the teacher's distance there."""

import copy
import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from builders.signal_ode import denoiser
from fewstep.config import OptimConfig
from fewstep.diffusion.prediction import add_noise, ode_step, output_of
from fewstep.diffusion.schedule import VariancePreserving
from fewstep.methods.base import Batch
from fewstep.methods.boot.config import BootConfig
from fewstep.methods.boot.method import Boot
from fewstep.teachers import Denoiser, GuidanceContract, Inputs, Posterior, Teacher
from fewstep.teachers.conditioner import Unconditional
from fewstep.teachers.denoiser import Scale
from fewstep.teachers.latents import Codec
from fewstep.teachers.placement import Placement
from fewstep.teachers.samplers import Samplers
from fewstep.teachers.students import Students

N = 64
"""Sub-steps of the teacher in all segments together."""


class Exact(nn.Module):
    """The network whose v-prediction is the mixture's."""

    def __init__(self, schedule: VariancePreserving) -> None:
        super().__init__()
        self.schedule = schedule

    def forward(self, x: Tensor, t: Tensor, progress: Tensor) -> Tensor:
        return output_of(self.schedule, "v_prediction", denoiser(self.schedule, x.double(), t), t).float()


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(2 + 16 + 9, 128), nn.SiLU()]
        layers += [nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU()]
        self.net = nn.Sequential(*layers, nn.Linear(128, 2))

    def forward(self, x: Tensor, t: Tensor, progress: Tensor) -> Tensor:
        waves = torch.exp2(torch.arange(8)) * (t[:, None] / 1000)
        cosines = torch.cos(math.pi * torch.arange(9) * progress[:, None])
        return self.net(torch.cat([x, waves.sin(), waves.cos(), cosines], 1))


def call(net: nn.Module, inputs: Inputs) -> Tensor:
    x_t, progress = inputs.x_t, inputs.progress
    return net(x_t, inputs.t, torch.ones(len(x_t)) if progress is None else progress)


class Points(Codec):
    def encode(self, images: Tensor) -> Posterior:
        return Posterior(images, torch.zeros_like(images))

    def decode(self, x0: Tensor) -> Tensor:
        return x0


class MixtureStudents(Students):
    def new(self, guidance_embedding: bool = False, progress_embedding: bool = False) -> Denoiser:
        return Denoiser(Mlp(), call, self.denoiser.schedule, "v_prediction")

    def fold(self, student: Denoiser, guidance_scale: Scale | None = None) -> nn.Module:
        raise NotImplementedError

    def pipeline(self, student: Denoiser, scheduler: Any, guidance_scale: Scale | None = None) -> Any:
        raise NotImplementedError


class MixtureSamplers(Samplers):
    def renoise(self, steps: int, timestep_scaling: float = 10.0, spacing: int | None = None) -> Any:
        return None

    def counts(self, steps: int) -> tuple[int, ...]:
        return (steps,)

    def jump(self, steps: int) -> Any:
        return None

    def grid(self, scheduler: Any, steps: int) -> Tensor:
        return torch.linspace(999, -1, steps + 1).round().long()


class Mixture(Teacher):
    guidance = GuidanceContract(guidable=False)

    def __init__(self) -> None:
        table = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
        schedule = VariancePreserving(table.float())
        denoiser = Denoiser(Exact(schedule), call, schedule, "v_prediction")
        pipeline: Any = SimpleNamespace(
            components={}, scheduler=SimpleNamespace(config=SimpleNamespace(num_train_timesteps=1000))
        )
        placement = Placement(pipeline, denoiser.net)
        super().__init__(
            denoiser,
            placement,
            conditioner=Unconditional(),
            codec=Points((2,), 2),
            students=MixtureStudents(denoiser, placement, ()),
            samplers=MixtureSamplers(),
        )


def train(iterations: int = 2500, size: int = 512, seed: int = 0, **changes: Any) -> tuple[Boot, nn.Module]:
    """The method and its averaged student."""
    torch.manual_seed(seed)
    config = BootConfig.model_validate({"optim": OptimConfig(lr=2e-3), "boundary_frac": 0.1} | changes)
    method = Boot(config, Mixture())
    nets = {name: role.net for name, role in method.roles().items()}
    nets["ema"] = copy.deepcopy(nets["student"]).requires_grad_(False)
    optimizer = torch.optim.AdamW(nets["student"].parameters(), config.optim.lr, weight_decay=0)
    course = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for i in range(iterations):
        loss = sum(method.steps()[0].loss(nets, Batch(size, {}, {}, torch.device("cpu"), i), {}).losses.values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(nets["student"].parameters(), 1.0)
        optimizer.step()
        course.step()
        with torch.no_grad():
            pairs = [list(nets[name].parameters()) for name in ("ema", "student")]
            torch._foreach_lerp_(*pairs, 1 - min(0.995, (i + 1) / (i + 10)))
    return method, nets["ema"]


@torch.no_grad()
def teacher_samples(teacher: Teacher, z: Tensor, steps: int) -> Tensor:
    """Noise z [B, 2] by DDIM with the teacher; steps = 1000 visits every timestep."""
    for t, s in pairwise(teacher.samplers.grid(None, steps)):
        z = ode_step(teacher.schedule, teacher.denoiser(z, t.expand(len(z)), {}), s.expand(len(z)))
    return z


@torch.no_grad()
def student_samples(method: Boot, student: nn.Module, z: Tensor) -> Tensor:
    """Noise z [B, 2] as the exported student draws it: told where its scheduler's steps begin, and never its chain's grid."""
    teacher, renoise = method.teacher, method.config.renoises
    times, generator = teacher.samplers.grid(method.scheduler(), method.config.steps), torch.Generator().manual_seed(2)
    for t, s in pairwise(times):
        p = student(z, t.expand(len(z)), {}, progress=torch.ones(len(z)))
        if renoise:
            z = add_noise(teacher.schedule, p.x0, torch.randn(z.shape, generator=generator), s.expand(len(z)))
        else:
            z = ode_step(teacher.schedule, p, s.expand(len(z)))
    return z


def paired_distance(a: Tensor, b: Tensor) -> float:
    """Root mean square distance of samples of the same noises."""
    return float((a - b).square().sum(1).mean().sqrt())


def sliced_distance(a: Tensor, b: Tensor) -> float:
    """Wasserstein-2 distance of the projections on 64 directions, root mean square over these."""
    angles = torch.arange(64) * math.pi / 64
    a, b = ((v @ torch.stack([angles.cos(), angles.sin()])).sort(0).values for v in (a, b))
    return float((a - b).square().mean().sqrt())


def noises(count: int = 4096) -> Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("changes", [{}, {"form": {"kind": "paper"}}, {"steps": 4}], ids=str)
def test_a_student_that_is_the_teacher_draws_as_the_teacher(changes: dict[str, Any]) -> None:
    """What the trained ones are judged by: either form's student is told the scheduler's timesteps and ends at clean data."""
    method, _ = train(1, 8, n_sub=8, **changes)
    z = noises(512)
    found = student_samples(method, method.teacher.denoiser, z)
    assert torch.equal(found, teacher_samples(method.teacher, z, method.config.steps))


def test_the_loss_falls_from_front_to_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the log has of every sub-step: the first targets are learnt while the last ones still wait for those before."""
    seen, report = [], Boot._report

    def kept(self: Boot, each: Tensor, index: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        logs, histograms = report(self, each, index)
        seen.append(histograms["loss_by_sub_step"])
        return logs, histograms

    monkeypatch.setattr(Boot, "_report", kept)
    train(240, 256, n_sub=16)
    first, last = (torch.stack(part).sum(0) for part in (seen[:60], seen[-60:]))
    left = (last[0] / last[1]) / (first[0] / first[1])
    assert left[:5].max() < 0.1 and left[-3:].min() > 0.2, left


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "share"), [(1, 0.139), (4, 0.262)])
def test_training_comes_close_to_the_fine_teacher(steps: int, share: float) -> None:
    """Sliced distance at most this share of the teacher's own at as many steps."""
    method, student = train(steps=steps, n_sub=N // steps)
    z = noises()
    fine = teacher_samples(method.teacher, z, N)
    found = sliced_distance(student_samples(method, student, z), fine)
    teacher = sliced_distance(teacher_samples(method.teacher, z, steps), fine)
    assert found < share * teacher, (found, teacher)
