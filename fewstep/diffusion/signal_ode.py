"""The Signal-ODE of BOOT (Gu et al. 2023), anchored at any state: what a student that jumps from noise has to say.

Let z be a state at timestep `anchor` and x_u the solution of the teacher's ODE through it. A pair (x0, eps) with
alpha(anchor) x0 + sigma(anchor) eps = z is a straight line through z; the *anchored pair* of u is the one whose jump
`ode_step(pair, u)` lands on x_u. Its x0 is the mean of the teacher's x0 over alpha / sigma from `anchor` to u, its eps
the mean of the teacher's eps over sigma / alpha. Both follow step by step from convex combinations, for every schedule
and every parametrisation, because all native outputs are affine in (x0, eps) with the state z held fixed.

BOOT's y is this x0 for z pure noise. The anchored form and its proof are fewstep's; the ODE is the paper's.
"""

import torch

from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.schedule import Schedule, like
from fewstep.diffusion.shapes import PerSample, Samples, Times


def shares(schedule: Schedule, anchor: Times, t: Times, s: Times) -> tuple[PerSample, PerSample]:
    """Fractions of the way from `anchor` to s that lie before t, in alpha / sigma and in sigma / alpha, in [0, 1).

    (r_t - r_a) / (r_s - r_a) for r = alpha / sigma and for its inverse, without a division by what vanishes at pure
    noise or clean data. anchor >= t > s.
    """
    (alpha_a, sigma_a), (alpha_t, sigma_t), (alpha_s, sigma_s) = (
        (alpha.double(), sigma.double()) for alpha, sigma in (schedule(anchor), schedule(t), schedule(s))
    )
    start = t == anchor
    way = (alpha_t * sigma_a - alpha_a * sigma_t) / (alpha_s * sigma_a - alpha_a * sigma_s)
    x0 = torch.where(start, 0.0, way * sigma_s / sigma_t)
    # At zero terminal SNR alpha is 0 where t is the anchor.
    eps = torch.where(start, 0.0, way * alpha_s / torch.where(start, 1.0, alpha_t))
    return x0, eps


def bootstrap(
    schedule: Schedule, own: Prediction, teacher: Prediction, anchor: Times, t: Times, s: Times
) -> Prediction:
    """The anchored pair of s, given that of t (`own`) and the teacher's prediction at x_t = ode_step(own, t).

    Exact for one DDIM (Euler) step from t to s: its jump lands where that step lands. At t = anchor it is the teacher's
    prediction itself, whatever `own` says. anchor >= t > s.
    """
    x0, eps = (like(c, own.x0) for c in shares(schedule, anchor, t, s))
    return Prediction(x0 * own.x0 + (1 - x0) * teacher.x0, eps * own.eps + (1 - eps) * teacher.eps)


def log_noise_slope(schedule: Schedule, t: Times, reach: float = 1.0) -> PerSample:
    """d log(sigma / alpha) / dt at t, per timestep, by a central difference over +-reach timesteps."""

    def value(u: Times) -> PerSample:
        alpha, sigma = (v.double() for v in schedule(u))
        return sigma.log() - alpha.log()

    step = torch.as_tensor(reach, dtype=t.dtype, device=t.device)
    return (value(t + step) - value(t - step)) / (2 * reach)


def finite_difference(schedule: Schedule, y: Samples, teacher_x0: Samples, t: Times, s: Times) -> Samples:
    """BOOT's own target for y at s: one Euler step of the Signal-ODE, y + (t - s) lambda'(t) (teacher_x0 - y)."""
    return y + like((t - s) * log_noise_slope(schedule, t), y) * (teacher_x0 - y)
