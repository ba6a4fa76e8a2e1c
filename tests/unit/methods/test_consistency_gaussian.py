"""Training itself, where its answer is known: data from a Gaussian, whose denoiser and trajectories are affine in x."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from builders.consistency import config, consistency, grid_of
from fewstep.diffusion.grids import even_steps
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.solvers import RULES, solve
from fewstep.methods.base import Batch
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
        (at, st), (a, b) = ((v[0].double() for v in schedule(torch.tensor([u]))) for u in (t, s))
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
    stages = (dict(phases=4, iterations=400), dict(phases=phases))
    method = consistency(
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
        method.loss(nets, batch).losses["consistency"].backward()
        optimizer.step()
    grid = grid_of(method, -1)
    for i, wanted in enumerate(solution(grid, teacher.schedule, nets["teacher"])):
        t, end = grid.t[i : i + 1], grid.end[i : i + 1]
        found = []
        for x in (0.0, 1.0):
            p = student(torch.full((1, 1, 1, 1), x), t, {})
            alpha, sigma = teacher.schedule(end)
            found.append((alpha * p.x0 + sigma * p.eps).item())
        assert found[0] == pytest.approx(float(wanted[1]), abs=0.02)
        assert found[1] - found[0] == pytest.approx(float(wanted[0]), abs=0.02)


def closed_form(schedule: Any, t: Tensor) -> Tensor:
    """Where the ODE itself ends, m + s (x - alpha m) / sqrt(alpha^2 s^2 + sigma^2), as slope and shift: [N, 2] in float64."""
    alpha, sigma = (v.double() for v in schedule(t))
    slope = STD / (alpha**2 * STD**2 + sigma**2).sqrt()
    return torch.stack([slope, MEAN * (1 - alpha * slope)], dim=1)


@torch.no_grad()
def by_the_solver(method: Any, net: Affine) -> Tensor:
    """The same by the teacher's steps from grid point to grid point: [N, 2] in float64."""
    grid, target = grid_of(method), method.config.target
    n = len(grid.t)
    ends = []
    for x in (torch.zeros(n, 1, 1, 1), torch.ones(n, 1, 1, 1)):
        times = even_steps(grid.t, grid.s, target.steps_per_point)
        solved = solve(lambda x, t: net(x, t, {}), method.teacher.schedule, x, times, RULES[target.solver])
        ends.append(solved.flatten().double())
    slope, shift = ends[1] - ends[0], ends[0]
    for i in range(1, n):  # to the point below, and from there on
        slope[i], shift[i] = slope[i - 1] * slope[i], slope[i - 1] * shift[i] + shift[i - 1]
    return torch.stack([slope, shift], dim=1)


def test_the_student_becomes_the_consistency_function_in_closed_form(tiny_ddpm):
    """From the diffusion model, whose x0 at high noise is the mean, to within 0.002 of what the teacher's own steps give."""
    teacher = load_teacher(str(tiny_ddpm))
    settings: dict[str, Any] = {"solver_steps": 10, "steps": 10, "solver": "heun", "teacher_steps": 2}
    method = consistency(config(**settings, guidance_range=None, target_decay=None), teacher)
    torch.manual_seed(0)
    student = exact(teacher.schedule).requires_grad_(True)
    nets = {"teacher": exact(teacher.schedule), "student": student}
    t = grid_of(method).t
    answer = closed_form(teacher.schedule, t)

    def off() -> float:
        found = torch.stack([student.a[t], student.b[t]], dim=1).detach().double()
        return (found - answer).abs().max().item()

    solved = (by_the_solver(method, nets["teacher"]) - answer).abs().max().item()
    assert off() > 0.4 and solved < 0.01
    optimizer = torch.optim.Adam(student.parameters(), 0.05)
    for iteration in range(300):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - iteration / 300)
        latents = MEAN + STD * torch.randn(40, *teacher.latent_shape)
        optimizer.zero_grad()
        method.loss(nets, Batch(40, {}, {}, torch.device("cpu"), iteration, latents)).losses["consistency"].backward()
        optimizer.step()
    assert off() == pytest.approx(solved, abs=0.002)
