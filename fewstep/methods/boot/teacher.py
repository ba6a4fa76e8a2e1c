"""The teacher as bootstrapping uses it: guided, bounded, and solved from time to time."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch

from fewstep.diffusion.guidance import GuidedDenoiser, Network, threshold
from fewstep.diffusion.prediction import Denoise, Prediction, ode_step
from fewstep.diffusion.shapes import Samples, Scales, Times, TimesOfSteps
from fewstep.diffusion.signal_ode import bootstrap
from fewstep.diffusion.solvers import Rule, ddim, heun_in_signal, solve
from fewstep.teachers.base import Cond, Teacher

RULES: dict[Literal["ddim", "heun"], Rule] = {"ddim": ddim, "heun": heun_in_signal}


@dataclass(frozen=True)
class GuidedTeacher:
    """The frozen network's guided denoiser, and its solutions.

    Attributes:
        negative_prompt: what guidance leads away from; "" is the teacher's null condition.
        quantile: of dynamic thresholding of x0; None = clamp it; unused unless `bounded`.
    """

    teacher: Teacher
    negative_prompt: str = ""
    bounded: bool = False
    quantile: float | None = None
    solver: Literal["ddim", "heun"] = "ddim"

    def denoiser(self, net: Network, cond: Cond, scale: Scales | None) -> GuidedDenoiser:
        """The denoiser of B samples with their conditions, guided by scale (None = not) in one doubled batch."""
        uncond = cond if scale is None else self._uncond(len(scale))
        return GuidedDenoiser(net, cond, uncond, scale, self._bound if self.bounded else None)

    def _bound(self, p: Prediction, x: Samples, t: Times) -> Prediction:
        return threshold(self.teacher.schedule, p, x, t, self.quantile)

    def _uncond(self, size: int) -> Cond:
        if self.negative_prompt:
            return self.teacher.condition([self.teacher.negative(self.negative_prompt)] * size)
        return self.teacher.null_condition(size)

    @torch.no_grad()
    def walk(self, denoise: Denoise, x: Samples, times: TimesOfSteps) -> Samples:
        """The solution at the last of `times` from x at the first."""
        return solve(denoise, self.teacher.schedule, x, times, RULES[self.solver])

    @torch.no_grad()
    def bootstrap(self, denoise: Denoise, own: Prediction, anchor: Times, times: TimesOfSteps) -> Prediction:
        """The anchored pair of the last of `times`, by a step of the teacher between each, given that of the first."""
        schedule, rule = self.teacher.schedule, RULES[self.solver]
        for t, s in pairwise(times):
            step = rule(denoise, schedule, ode_step(schedule, own, t), t, s, None)
            own = bootstrap(schedule, own, step, anchor, t, s)
        return own
