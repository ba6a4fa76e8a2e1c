"""Sampling as the student is sampled, or along a teacher: the moves between timesteps, and two ways to repeat them."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.diffusion.prediction import Denoise, Prediction, add_noise, ode_step
from fewstep.diffusion.schedule import Schedule

Move = Callable[[Schedule, Prediction, Tensor], Tensor]
"""From a prediction to the next state, at timesteps s [B]."""


def jump(schedule: Schedule, p: Prediction, s: Tensor) -> Tensor:
    """Follow the ODE to s."""
    return ode_step(schedule, p, s)


def renoise(schedule: Schedule, p: Prediction, s: Tensor) -> Tensor:
    """Add fresh noise to x0, up to s."""
    return add_noise(schedule, p.x0, torch.randn_like(p.x0), s)


def renoise_as(example: Tensor) -> Move:
    """As `renoise`, with noise of the shape, type and device of `example`."""
    return lambda schedule, p, s: add_noise(schedule, p.x0, torch.randn_like(example), s)


@torch.no_grad()
def rollout(denoise: Denoise, schedule: Schedule, x: Tensor, times: Tensor, move: Move) -> Tensor:
    """The state at the last of `times` [n], from x [B, ...] at the first, by one evaluation and one move a step."""
    for t, s in pairwise(times):
        x = move(schedule, denoise(x, t.expand(len(x))), s.expand(len(x)))
    return x


def ragged_rollout(step: Callable[[Tensor, Tensor, int], Tensor], x: Tensor, counts: Tensor) -> Tensor:
    """States [B, ...] after counts[b] steps for sample b, those that still go on in one batch.

    Args:
        step: states [b, ...] of samples, their indices [b] on the device of `counts`, and the number of the step, from 0; to
            states [b, ...].
        x: [B, ...]; left as it is.
        counts: steps of each sample, [B].
    """
    x = x.clone()
    for i in range(int(counts.max()) if len(counts) else 0):
        rows = (counts > i).nonzero().flatten()
        on = rows.to(x.device)
        x[on] = step(x[on], rows, i)
    return x
