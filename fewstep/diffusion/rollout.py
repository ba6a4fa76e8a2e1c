"""Sampling as the student is sampled, or along a teacher: the moves between timesteps, and two ways to repeat them."""

from collections.abc import Callable
from itertools import pairwise

import torch

from fewstep.diffusion.prediction import Denoise, Prediction, add_noise, ode_step
from fewstep.diffusion.schedule import Schedule
from fewstep.diffusion.shapes import Counts, GridTimes, Rows, Samples, Times

Move = Callable[[Schedule, Prediction, Times], Samples]
"""From a prediction to the next state, at timesteps s."""


def jump(schedule: Schedule, p: Prediction, s: Times) -> Samples:
    """Follow the ODE to s."""
    return ode_step(schedule, p, s)


def renoise(schedule: Schedule, p: Prediction, s: Times) -> Samples:
    """Add fresh noise to x0, up to s."""
    return add_noise(schedule, p.x0, torch.randn_like(p.x0), s)


def renoise_as(example: Samples) -> Move:
    """A `renoise` with noise of the shape, type and device of `example`."""
    return lambda schedule, p, s: add_noise(schedule, p.x0, torch.randn_like(example), s)


@torch.no_grad()
def rollout(denoise: Denoise, schedule: Schedule, x: Samples, times: GridTimes, move: Move) -> Samples:
    """The state at the last of `times`, from x at the first, by one evaluation and one move a step."""
    for t, s in pairwise(times):
        x = move(schedule, denoise(x, t.expand(len(x))), s.expand(len(x)))
    return x


def ragged_rollout(step: Callable[[Samples, Rows, int], Samples], x: Samples, counts: Counts) -> Samples:
    """Samples after counts[b] steps for sample b, those that still go on in one batch.

    Args:
        step: states of samples, their indices on the device of `counts`, and the number of the step, from 0; to states.
        x: unchanged.
        counts: steps of each sample.
    """
    x = x.clone()
    for i in range(int(counts.max()) if len(counts) else 0):
        rows = (counts > i).nonzero().flatten()
        on = rows.to(x.device)
        x[on] = step(x[on], rows, i)
    return x
