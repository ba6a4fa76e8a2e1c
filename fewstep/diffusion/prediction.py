"""Readings (x0, eps) of a network's output, and what follows from them: added noise and ODE steps."""

from collections.abc import Callable
from typing import Literal, NamedTuple

from fewstep.diffusion.schedule import Schedule, full_precision, like
from fewstep.diffusion.shapes import Samples, Times
from fewstep.errors import FewstepError

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow"]


class Prediction(NamedTuple):
    """The two readings of one network output; every parametrisation gives both."""

    x0: Samples
    eps: Samples


Denoise = Callable[[Samples, Times], Prediction]
"""(x, t) -> Prediction: a network with everything else fixed."""


def add_noise(schedule: Schedule, x0: Samples, eps: Samples, t: Times) -> Samples:
    """x_t = alpha(t) x0 + sigma(t) eps."""
    alpha, sigma = (like(v, x0) for v in schedule(t))
    return alpha * x0 + sigma * eps


def more_noise(schedule: Schedule, x_s: Samples, eps: Samples, s: Times, t: Times) -> Samples:
    """x_t from x_s of less noise, t >= s, by the process itself: x_t is distributed as `add_noise` of the same x0 is.

    x_t = r x_s + sqrt(sigma(t)^2 - r^2 sigma(s)^2) eps, r = alpha(t) / alpha(s): for every schedule, not for those that keep
    the variance only. eps must be independent of x_s.
    """
    (alpha_s, sigma_s), (alpha_t, sigma_t) = ((a.double(), b.double()) for a, b in (schedule(s), schedule(t)))
    ratio = alpha_t / alpha_s
    deviation = (sigma_t**2 - (ratio * sigma_s) ** 2).clamp_min(0).sqrt()
    return like(ratio, x_s) * x_s + like(deviation, x_s) * eps


def read(schedule: Schedule, kind: PredictionType, output: Samples, x_t: Samples, t: Times) -> Prediction:
    """Read a network output at (x_t, t) as (x0, eps), in float32 (float64 stays).

    v is alpha eps - sigma x0 (Salimans & Ho 2022); flow is eps - x0, for schedules with alpha + sigma = 1.
    Raises ValueError for an unknown kind.
    """
    output, x_t = full_precision(output), full_precision(x_t)
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
    raise FewstepError("prediction_type", repr(kind), "epsilon, v_prediction, sample or flow")


def output_of(schedule: Schedule, kind: PredictionType, p: Prediction, t: Times) -> Samples:
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
    raise FewstepError("prediction_type", repr(kind), "epsilon, v_prediction, sample or flow")


def ode_step(schedule: Schedule, p: Prediction, s: Times) -> Samples:
    """One step of the probability-flow ODE to s: DDIM (Song et al. 2021, eq. 12, eta = 0) and, for rectified flow, Euler."""
    return add_noise(schedule, p.x0, p.eps, s)
