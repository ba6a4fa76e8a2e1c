"""Classifier-free guidance of a denoiser."""

import torch
from torch import Tensor

from fewstep.diffusion.schedule import Prediction, guide
from fewstep.teachers.denoiser import Cond, DenoiserLike


def concatenate(a: Cond, b: Cond) -> Cond:
    """The conditions of a's samples, then those of b's."""
    return {key: torch.cat([a[key], b[key]]) for key in a}


def both_sides(
    denoiser: DenoiserLike, x_t: Tensor, t: Tensor, cond: Cond, uncond: Cond
) -> tuple[Prediction, Prediction]:
    """The denoiser's readings with and without the condition, in one call."""
    both = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), concatenate(cond, uncond))
    x0, eps = (part.chunk(2) for part in both)
    return Prediction(x0[0], eps[0]), Prediction(x0[1], eps[1])


def guided(
    denoiser: DenoiserLike, x_t: Tensor, t: Tensor, cond: Cond, uncond: Cond, scale: Tensor | float
) -> Prediction:
    """The denoiser's reading under guidance by a number or [B]; the number 1 is none and costs half as much."""
    if not isinstance(scale, Tensor) and scale == 1:
        return denoiser(x_t, t, cond)
    return guide(*both_sides(denoiser, x_t, t, cond, uncond), scale)
