"""Shared by the tests: from test_signal_ode."""

import torch

from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedule import like

MEANS = torch.tensor([[2.0, 0.5], [-1.5, 1.0], [0.0, -2.0], [1.0, 2.5]], dtype=torch.float64)


WEIGHTS = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)


VARIANCE = 0.09


def denoiser(schedule, x, t):
    """E[x0 | x_t = x] and the eps that belongs to it."""
    alpha, sigma = (like(v, x) for v in schedule(t))
    spread = alpha**2 * VARIANCE + sigma**2
    distance = (x[:, None] - alpha[:, None] * MEANS).square().sum(-1)
    weights = (WEIGHTS.log() - distance / (2 * spread)).softmax(1)
    means = MEANS + VARIANCE * alpha[:, None] * (x[:, None] - alpha[:, None] * MEANS) / spread[:, None]
    x0 = (weights[..., None] * means).sum(1)
    return Prediction(x0, (x - alpha * x0) / sigma)
