"""Consistency functions: functions of a prediction at x_t that are the identity at the end of its trajectory or phase."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fewstep.diffusion.prediction import Prediction, ode_step
from fewstep.diffusion.schedule import Schedule, like
from fewstep.diffusion.shapes import PerSample, Samples, Times
from fewstep.methods.consistency import settings

SIGMA_DATA = 0.5

Endpoint = Callable[[Prediction, Samples, Times, Times], Samples]
"""(prediction at x_t, x_t, t, end) -> f(x_t, t)."""


def boundary_scalings(t: Times, timestep_scaling: float) -> tuple[PerSample, PerSample]:
    """c_skip and c_out at t (Luo et al. 2023, appendix): 1 and 0 at t = 0, so that the student is the identity there.

    c_out multiplies a prediction of x0 and so has no factor sigma_data, unlike Song et al.'s eq. 5.
    """
    q = timestep_scaling * t.double()
    c_skip = SIGMA_DATA**2 / (q**2 + SIGMA_DATA**2)
    c_out = q / (q**2 + SIGMA_DATA**2).sqrt()
    return c_skip, c_out


@dataclass(frozen=True)
class Boundary:
    """x0 with LCM's c_skip and c_out."""

    timestep_scaling: float

    def __call__(self, p: Prediction, x: Samples, t: Times, end: Times) -> Samples:
        c_skip, c_out = (like(v, p.x0) for v in boundary_scalings(t, self.timestep_scaling))
        return c_skip * x + c_out * p.x0


def plain(p: Prediction, x: Samples, t: Times, end: Times) -> Samples:
    """x0 itself; x_t where t is the end, whatever the network says there."""
    return _identity_at_end(p.x0, x, t, end)


@dataclass(frozen=True)
class PhaseEnd:
    """The ODE's jump to the end of the phase (PCM, MLCM)."""

    schedule: Schedule

    def __call__(self, p: Prediction, x: Samples, t: Times, end: Times) -> Samples:
        return _identity_at_end(ode_step(self.schedule, p, end), x, t, end)


def _identity_at_end(jump: Samples, x: Samples, t: Times, end: Times) -> Samples:
    return torch.where(like(t == end, x).bool(), x.to(jump.dtype), jump)


def whole_trajectory(endpoint: settings.Boundary | settings.Plain) -> Endpoint:
    """The endpoint that the settings of a method without phases name."""
    return Boundary(endpoint.timestep_scaling) if isinstance(endpoint, settings.Boundary) else plain
