"""Continuous-time consistency models (sCM; Lu & Song 2024), for every family: the limit of pairs without a gap.

The student's f = x0(x_t, t) is to be constant along the ODE. Its derivative along it, by forward-mode autodiff, is the whole
loss; there is no grid and no target network. The arithmetic is defined in fewstep.diffusion.trigflow.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fewstep.diffusion.grids import log_levels, lognormal_index
from fewstep.diffusion.guidance import GuidedDenoiser
from fewstep.diffusion.prediction import Prediction, add_noise
from fewstep.diffusion.schedule import like
from fewstep.diffusion.shapes import PerSample, Samples, Scales, Times
from fewstep.diffusion.trigflow import Rotation, rotation, tangent, velocity, velocity_rate
from fewstep.methods.base import (
    NOTHING,
    Batch,
    Carry,
    Method,
    Networks,
    Role,
    Step,
    StepOutput,
    require_guidable,
    require_live_guidance,
)
from fewstep.methods.dropout import without_dropout
from fewstep.methods.scm.config import ScmConfig
from fewstep.teachers.base import Teacher
from fewstep.teachers.denoiser import Denoiser, DenoiserLike
from fewstep.teachers.students import StudentGuidance

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

WAVES = 8


class LogVariance(nn.Module):
    """The log of the loss to be expected at a log noise level; 0 at the start of training."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * WAVES, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, level: PerSample) -> PerSample:
        # Periods from 4 pi down, of the logarithm: smooth over all levels there are, which span about 20.
        phase = level.float()[:, None] * torch.arange(1, WAVES + 1, device=level.device) / 8
        out: Tensor = self.linear(torch.cat([phase.sin(), phase.cos()], 1))
        return out[:, 0]


def unwrapped(network: DenoiserLike) -> Callable[..., Prediction]:
    """The denoiser's own forward, without the wrappers of a trainer (autocast, DDP); other networks as they are."""
    for part in network.modules():
        if isinstance(part, Denoiser):
            return partial(Denoiser.forward, part)
    return network


def has_16bit_weights(network: DenoiserLike) -> bool:
    """Whether some weights have 16 bits, as an adapter's base may; only under autocast they work with the others."""
    return any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in network.parameters())


class Scm(Method):
    """The student's x0 is constant along the trajectories of the guided teacher, or of the data's own process."""

    name = "scm"
    paper = (
        "Lu and Song 2024, Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models, arXiv 2410.11081"
    )

    config: ScmConfig

    def __init__(self, config: ScmConfig, teacher: Teacher) -> None:
        super().__init__(config, teacher)
        if config.guidance is not None:
            require_guidable(teacher, "guidance", "null")
            self.student_guidance = StudentGuidance(config.guidance.export_scale)
            if config.guidance.embed and config.guidance.export_scale is None:
                require_live_guidance(teacher)
        self.levels = log_levels(teacher.schedule, teacher.num_train_timesteps)

    def roles(self) -> dict[str, Role]:
        student = self.teacher.students.new(guidance_embedding=self.config.embedded)
        roles = {"teacher": Role(self.teacher.denoiser), "student": Role(student, optim=self.config.optim)}
        if self.config.adaptive_weight:
            roles["log_variance"] = Role(LogVariance(), optim=self.config.optim)
        return roles

    def steps(self) -> tuple[Step, ...]:
        student = Step("student", self.loss)
        return (student, Step("log_variance", self.variance_loss)) if self.config.adaptive_weight else (student,)

    def scheduler(self) -> "SchedulerMixin":
        return self.teacher.samplers.renoise(self.config.steps)

    def allowed_steps(self) -> tuple[int, ...]:
        return self.teacher.samplers.counts(self.config.steps)

    def loss(
        self,
        nets: Networks,
        batch: Batch,
        carry: Carry = NOTHING,
        *,
        t: Times | None = None,
        noise: Samples | None = None,
        guidance_scale: Scales | None = None,
    ) -> StepOutput:
        """|F - stop(F + g)|^2 with the tangent g of the student's consistency function (Lu & Song 2024, eq. 8).

        Args:
            t: whole timesteps; of log-normal noise levels if None.
            noise: like x0; drawn if None.
            guidance_scale: 1 = none; drawn from guidance.range if None.
        """
        c, schedule, device = self.config, self.teacher.schedule, batch.device
        if t is None:
            t = lognormal_index(self.levels.to(device), batch.size, *c.lognormal)
        if noise is None:
            noise = torch.randn_like(batch.x0)
        if guidance_scale is None and c.guidance is not None:
            low, high = c.guidance.range
            guidance_scale = low + (high - low) * torch.rand(batch.size, device=device)
        guidance_input = guidance_scale if c.embedded else None
        student, at = nets["student"], rotation(schedule, t)
        x_t = add_noise(schedule, batch.x0, noise, t)
        x = x_t / like(at.size, x_t)
        with torch.no_grad():
            if c.velocity == "teacher":
                slope = velocity(self._teacher(nets, batch, x_t, t, guidance_scale), at.tau)
            else:
                slope = velocity(Prediction(batch.x0, noise), at.tau)
            own, rate = self._rate(student, batch, guidance_input, x, t, at, slope)
            tangent_warmup = min(1.0, batch.iteration / c.warmup_iterations) if c.warmup_iterations else 1.0
            g = tangent(own, rate, x, slope, at.tau, tangent_warmup)
            logs = {"tangent": g.square().mean().sqrt()}
            g = self._bounded(g)
        found = velocity(student(x_t, t, batch.cond, guidance_input), at.tau)
        level = self.levels.to(device)[t]
        each = (-level).exp() * (found - (found + g).detach()).square().flatten(1).mean(1)
        if not c.adaptive_weight:
            return StepOutput({"scm": each.mean()}, logs)
        with torch.no_grad():
            weight = (-nets["log_variance"](level)).exp()
        return StepOutput({"scm": (weight * each).mean()}, logs, carry={"each": each.detach(), "level": level})

    def variance_loss(self, nets: Networks, batch: Batch, carry: Carry) -> StepOutput:
        """e^-u loss + u, whose minimum in u is the log of the loss (Karras et al. 2024, eq. 22)."""
        u = nets["log_variance"](carry["level"])
        return StepOutput({"log_variance": ((-u).exp() * carry["each"] + u).mean()})

    def _rate(
        self,
        student: DenoiserLike,
        batch: Batch,
        guidance_input: Scales | None,
        x: Samples,
        t: Times,
        at: Rotation,
        slope: Samples,
    ) -> tuple[Samples, Samples]:
        """F and cos sin dF/dtau of the student as it is sampled: without dropout, whose masks in forward mode would be others
        than those of the pass that learns; and in the precision of its weights, whatever the run's."""
        network, kind = unwrapped(student), self.teacher.denoiser.prediction_type
        full = nullcontext() if has_16bit_weights(student) else torch.autocast(batch.device.type, enabled=False)
        with without_dropout(student), full:
            own, rate = velocity_rate(
                lambda x, u: network(x, u, batch.cond, guidance_input), self.teacher.schedule, kind, x, t, at, slope
            )
        # Older releases of torch would give the next, differentiated call the weights that autocast has cast in here.
        torch.clear_autocast_cache()
        return own, rate

    def _bounded(self, g: Samples) -> Samples:
        if self.config.tangent == "clip":
            return g.clamp(-1, 1)
        norm = torch.linalg.vector_norm(g.flatten(1), dim=1)
        return g / like(norm + self.config.tangent_c, g)

    def _teacher(self, nets: Networks, batch: Batch, x_t: Samples, t: Times, scale: Scales | None) -> Prediction:
        return GuidedDenoiser(nets["teacher"], batch.cond, batch.uncond, scale)(x_t, t)
