"""Stock schedulers for students of rectified flows, whose few timesteps are the even grid before the teacher's shift.

With S(u) = shift u / (1 + (shift - 1) u), n steps run sigma = S(1), S((n - 1) / n), ..., S(1 / n), and end at 0.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from fewstep.diffusion.schedule import ShiftedFlow
from fewstep.errors import FewstepError

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


def shift_of(config: Mapping[str, Any], image_tokens: int) -> float:
    """The shift of a FlowMatchEulerDiscreteScheduler's config for an image of so many tokens.

    Raises ValueError for other schedulers.
    """
    if "use_dynamic_shifting" not in config:
        raise FewstepError(
            "teacher",
            "a scheduler without use_dynamic_shifting",
            "FlowMatchEulerDiscreteScheduler, this family's default",
        )
    if not config["use_dynamic_shifting"]:
        return float(config["shift"])
    low, high = config["base_image_seq_len"], config["max_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / (high - low)
    mu: float = config["base_shift"] + slope * (image_tokens - low)
    return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu


def shifted_scheduler(schedule: ShiftedFlow, stochastic: bool) -> "SchedulerMixin":
    """For pipelines that pass the scheduler an even grid, for any count of steps; the shift no longer depends on the size."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler: SchedulerMixin = FlowMatchEulerDiscreteScheduler(
        schedule.num_train_timesteps, shift=schedule.shift, stochastic_sampling=stochastic
    )
    return scheduler


def even_grid_scheduler(schedule: ShiftedFlow, steps: int, stochastic: bool) -> "SchedulerMixin":
    """For pipelines that pass the scheduler nothing but the count, which has to be `steps`.

    Of itself it would run sigma = S(v), v from 1 to e = 1 / T in n even points: the last step would do nothing. But S
    with another shift m, stretched linearly to end at S(1 / n), is S on an even grid from 1 to 1 / n: with v = A + B w,
    B = (1 - 1 / n) / (1 - e), A = 1 / n - B e, 1 - S(v) is proportional to (1 - w) / (1 + (m - 1) w) for
    m - 1 = (shift - 1) B / (1 + (shift - 1) A).
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    if steps == 1:
        return shifted_scheduler(schedule, stochastic)
    s, e = schedule.shift, 1 / schedule.num_train_timesteps
    b = (1 - 1 / steps) / (1 - e)
    m = 1 + (s - 1) * b / (1 + (s - 1) * (1 / steps - b * e))
    last = schedule(torch.tensor([schedule.num_train_timesteps / steps - 1], dtype=torch.float64))[1].item()
    scheduler: SchedulerMixin = FlowMatchEulerDiscreteScheduler(
        schedule.num_train_timesteps,
        # "Dynamic" with one shift for every size: the other kind is applied twice.
        use_dynamic_shifting=True,
        base_shift=math.log(m),
        max_shift=math.log(m),
        shift_terminal=last,
        stochastic_sampling=stochastic,
    )
    return scheduler


def twice_shifted_scheduler(schedule: ShiftedFlow, steps: int, stochastic: bool) -> "SchedulerMixin":
    """An `even_grid_scheduler` for pipelines that pass no `mu` either: the scheduler's shift m is fixed, and applied twice.

    The even points then end at e = m / (T + m - 1), which makes the equation for m quadratic: with k = shift - 1 and
    q = (1 - 1 / n) / (T - 1), k q m^2 - (1 + k / n) m + shift = 0.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    if steps == 1:
        return shifted_scheduler(schedule, stochastic)
    total, s = schedule.num_train_timesteps, schedule.shift
    b, q = 1 + (s - 1) / steps, (1 - 1 / steps) / (total - 1)
    m = 2 * s / (b + math.sqrt(b**2 - 4 * (s - 1) * q * s))
    last = schedule(torch.tensor([total / steps - 1], dtype=torch.float64))[1].item()
    scheduler: SchedulerMixin = FlowMatchEulerDiscreteScheduler(
        total, shift=m, shift_terminal=last, stochastic_sampling=stochastic
    )
    return scheduler
