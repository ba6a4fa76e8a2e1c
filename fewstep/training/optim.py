"""Optimizers, and the learning-rate schedule of all trainings."""

import math
from collections.abc import Sequence
from typing import Literal, TypedDict

import torch
from torch import nn

from fewstep.config import OptimConfig
from fewstep.errors import MissingError


class _Settings(TypedDict):
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


def new_optimizer(parameters: Sequence[nn.Parameter], o: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer that the settings name. Raises ValueError for bitsandbytes where it is not installed."""
    settings: _Settings = {"lr": o.lr, "betas": o.betas, "eps": o.eps, "weight_decay": o.weight_decay}
    if o.optimizer == "adamw":
        # Fused: one pass over each tensor and no copies of them; on two CPU cores a fifth of the default's time.
        return torch.optim.AdamW(parameters, **settings, fused=True)
    if o.optimizer == "radam":
        return torch.optim.RAdam(parameters, **settings, decoupled_weight_decay=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise MissingError(
            "method.optim.optimizer",
            "adamw8bit without the package bitsandbytes",
            "its package",
            "pip install 'fewstep[8bit]'",
        ) from None
    optimizer: torch.optim.Optimizer = AdamW8bit(parameters, **settings)
    return optimizer


def lr_factor(
    update: int,
    updates: int,
    warmup: int,
    decay: Literal["constant", "cosine"] = "cosine",
    full_updates: int = 0,
) -> float:
    """The factor of the learning rate at an update: linear warm-up, then constant, or a cosine to 0.

    Args:
        update: 1 ... updates.
        warmup: updates over which the factor rises; it is 1 at the last of them.
        full_updates: updates after the warm-up in which the cosine is still at 1.
    """
    if update <= warmup:
        return update / warmup
    if decay == "constant":
        return 1.0
    progress = (update - full_updates - warmup) / max(1, updates - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
