"""Regression of the student onto the ends of trajectories that the teacher has drawn before training."""

from typing import TYPE_CHECKING

import torch

from fewstep.diffusion.shapes import Counts, GridTimes, Samples, Scales
from fewstep.methods.base import NOTHING, Batch, Carry, Method, Networks, Preparation, Role, Step, StepOutput
from fewstep.methods.consistency import build
from fewstep.methods.consistency.endpoints import whole_trajectory
from fewstep.methods.consistency.points import even_points
from fewstep.methods.consistency.settings import Boundary
from fewstep.methods.consistency.states import Draw, Given, StoredTrajectories
from fewstep.methods.guided_student import check_guidance, drawn_range, embeds, folded_scale, guided_student
from fewstep.methods.trajectory.settings import TrajectorySettings
from fewstep.teachers.base import Teacher
from fewstep.teachers.students import StudentGuidance

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


class Trajectory(Method):
    """The student maps every kept state of a trajectory of the guided teacher to its end.

    Knowledge distillation (Luhman & Luhman 2021) from all points of an even grid, not from noise alone, with the guidance scale
    embedded. The minimiser, E[x_end | x_t, scale], is the consistency function, as the ODE is deterministic; so the student is
    sampled as a consistency model. There is no target network and nothing of itself in its targets: it is no consistency
    distillation.
    """

    name = "trajectory"
    paper = "Luhman and Luhman 2021, Knowledge Distillation in Iterative Generative Models, arXiv 2101.02388"
    needs_images = False

    config: TrajectorySettings

    def __init__(self, config: TrajectorySettings, teacher: Teacher) -> None:
        super().__init__(config, teacher)
        check_guidance(teacher, config.guidance)
        self.student_guidance = StudentGuidance(folded_scale(config.guidance, self._sampled))
        points = even_points(config.points, teacher, "points")
        draw = Draw(teacher, points, drawn_range(config.guidance), config.trajectories.lognormal)
        self.states = StoredTrajectories(draw, config.trajectories, skip=None, key="trajectories")
        self.endpoint = whole_trajectory(config.endpoint)
        self.distance = build.distance(teacher, config.distance)

    def roles(self) -> dict[str, Role]:
        student = guided_student(self.teacher, self.config.guidance, self.config.dropout)
        return {"teacher": Role(self.teacher.denoiser), "student": Role(student, optim=self.config.optim)}

    def steps(self) -> tuple[Step, ...]:
        return (Step("student", self.loss),)

    def scheduler(self) -> "SchedulerMixin":
        end = self.config.endpoint
        scaling = end.timestep_scaling if isinstance(end, Boundary) else 10.0
        return self.teacher.samplers.renoise(self.config.steps, scaling)

    def allowed_steps(self) -> tuple[int, ...]:
        return self.teacher.samplers.counts(self.config.steps)

    def prepare(self, at: Preparation) -> None:
        self.states.prepare(at)

    def loss(
        self,
        nets: Networks,
        batch: Batch,
        carry: Carry = NOTHING,
        *,
        index: Counts | None = None,
        noise: Samples | None = None,
        guidance_scale: Scales | None = None,
    ) -> StepOutput:
        """Distance of f(x_t, t) to the end of the trajectory of x_t.

        Args:
            index: positions in the grid; drawn if None.
            noise, guidance_scale: as of the consistency loss; the trajectories have their own.
        """
        with torch.no_grad():
            state = self.states(nets, batch, Given(index, noise, guidance_scale))
        if state.x_s is None:
            raise RuntimeError("trajectories: found none; expected those that prepare draws. Call prepare first")
        student = state.at.denoised(nets["student"], embeds(self.config.guidance))
        prediction = self.endpoint(student, state.at.x, state.at.t, state.end)
        return StepOutput({"consistency": self.distance(prediction, state.x_s).mean()})

    def _sampled(self) -> GridTimes:
        """Timesteps of the student's sampler."""
        return self.teacher.samplers.grid(self.scheduler(), self.config.steps)[:-1]
