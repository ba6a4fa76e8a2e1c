"""Noise processes x_t = alpha(t) x0 + sigma(t) eps: schedules, readings of a network, ODE steps, guidance.

Pure functions of tensors. A timestep t is what the network is given, in diffusers' units, shaped [B]; s is the next,
less noisy one. A negative timestep stands for clean data (alpha = 1, sigma = 0).
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow"]


class Prediction(NamedTuple):
    """The two readings of one network output, each [B, ...]; every parametrisation gives both."""

    x0: Tensor
    eps: Tensor


class Schedule(Protocol):
    """alpha and sigma at timesteps t [B]; both [B]."""

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class VariancePreserving:
    """alpha^2 + sigma^2 = 1, from a diffusers scheduler's `alphas_cumprod` [T]; zero terminal SNR included."""

    alphas_cumprod: Tensor

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        table = self.alphas_cumprod.to(t.device)
        a = torch.where(t < 0, torch.ones((), dtype=table.dtype, device=t.device), table[t.long().clamp_min(0)])
        return a.sqrt(), (1 - a).sqrt()

    @property
    def zero_terminal_snr(self) -> bool:
        return bool(self.alphas_cumprod[-1] <= 1e-12)


@dataclass(frozen=True)
class RectifiedFlow:
    """alpha = 1 - t / T, sigma = t / T (Liu et al. 2022), with T the network's time at pure noise."""

    num_train_timesteps: float = 1000

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t if t.is_floating_point() else t.float()
        sigma = t.clamp_min(0) / self.num_train_timesteps
        return 1 - sigma, sigma


@dataclass(frozen=True)
class ShiftedFlow:
    """Rectified flow at timesteps 0 ... T - 1, which are even before a shift moves them towards noise, and -1, clean data.

    sigma = shift u / (1 + (shift - 1) u), u = (t + 1) / T (Esser et al. 2024, eq. 23); alpha = 1 - sigma. The last
    timestep is pure noise.
    """

    shift: float = 1.0
    num_train_timesteps: int = 1000

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t if t.is_floating_point() else t.float()
        u = (t + 1).clamp_min(0) / self.num_train_timesteps
        sigma = self.shift * u / (1 + (self.shift - 1) * u)
        return 1 - sigma, sigma

    def timestep(self, sigma: Tensor) -> Tensor:
        """The timestep of sigma [...]: the inverse."""
        return self.num_train_timesteps * sigma / (self.shift - (self.shift - 1) * sigma) - 1


def noise_level(schedule: Schedule, t: Tensor) -> Tensor:
    """sigma / alpha at t, in float64: the sigma of Karras et al. (2022), whose x is x0 + sigma eps. 0 for clean data.

    Pure noise, where alpha is 0, counts as alpha = 1e-4, so that it has a logarithm and an inverse.
    """
    alpha, sigma = (v.double() for v in schedule(t))
    return sigma / alpha.clamp_min(1e-4)


def like(v: Tensor, x: Tensor) -> Tensor:
    """v [B] as [B, 1, ...], in the type of x [B, ...], ready to multiply it."""
    return v.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)


def add_noise(schedule: Schedule, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = alpha(t) x0 + sigma(t) eps."""
    alpha, sigma = (like(v, x0) for v in schedule(t))
    return alpha * x0 + sigma * eps


def more_noise(schedule: Schedule, x_s: Tensor, eps: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """x_t from x_s of less noise, t >= s, by the process itself: x_t is distributed as `add_noise` of the same x0 is.

    x_t = r x_s + sqrt(sigma(t)^2 - r^2 sigma(s)^2) eps, r = alpha(t) / alpha(s): for every schedule, not for those that keep
    the variance only. eps must be independent of x_s.
    """
    (alpha_s, sigma_s), (alpha_t, sigma_t) = ((a.double(), b.double()) for a, b in (schedule(s), schedule(t)))
    ratio = alpha_t / alpha_s
    deviation = (sigma_t**2 - (ratio * sigma_s) ** 2).clamp_min(0).sqrt()
    return like(ratio, x_s) * x_s + like(deviation, x_s) * eps


def read(schedule: Schedule, kind: PredictionType, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
    """Read a network output [B, ...] at (x_t, t) as (x0, eps), in float32 (float64 stays).

    v is alpha eps - sigma x0 (Salimans & Ho 2022); flow is eps - x0, for schedules with alpha + sigma = 1.
    Raises ValueError for an unknown kind.
    """
    output, x_t = _full(output), _full(x_t)
    alpha, sigma = (like(v, x_t) for v in schedule(t))
    match kind:
        case "epsilon":
            return Prediction((x_t - sigma * output) / alpha, output)
        case "sample":
            return Prediction(output, (x_t - alpha * output) / sigma)
        case "v_prediction":
            return Prediction(alpha * x_t - sigma * output, sigma * x_t + alpha * output)
        case "flow":
            return Prediction(x_t - sigma * output, x_t + alpha * output)
    raise ValueError(f"unknown prediction type {kind!r}: epsilon, v_prediction, sample or flow")


def output_of(schedule: Schedule, kind: PredictionType, p: Prediction, t: Tensor) -> Tensor:
    """The network output that `read` reads as p: its inverse, without a division at any t.

    Raises ValueError for an unknown kind.
    """
    alpha, sigma = (like(v, p.x0) for v in schedule(t))
    match kind:
        case "epsilon":
            return p.eps
        case "sample":
            return p.x0
        case "v_prediction":
            return alpha * p.eps - sigma * p.x0
        case "flow":
            return p.eps - p.x0
    raise ValueError(f"unknown prediction type {kind!r}: epsilon, v_prediction, sample or flow")


def ode_step(schedule: Schedule, p: Prediction, s: Tensor) -> Tensor:
    """One step of the probability-flow ODE to s: DDIM (Song et al. 2021, eq. 12, eta = 0) and, for rectified flow, Euler."""
    return add_noise(schedule, p.x0, p.eps, s)


def guide(cond: Prediction, uncond: Prediction, scale: Tensor | float) -> Prediction:
    """Classifier-free guidance (Ho & Salimans 2022), uncond + scale (cond - uncond): 1 is none, as in diffusers.

    scale is a number or [B].
    """
    w = like(scale, cond.x0) if isinstance(scale, Tensor) else scale
    return Prediction(*(u + w * (c - u) for c, u in zip(cond, uncond, strict=True)))


def threshold(schedule: Schedule, p: Prediction, x_t: Tensor, t: Tensor, quantile: float | None) -> Prediction:
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
    return Prediction(x0, (_full(x_t) - alpha * x0) / sigma)


def _full(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
