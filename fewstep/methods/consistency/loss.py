"""The consistency loss, and the method that every composition of its parts is.

What differs between CD, LCM, ECT, PCM and MLCM is which parts they choose: where states come from (states), at which
timesteps (points), how x_s follows from x_t and which network predicts the target there (targets), the consistency function
(endpoints), and what is added to the loss (terms). Compositions choose them once, for each of their stages.
"""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.shapes import Counts, GridTimes, Samples, Scales
from fewstep.methods.base import NOTHING, Batch, Carry, Method, Networks, Preparation, Role, Step, StepOutput
from fewstep.methods.consistency.build import Builder, Distance
from fewstep.methods.consistency.endpoints import Endpoint
from fewstep.methods.consistency.method_settings import ConsistencySettings
from fewstep.methods.consistency.points import Weight
from fewstep.methods.consistency.states import Given, States
from fewstep.methods.consistency.targets import Target
from fewstep.methods.consistency.terms import AdversarialTerm, RewardTerm, Term
from fewstep.methods.dropout import random_state
from fewstep.methods.guided_student import check_guidance, embeds, folded_scale, guided_student
from fewstep.methods.noisy_batch import NoisyBatch
from fewstep.teachers.base import Teacher
from fewstep.teachers.denoiser import DenoiserLike

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Parts:
    """Parts of a consistency loss.

    Attributes:
        states: where the student is trained.
        target: x_s, and whose answer there is the target.
        endpoint: the consistency function.
        weight: of a pair's distance.
        distance: of the student's and the target's endpoints, [B].
        terms: what is added to the loss.
    """

    states: States
    target: Target
    endpoint: Endpoint
    weight: Weight
    distance: Distance
    terms: tuple[Term, ...] = ()


@dataclass(frozen=True)
class Stage:
    """A stretch of the training from iteration `start` on; lr: its peak learning rate, None = the optimizer's."""

    parts: Parts
    start: int = 0
    lr: float | None = None


class Consistency(Method):
    """The student maps every point of a trajectory of the guided teacher to its end, or to the end of its phase."""

    config: ConsistencySettings
    timestep_scaling: float = 10.0
    """Timestep scaling of the exported scheduler's c_skip and c_out."""

    def __init__(self, config: ConsistencySettings, teacher: Teacher) -> None:
        super().__init__(config, teacher)
        check_guidance(teacher, config.guidance)
        self.make = Builder(teacher, config.guidance, self.sampled)
        self.stages = self.compose()
        scale = folded_scale(config.guidance, lambda: self.sampled(config.steps))
        self.student_guidance = replace(self.student_guidance, scale=scale)
        self.last_stage = self.stages[-1].start
        self.needs_images = any(stage.parts.states.needs_images for stage in self.stages)

    @abstractmethod
    def compose(self) -> tuple[Stage, ...]:
        """The stages, in order, with their parts."""

    def sampled(self, steps: int) -> GridTimes:
        """Timesteps of the student's sampler in a number of steps."""
        return self.teacher.samplers.grid(self.scheduler(), steps)[:-1]

    def stage(self, iteration: int) -> Stage:
        """The stage that an iteration belongs to."""
        return [stage for stage in self.stages if stage.start <= iteration][-1]

    # The method -------------------------------------------------------------------------------------------------------

    def roles(self) -> dict[str, Role]:
        c = self.config
        student = guided_student(self.teacher, c.guidance, c.dropout)
        roles = {"teacher": Role(self.teacher.denoiser), "student": Role(student, optim=c.optim)}
        if c.target_decay is not None:
            roles["target"] = Role(student.clone(), follows="student", decay=c.target_decay)
        for term in self._terms(AdversarialTerm):
            roles["discriminator"] = term.role(c.optim)
        return roles

    def steps(self) -> tuple[Step, ...]:
        peak = self.config.optim.lr
        student = Step("student", self.loss, lr_scale=lambda i: (self.stage(i).lr or peak) / peak)
        return student, *(term.step() for term in self._terms(AdversarialTerm))

    def scheduler(self) -> "SchedulerMixin":
        return self.teacher.samplers.renoise(self.config.steps, self.timestep_scaling)

    def allowed_steps(self) -> tuple[int, ...]:
        """With re-noising every grid timestep is valid."""
        return self.teacher.samplers.counts(self.config.steps)

    def prepare(self, at: Preparation) -> None:
        for stage in self.stages:
            stage.parts.states.prepare(at)
        for term in self._terms(RewardTerm):
            term.prepare(at)

    def state(self) -> dict[str, Tensor]:
        return {} if self.make.pool is None else self.make.pool.state_dict()

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        if self.make.pool is not None:
            self.make.pool.load_state_dict(tensors)

    def _terms(self, kind: type[Kind]) -> list[Kind]:
        """The terms of a kind, of all stages."""
        return [term for stage in self.stages for term in stage.parts.terms if isinstance(term, kind)]

    # The loss ---------------------------------------------------------------------------------------------------------

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
        """Consistency loss (Luo et al. 2023, eq. 16 with skipping): distance of f(x_t, t) to f_target(x_s, s).

        Args:
            index: positions in the grid; drawn if None. Shared trajectories have their own.
            noise: like x0, of x_t, or that a trajectory starts from; drawn if None.
            guidance_scale: 1 = none; drawn if None.
        """
        stage = self.stage(batch.iteration)
        parts = stage.parts
        with torch.no_grad():
            state = parts.states(nets, batch, Given(index, noise, guidance_scale))
        asked = [term.samples(nets, batch, state) for term in parts.terms]
        # The student's dropout, whether its teacher's, its adapters' or our key's: a target that is the student has it too.
        masks = random_state(batch.device) if parts.target.is_student else None
        student, samples = self._student(nets["student"], state.at, asked)
        with torch.no_grad():
            x_s, first = parts.target.reach(nets, batch, state)
            parts.states.move(state, first, x_s)
            target = parts.target(nets, state, x_s, masks)
        prediction = parts.endpoint(student, state.at.x, state.at.t, state.end)
        weight = parts.weight(state.at.t, state.s).to(prediction.dtype)
        logs = {"stage": torch.tensor(float(self.stages.index(stage)))} if len(self.stages) > 1 else {}
        output = StepOutput({"consistency": (weight * parts.distance(prediction, target)).mean()}, logs)
        for term, sample in zip(parts.terms, samples, strict=True):
            output = output | term(nets, batch, state, (prediction, target), sample)
        return output

    def _student(
        self, net: DenoiserLike, at: NoisyBatch, asked: list[NoisyBatch | None]
    ) -> tuple[Prediction, list[Prediction | None]]:
        """The student at the states, and at the samples that terms ask for; in one call, as distributed training needs it."""
        inputs = [at, *(more for more in asked if more is not None)]
        whole = NoisyBatch.cat(inputs).denoised(net, embeds(self.config.guidance))
        x0, eps = (v.split([len(part) for part in inputs]) for v in whole)
        own, *rest = (Prediction(*pair) for pair in zip(x0, eps, strict=True))
        remaining = iter(rest)
        return own, [None if more is None else next(remaining) for more in asked]
