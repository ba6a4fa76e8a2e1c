"""The teacher as bootstrapping uses it: guided, bounded, and solved over one step."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from fewstep.diffusion.schedule import Prediction, guide, like, ode_step, threshold
from fewstep.diffusion.signal_ode import bootstrap, heun
from fewstep.teachers.base import Teacher
from fewstep.teachers.denoiser import Cond, DenoiserLike
from fewstep.teachers.guidance import both_sides


@dataclass(frozen=True)
class GuidedTeacher:
    """Answers of the frozen network; every call is without gradient.

    Attributes:
        negative_prompt: what guidance leads away from; "" is the teacher's null condition.
        quantile: of dynamic thresholding of x0; None = clamp it; unused unless `bounded`.
    """

    teacher: Teacher
    negative_prompt: str = ""
    bounded: bool = False
    quantile: float | None = None
    solver: Literal["ddim", "heun"] = "ddim"

    def predict(self, net: DenoiserLike, x: Tensor, t: Tensor, cond: Cond, scale: Tensor | None) -> Prediction:
        """The prediction at x [B, C, h, w], t [B], guided by scale [B] (None = not) in one doubled batch."""
        p = net(x, t, cond) if scale is None else guide(*both_sides(net, x, t, cond, self._uncond(len(x))), scale)
        return threshold(self.teacher.schedule, p, x, t, self.quantile) if self.bounded else p

    def _uncond(self, size: int) -> Cond:
        if self.negative_prompt:
            return self.teacher.condition([self.teacher.negative(self.negative_prompt)] * size)
        return self.teacher.null_condition(size)

    def solve(self, net: DenoiserLike, x: Tensor, t: Tensor, s: Tensor, cond: Cond, scale: Tensor | None) -> Prediction:
        """The prediction whose `ode_step` to s is the solver's step from x at t."""
        first = self.predict(net, x, t, cond, scale)
        if self.solver == "ddim":
            return first
        schedule = self.teacher.schedule
        second = self.predict(net, ode_step(schedule, first, s), s.clamp_min(0), cond, scale)
        mean = heun(schedule, first, second, x, t)
        # There is no teacher at clean data: the last step to it is DDIM's.
        clean = like(s < 0, first.x0).bool()
        return Prediction(*(torch.where(clean, a, b) for a, b in zip(first, mean, strict=True)))

    @torch.no_grad()
    def walk(self, net: DenoiserLike, x: Tensor, times: Tensor, cond: Cond, scale: Tensor | None) -> Tensor:
        """The solution at the last of `times` [n, B] from x at the first."""
        for t, s in pairwise(times):
            x = ode_step(self.teacher.schedule, self.solve(net, x, t, s, cond, scale), s)
        return x

    @torch.no_grad()
    def bootstrap(
        self, net: DenoiserLike, own: Prediction, anchor: Tensor, times: Tensor, cond: Cond, scale: Tensor | None
    ) -> Prediction:
        """The anchored pair of the last of `times` [n, B], by a step of the teacher between each, given that of the first."""
        schedule = self.teacher.schedule
        for t, s in pairwise(times):
            step = self.solve(net, ode_step(schedule, own, t), t, s, cond, scale)
            own = bootstrap(schedule, own, step, anchor, t, s)
        return own
