"""BOOT trained on a teacher that is known: a mixture of Gaussians in the plane. The bounds are a first study's, on a
mixture of its own, as shares of the teacher's distance there."""

import copy
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from test_signal_ode import denoiser
from torch import Tensor, nn

from fewstep.config import OptimConfig
from fewstep.methods.base import Batch
from fewstep.methods.boot import Boot
from fewstep.methods.boot_config import BootConfig
from fewstep.process import VariancePreserving, ode_step, output_of
from fewstep.teachers.base import Cond, Denoiser, Posterior, Teacher

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


def call(
    net: nn.Module, x_t: Tensor, t: Tensor, cond: Cond, scale: Tensor | None, progress: Tensor | None = None
) -> Tensor:
    return net(x_t, t, torch.ones(len(x_t)) if progress is None else progress)


class Mixture(Teacher):
    conditions, num_train_timesteps, latent_shape, image_size = "none", 1000, (2,), 2

    def __init__(self) -> None:
        table = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
        self.schedule = VariancePreserving(table.float())
        self.denoiser = Denoiser(Exact(self.schedule), call, self.schedule, "v_prediction")

    def encode(self, images: Tensor) -> Posterior:
        return Posterior(images, torch.zeros_like(images))

    def decode(self, x0: Tensor) -> Tensor:
        return x0

    def condition(self, raw: Sequence[Any]) -> Cond:
        return {}

    def null_condition(self, size: int) -> Cond:
        return {}

    def student(self, guidance_embedding: bool = False, progress_embedding: bool = False) -> Denoiser:
        return Denoiser(Mlp(), call, self.schedule, "v_prediction")

    def feature_module(self, denoiser: Denoiser) -> nn.Module:
        raise NotImplementedError

    def renoise_scheduler(self, steps: int, timestep_scaling: float = 10.0, spacing: int | None = None) -> Any:
        raise NotImplementedError

    def renoise_counts(self, steps: int) -> tuple[int, ...]:
        raise NotImplementedError

    def jump_scheduler(self, steps: int) -> Any:
        return None

    def jump_grid(self, scheduler: Any, steps: int) -> Tensor:
        return torch.linspace(999, -1, steps + 1).round().long()

    def student_pipeline(self, student: Denoiser, scheduler: Any, guidance_scale: float | None = None) -> Any:
        raise NotImplementedError


def train(iterations: int = 2500, size: int = 512, **changes: Any) -> tuple[Boot, nn.Module]:
    torch.manual_seed(0)
    config = BootConfig.model_validate({"optim": OptimConfig(lr=2e-3), "boundary_frac": 0.1} | changes)
    method = Boot(config, Mixture())
    nets = {name: role.net for name, role in method.roles().items()}
    nets["ema"] = copy.deepcopy(nets["student"]).requires_grad_(False)
    optimizer = torch.optim.AdamW(nets["student"].parameters(), config.optim.lr, weight_decay=0)
    course = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for i in range(iterations):
        loss = sum(method.steps()[0].loss(nets, Batch(size, {}, {}, torch.device("cpu"), i)).values())
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
def measured(method: Boot, student: nn.Module, count: int = 4096) -> tuple[float, float]:
    """Root mean square distance to the fine teacher's sample of the same noise, and sliced Wasserstein-2 distance."""
    z = torch.randn(count, 2, generator=torch.Generator().manual_seed(1))
    teacher, grid = method.teacher, method.grid
    fine, x = z, z
    times = torch.linspace(999, -1, N + 1).round().long()
    for t, s in pairwise(times):
        fine = ode_step(teacher.schedule, teacher.denoiser(fine, t.expand(count), {}), s.expand(count))
    for k in range(len(grid)):
        p = student(x, grid[k, :1].expand(count), {}, progress=torch.ones(count))
        x = ode_step(teacher.schedule, p, grid[k, -1:].expand(count))
    angles = torch.arange(64) * math.pi / 64
    directions = torch.stack([angles.cos(), angles.sin()])
    gaps = [(v @ directions).sort(0).values for v in (fine, x)]
    paired = (fine - x).square().sum(1).mean().sqrt()
    return float(paired), float((gaps[0] - gaps[1]).square().mean().sqrt())


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "share"), [(1, 0.139), (4, 0.262)])
def test_training_comes_close_to_the_fine_teacher(steps: int, share: float) -> None:
    """Sliced distance at most this share of the teacher's own at as many steps."""
    method, student = train(steps=steps, n_sub=N // steps)
    found, teacher = (measured(method, net)[1] for net in (student, method.teacher.denoiser))
    assert found < share * teacher, (found, teacher)
