"""The teacher's steps from a state to the next cleaner one, on which consistency is asked for."""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from fewstep.diffusion.schedule import Prediction, Schedule, like, ode_step
from fewstep.methods.consistency.states import Answer, State

Solver = Literal["ddim", "heun"]


def solve(
    schedule: Schedule, answer: Answer, at: State, t: Tensor, s: Tensor, first: Prediction, steps: int, solver: Solver
) -> Tensor:
    """x_s [B, C, h, w] from the state x_t, by `steps` even steps of the teacher, whose prediction at x_t is `first`.

    t, s: [B], t > s; s = -1 is clean data. Timesteps between are whole where these are.
    """
    whole = not t.is_floating_point()
    start, p = t, first
    for i in range(1, steps + 1):
        if i > 1:
            p = answer(at, t.clamp_min(0))
        end = s
        if i < steps:
            end = start + (s - start) * (i / steps)
            end = end.round().long() if whole else end
        if solver == "heun":
            p = heun(schedule, answer, at, t, end, p)
        at, t = replace(at, x=ode_step(schedule, p, end)), end
    return at.x


def heun(schedule: Schedule, answer: Answer, at: State, t: Tensor, s: Tensor, first: Prediction) -> Prediction:
    """The prediction whose `ode_step` to s is Heun's step (Karras et al. 2022, algorithm 1; Song et al. 2023, eq. 6).

    In x / alpha the ODE is dx / dk = eps with k = sigma / alpha, so the step takes the mean of eps at both ends; where alpha
    is 0, at pure noise, that of x0, by the same rule in x / sigma and 1 / k. There is no teacher at clean data: a step to it
    stays `first`.
    """
    second = answer(replace(at, x=ode_step(schedule, first, s)), s.clamp_min(0))
    alpha, sigma = (like(v, first.x0) for v in schedule(t))
    x, x0, eps = at.x.to(first.x0.dtype), (first.x0 + second.x0) / 2, (first.eps + second.eps) / 2
    pure = alpha < 1e-4
    mean = Prediction(
        torch.where(pure, x0, (x - sigma * eps) / torch.where(pure, 1, alpha)),
        torch.where(pure, (x - alpha * x0) / sigma.clamp_min(1e-4), eps),
    )
    clean = like(s < 0, x).bool()
    return Prediction(*(torch.where(clean, a, b) for a, b in zip(first, mean, strict=True)))
