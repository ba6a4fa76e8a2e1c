"""A method of your own, in a file outside the package: one step that repeats the teacher's own samples.

    fewstep train examples/own_method.yaml

The student maps noise to the sample that the teacher's solver makes of it (Luhman & Luhman 2021, arXiv 2101.02388). Training,
exact resume, export and scores are the package's.
"""

import torch
from diffusers import SchedulerMixin
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from fewstep.config import MethodConfig, OptimConfig
from fewstep.diffusion.guidance import GuidedDenoiser
from fewstep.diffusion.solvers import solve
from fewstep.methods.base import NOTHING, Batch, Carry, Method, Networks, Role, Step, StepOutput


class OneStepConfig(MethodConfig):
    optim: OptimConfig
    """Optimizer of the student."""
    teacher_steps: PositiveInt = 16
    """Steps of the teacher's solver for a sample."""
    guidance_scale: PositiveFloat = 1.0
    """Guidance of the teacher (1 = none), which becomes part of the student."""


class OneStep(Method):
    """One frozen teacher, one student, one loss."""

    settings = OneStepConfig
    name = "one step"
    paper = "Luhman & Luhman 2021, Knowledge Distillation in Iterative Generative Models, arXiv 2101.02388"
    needs_images = False
    config: OneStepConfig

    def roles(self) -> dict[str, Role]:
        student = self.teacher.students.new()
        return {"teacher": Role(self.teacher.denoiser), "student": Role(student, optim=self.config.optim)}

    def steps(self) -> tuple[Step, ...]:
        return (Step("student", self.loss),)

    def scheduler(self) -> SchedulerMixin:
        return self.teacher.samplers.jump(1)

    def allowed_steps(self) -> tuple[int, ...]:
        return (1,)

    def loss(self, nets: Networks, batch: Batch, carry: Carry = NOTHING, *, noise: Tensor | None = None) -> StepOutput:
        """Mean squared distance of the student's x0 at pure noise [B, C, h, w] to the teacher's sample of that noise."""
        teacher, n = self.teacher, self.config.teacher_steps
        if noise is None:
            noise = torch.randn(batch.size, *teacher.latent_shape, device=batch.device)
        times = teacher.samplers.grid(teacher.samplers.jump(n), n).to(batch.device)
        first = teacher.samplers.grid(self.scheduler(), 1)[0].to(batch.device).expand(batch.size)
        denoise = GuidedDenoiser(nets["teacher"], batch.cond, batch.uncond, self.config.guidance_scale)
        with torch.no_grad():
            target = solve(denoise, teacher.schedule, noise, times[:, None].expand(-1, batch.size))
        x0 = nets["student"](noise, first, batch.cond).x0
        return StepOutput({"regression": (x0 - target).square().mean()})
