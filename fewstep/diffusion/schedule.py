"""Noise schedules alpha(t), sigma(t) of x_t = alpha(t) x0 + sigma(t) eps. Pure functions of tensors.

A timestep t is what the network receives, in diffusers' units; s is the next, less noisy one. A negative
timestep is clean data (alpha = 1, sigma = 0).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fewstep.diffusion.shapes import Anything, Levels, PerSample, Times, Values


class Schedule(Protocol):
    """alpha and sigma at timesteps t."""

    def __call__(self, t: Times) -> tuple[PerSample, PerSample]: ...


@dataclass(frozen=True)
class VariancePreserving:
    """alpha^2 + sigma^2 = 1, from a diffusers scheduler's `alphas_cumprod`; zero terminal SNR included."""

    alphas_cumprod: Levels

    def __call__(self, t: Times) -> tuple[PerSample, PerSample]:
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

    def __call__(self, t: Times) -> tuple[PerSample, PerSample]:
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

    def __call__(self, t: Times) -> tuple[PerSample, PerSample]:
        t = t if t.is_floating_point() else t.float()
        u = (t + 1).clamp_min(0) / self.num_train_timesteps
        sigma = self.shift * u / (1 + (self.shift - 1) * u)
        return 1 - sigma, sigma

    def timestep(self, sigma: Values) -> Values:
        """The timestep of sigma: the inverse."""
        return self.num_train_timesteps * sigma / (self.shift - (self.shift - 1) * sigma) - 1


@dataclass(frozen=True)
class KarrasLevels:
    """x0 + k eps of Karras et al. (2022), divided by sqrt(1 + k^2): alpha = 1 / sqrt(1 + k^2), sigma = k alpha, in float64.

    Timesteps 0 ... num_train_timesteps - 1, and all between, are even in the rho-th root of k (their eq. 5), from sigma_min
    up to sigma_max; -1 is clean data.
    """

    sigma_min: float
    sigma_max: float
    rho: float
    num_train_timesteps: int

    def level(self, t: Times) -> PerSample:
        """k = sigma / alpha at t >= 0."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        root: Tensor = low + (high - low) * t.double() / (self.num_train_timesteps - 1)
        return root**self.rho

    def __call__(self, t: Times) -> tuple[PerSample, PerSample]:
        k = torch.where(t < 0, 0.0, self.level(t.clamp_min(0)))
        alpha = (1 + k**2).rsqrt()
        return alpha, k * alpha


def noise_level(schedule: Schedule, t: Times) -> PerSample:
    """sigma / alpha at t, in float64: the sigma of Karras et al. (2022), whose x is x0 + sigma eps. 0 for clean data.

    Pure noise, where alpha is 0, counts as alpha = 1e-4, so that it has a logarithm and an inverse.
    """
    alpha, sigma = (v.double() for v in schedule(t))
    return sigma / alpha.clamp_min(1e-4)


def like(v: Times, x: Anything) -> Anything:
    """v [B] as [B, 1, ...], in the type of x [B, ...], ready to multiply it."""
    return v.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)


def full_precision(x: Values) -> Values:
    """x in float32; unchanged where it is float64."""
    return x if x.dtype == torch.float64 else x.float()
