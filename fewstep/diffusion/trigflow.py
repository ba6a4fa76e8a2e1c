"""TrigFlow (Lu & Song 2024, arXiv 2410.11081): every noise process as a rotation, x = cos(tau) x0 + sin(tau) eps.

With tau = atan2(sigma, alpha) and size = |(alpha, sigma)|, x_t = size x, and along the ODE dx/dtau is the velocity
F = cos(tau) eps - sin(tau) x0 of the network's reading. For a process that keeps the variance size is 1 and F is v; for a
rectified flow it is the velocity of section 3 of SANA-Sprint's appendix, (1 - 2 s) x_s + (1 - 2 s + 2 s^2) v over size. The noise
has deviation 1, so the paper's sigma_data is 1 here.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from fewstep.diffusion.prediction import Prediction, PredictionType, output_of, read
from fewstep.diffusion.schedule import Schedule, VariancePreserving, like
from fewstep.diffusion.shapes import PerSample, Samples, Times


class Rotation(NamedTuple):
    """Timesteps as angles, in float64.

    time_rate and size_rate are cos(tau) sin(tau) times d t / d tau and d size / d tau: finite at both ends, where tau itself
    moves infinitely slowly or fast.
    """

    tau: PerSample
    size: PerSample
    time_rate: PerSample
    size_rate: PerSample


def slopes(schedule: Schedule, t: Times) -> tuple[PerSample, PerSample]:
    """d alpha / d t and d sigma / d t at t, in float64. A table's are those of its angle by central differences."""
    if isinstance(schedule, VariancePreserving):
        table = schedule.alphas_cumprod.double().to(t.device)
        slope = torch.gradient(torch.atan2((1 - table).sqrt(), table.sqrt()))[0][t.long()]
        alpha, sigma = (v.double() for v in schedule(t))
        return -sigma * slope, alpha * slope
    t = t.double()
    return torch.func.jvp(schedule, (t,), (torch.ones_like(t),))[1]


def rotation(schedule: Schedule, t: Times) -> Rotation:
    """The angles of timesteps t, whole numbers for a table, and how fast they move."""
    alpha, sigma = (v.double() for v in schedule(t if isinstance(schedule, VariancePreserving) else t.double()))
    d_alpha, d_sigma = slopes(schedule, t)
    size = torch.hypot(alpha, sigma)
    time_rate = alpha * sigma / (alpha * d_sigma - sigma * d_alpha)
    return Rotation(torch.atan2(sigma, alpha), size, time_rate, time_rate * (alpha * d_alpha + sigma * d_sigma) / size)


def velocity(p: Prediction, tau: PerSample) -> Samples:
    """F = cos(tau) eps - sin(tau) x0: where the ODE through the state leads."""
    return like(tau.cos(), p.eps) * p.eps - like(tau.sin(), p.x0) * p.x0


def velocity_rate(
    answer: Callable[[Samples, Times], Prediction],
    schedule: Schedule,
    kind: PredictionType,
    x: Samples,
    t: Times,
    at: Rotation,
    slope: Samples,
) -> tuple[Samples, Samples]:
    """F of the network at x and t, and cos(tau) sin(tau) dF/dtau along dx/dtau = slope, by forward-mode autodiff.

    answer: the network's prediction at (x_t = size x, t). Its output is read again with alpha and sigma as functions of tau, for
    a reading by table would count as constant. Attention runs on the kernel that knows forward mode.
    """
    weight = at.tau.cos() * at.tau.sin()

    def moved(x: Samples, tau: PerSample, size: PerSample, t: Times) -> Samples:
        x_t = like(size, x) * x
        output = output_of(schedule, kind, answer(x_t, t), t)
        return velocity(read(lambda _: (size * tau.cos(), size * tau.sin()), kind, output, x_t, t), tau)

    primals = (x, at.tau, at.size, t.to(x.dtype))
    tangents = (like(weight, x) * slope, weight, at.size_rate, at.time_rate.to(x.dtype))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        own, rate = torch.func.jvp(moved, primals, tangents)  # type: ignore[misc]
    return own, rate


def tangent(own: Samples, rate: Samples, x: Samples, slope: Samples, tau: PerSample, warmth: float) -> Samples:
    """cos(tau) d f / d tau of the consistency function f = cos(tau) x - sin(tau) F (Lu & Song 2024, eq. 6).

    own, rate: F and cos sin dF/dtau of `velocity_rate`; slope: dx/dtau. warmth in [0, 1] weighs the part that has a derivative.
    """
    cos, sin = like(tau.cos(), x), like(tau.sin(), x)
    return -(cos**2) * (own - slope) - warmth * (cos * sin * x + rate)
