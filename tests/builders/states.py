"""Shared by the tests: an exact teacher of Gaussian data, and settings of trajectories."""

from typing import Any

import torch

from builders.consistency import batch_for
from fewstep.diffusion.prediction import Prediction, ode_step
from fewstep.diffusion.schedule import VariancePreserving
from fewstep.methods.base import Batch
from fewstep.methods.noisy_batch import NoisyBatch

ALPHAS = torch.linspace(0.999, 0.005, 1000, dtype=torch.float64)


SCHEDULE = VariancePreserving(ALPHAS)


TIMES = torch.arange(1, 41) * 25 - 1


MEAN, STD = 0.7, 0.4


def exact(x, t):
    """Data from N(MEAN, STD^2): the posterior mean, and the noise that belongs to it."""
    alpha, sigma = (v.view(-1, 1) for v in SCHEDULE(t))
    x0 = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)
    return Prediction(x0, (x - alpha * x0) / sigma)


def fresh(size, seed=0):
    g = torch.Generator().manual_seed(seed)
    cond = {"tag": torch.arange(size) + 100 * seed, "words": torch.randn(size, 3, 2, generator=g)}
    x = torch.randn(size, 1, generator=g, dtype=torch.float64)
    return NoisyBatch(x, torch.full((size,), 999), cond, torch.full((size,), float(seed)))


def advance(x, rows, before, after):
    """The teacher's step of states x at grid positions `before`."""
    return ode_step(SCHEDULE, exact(x, TIMES[before]), TIMES[after])


def onwards(pool):
    """The same from the states that the pool holds."""
    x, before = pool.held.x, pool.index
    return lambda after: advance(x, None, before, after)


def imageless(teacher, size=4, iteration=0):
    batch = batch_for(teacher, size)
    return Batch(size, batch.cond, batch.uncond, torch.device("cpu"), iteration)


FREE: dict[str, Any] = {"solver_steps": 40, "steps": 8, "endpoint": "phase", "phases": 8, "states": "trajectory"}
