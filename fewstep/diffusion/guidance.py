"""Classifier-free guidance, thresholding, and the one guided denoiser that all solvers and rollouts call."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.diffusion.prediction import Denoise, Prediction
from fewstep.diffusion.schedule import Schedule, full_precision, like
from fewstep.diffusion.shapes import Rows, Samples, Scales, Times

Cond = dict[str, Tensor]
"""Conditions of B samples by name, [B, ...] each."""
Network = Callable[[Samples, Times, Cond], Prediction]
"""x_t, t and conditions to a prediction."""


def guide(cond: Prediction, uncond: Prediction, scale: Scales | float) -> Prediction:
    """Classifier-free guidance (Ho & Salimans 2022), uncond + scale (cond - uncond): 1 is none, as in diffusers."""
    w = like(scale, cond.x0) if isinstance(scale, Tensor) else scale
    return Prediction(*(u + w * (c - u) for c, u in zip(cond, uncond, strict=True)))


def threshold(schedule: Schedule, p: Prediction, x_t: Samples, t: Times, quantile: float | None) -> Prediction:
    """x0 bounded to [-1, 1], and the eps that belongs to it at x_t; for pixels, where guidance leads out of that range.

    quantile: None clamps; a number first divides a sample by that quantile of its |x0|, if it is above 1 (dynamic
    thresholding, Saharia et al. 2022, appendix C). The last timestep's sigma must not be 0.
    """
    bound = torch.ones(len(x_t), dtype=p.x0.dtype, device=x_t.device)
    if quantile is not None:
        bound = torch.quantile(p.x0.abs().flatten(1), quantile, dim=1).clamp_min(1)
    bound = like(bound, p.x0)
    x0 = p.x0.clamp(-bound, bound) / bound
    alpha, sigma = (like(v, x0) for v in schedule(t))
    return Prediction(x0, (full_precision(x_t) - alpha * x0) / sigma)


def concatenate(a: Cond, b: Cond) -> Cond:
    """The conditions of a's samples, then those of b's."""
    return {key: torch.cat([a[key], b[key]]) for key in a}


def both_sides(network: Network, x_t: Samples, t: Times, cond: Cond, uncond: Cond) -> tuple[Prediction, Prediction]:
    """The network's predictions with and without the condition, in one call."""
    both = network(torch.cat([x_t, x_t]), torch.cat([t, t]), concatenate(cond, uncond))
    x0, eps = (part.chunk(2) for part in both)
    return Prediction(x0[0], eps[0]), Prediction(x0[1], eps[1])


@dataclass(frozen=True)
class GuidedDenoiser:
    """A network with its conditions and guidance fixed: (x, t) -> Prediction.

    Attributes:
        network: called with x, t and conditions.
        cond, uncond: conditions of the B samples, and those that guidance leads away from.
        scale: of guidance. None and the number 1 are no guidance, at half the cost.
        bound: changes a prediction at (x, t), such as `threshold`; None = nothing.
    """

    network: Network
    cond: Cond
    uncond: Cond
    scale: Scales | float | None = None
    bound: Callable[[Prediction, Samples, Times], Prediction] | None = None

    def __call__(self, x: Samples, t: Times) -> Prediction:
        if self.scale is None or (not isinstance(self.scale, Tensor) and self.scale == 1):
            p = self.network(x, t, self.cond)
        else:
            p = guide(*both_sides(self.network, x, t, self.cond, self.uncond), self.scale)
        return p if self.bound is None else self.bound(p, x, t)

    def rows(self, on: Rows) -> "GuidedDenoiser":
        """The denoiser of some of the samples, by index or mask."""
        scale = self.scale[on] if isinstance(self.scale, Tensor) else self.scale
        cond, uncond = ({key: v[on] for key, v in c.items()} for c in (self.cond, self.uncond))
        return replace(self, cond=cond, uncond=uncond, scale=scale)


def unguided(network: Callable[..., Prediction], cond: Cond, *more: Tensor | None) -> Denoise:
    """A network with its conditions, and what else it receives, fixed: (x, t) -> Prediction."""
    return lambda x, t: network(x, t, cond, *more)
