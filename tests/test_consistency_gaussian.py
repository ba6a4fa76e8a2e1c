"""Training itself, where its answer is known: data from a Gaussian, whose denoiser and trajectories are affine in x."""

from typing import Any

import pytest
import torch
from test_consistency import config
from torch import Tensor, nn

from fewstep.methods.base import Batch
from fewstep.methods.consistency import Consistency
from fewstep.methods.consistency_config import StageConfig
from fewstep.process import Prediction
from fewstep.teachers import load_teacher

MEAN, STD = 0.3, 0.5


class Affine(nn.Module):
    """x0 = a[t] x + b[t], a network of two numbers for each timestep."""

    def __init__(self, schedule: Any) -> None:
        super().__init__()
        self.schedule = schedule
        self.a, self.b = nn.Parameter(torch.zeros(1000)), nn.Parameter(torch.zeros(1000))

    def forward(self, x: Tensor, t: Tensor, cond: Any, scale: Tensor | None = None) -> Prediction:
        a, b, alpha, sigma = (v.view(-1, 1, 1, 1) for v in (self.a[t], self.b[t], *self.schedule(t)))
        x0 = a * x + b
        return Prediction(x0, (x - alpha * x0) / sigma)


def exact(schedule: Any) -> Affine:
    """The posterior mean under N(MEAN, STD^2)."""
    net = Affine(schedule)
    alpha, sigma = schedule(torch.arange(1000))
    net.a.data = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
    net.b.data = MEAN * (1 - alpha * net.a)
    return net.requires_grad_(False)


def solution(grid: Any, schedule: Any, teacher: Affine) -> list[Tensor]:
    """x at the end of each grid point's phase as an affine map of x there, by the teacher's DDIM steps: [N, 2] in float64."""
    maps: list[Tensor] = []
    for i, (t, s, end) in enumerate(zip(*(v.tolist() for v in grid), strict=True)):
        (at, st), (a, b) = ((v.double() for v in schedule(torch.tensor(u))) for u in (t, s))
        slope = b / st + (a - at * b / st) * teacher.a[t].double()
        shift = (a - at * b / st) * teacher.b[t].double()
        if s == end:
            maps.append(torch.stack([slope, shift]))
        else:
            maps.append(torch.stack([maps[i - 1][0] * slope, maps[i - 1][0] * shift + maps[i - 1][1]]))
    return maps


@pytest.mark.parametrize("states", ["trajectory", "noised_data"])
@pytest.mark.parametrize("phases", [4, 1])
def test_the_student_becomes_the_teachers_solution(tiny_ddpm, states, phases):
    teacher = load_teacher(str(tiny_ddpm))
    stages = (StageConfig(phases=4, iterations=400), StageConfig(phases=phases))
    method = Consistency(
        config(solver_steps=8, steps=8, endpoint="phase", states=states, guidance_range=None, stages=stages,
               target_decay=None, rollout_segments=4), teacher,
    )  # fmt: skip
    torch.manual_seed(0)
    student = Affine(teacher.schedule)
    nets = {"teacher": exact(teacher.schedule), "student": student}
    optimizer = torch.optim.Adam(student.parameters(), 0.03)
    for iteration in range(1200):
        for group in optimizer.param_groups:
            group["lr"] = 0.03 * (1 - iteration / 1200)
        latents = MEAN + STD * torch.randn(10, *teacher.latent_shape) if states == "noised_data" else None
        batch = Batch(10, {}, {}, torch.device("cpu"), iteration, latents)
        optimizer.zero_grad()
        method.loss(nets, batch)["consistency"].backward()
        optimizer.step()
    grid = method.stages[-1].grid
    for i, wanted in enumerate(solution(grid, teacher.schedule, nets["teacher"])):
        t, end = grid.t[i : i + 1], grid.end[i : i + 1]
        found = []
        for x in (0.0, 1.0):
            p = student(torch.full((1, 1, 1, 1), x), t, {})
            alpha, sigma = teacher.schedule(end)
            found.append((alpha * p.x0 + sigma * p.eps).item())
        assert found[0] == pytest.approx(float(wanted[1]), abs=0.02)
        assert found[1] - found[0] == pytest.approx(float(wanted[0]), abs=0.02)
