"""Networks that learn from a teacher, and the stock pipelines that they leave in."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from fewstep.config import LoraConfig
from fewstep.errors import FewstepError
from fewstep.teachers.denoiser import Denoiser, Scale
from fewstep.teachers.lora import adapted_modules, under_adapters
from fewstep.teachers.placement import NETWORKS, Placement, in_dtype

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin


@dataclass(frozen=True)
class StudentGuidance:
    """How an exported student is guided.

    Attributes:
        scale: guidance scale that is folded into a student with a guidance embedding, one number or one for each timestep;
            None leaves the embedding to the caller, or there is none.
        by_caller: whether the caller guides the student as its teacher, two evaluations a step and negative prompts included.
    """

    scale: Scale | None = None
    by_caller: bool = False


UNGUIDED = StudentGuidance()
"""Neither a scale to fold nor guidance by the caller."""


class Students(ABC):
    """Makes trainable networks out of a teacher's, and pipelines of diffusers out of those.

    Attributes:
        lora_targets: ends of the names of the linear and convolutional modules that adapters are for by default.
        lora: adapters under which networks learn, see `adapt`; None = whole copies learn.
    """

    lora: LoraConfig | None = None

    def __init__(self, denoiser: Denoiser, placement: Placement, lora_targets: Sequence[str]) -> None:
        self.denoiser, self.placement, self.lora_targets = denoiser, placement, tuple(lora_targets)

    def adapt(self, lora: LoraConfig) -> None:
        """From now on networks learn as the teacher's own weights, frozen, under adapters (Hu et al. 2021).

        Raises ValueError where `lora.targets` name no module of the network, or peft is not installed.
        """
        adapted_modules(self.denoiser.net, lora.targets or self.lora_targets)
        self.lora = lora

    def trainable(self) -> Denoiser:
        """A trainable network that starts as the teacher's: a copy; or, after `adapt`, its weights under adapters."""
        if self.lora is None:
            return self.denoiser.clone()
        return under_adapters(self.denoiser, self.lora, self.lora.targets or self.lora_targets)

    @abstractmethod
    def new(self, guidance_embedding: bool = False, progress_embedding: bool = False) -> Denoiser:
        """A student that starts as the teacher.

        If asked, with zero-initialised embeddings of the guidance scale, and of the progress of the target time, which
        `fold` makes part of the weights at 1. Raises ValueError where the network has no place for them.
        """

    @abstractmethod
    def fold(self, student: Denoiser, guidance_scale: Scale | None = None) -> nn.Module:
        """A frozen copy of the student's network as diffusers has it, adapters merged.

        Its inputs beside the time become part of the weights: the end of a segment and, where one is given, the guidance
        scale. Families whose stock pipelines pass no scale (`GuidanceContract.live`) raise ValueError for one a timestep.
        """

    @abstractmethod
    def pipeline(
        self, student: Denoiser, scheduler: "SchedulerMixin", guidance_scale: Scale | None = None
    ) -> "DiffusionPipeline":
        """The stock pipeline that samples `student` with one network evaluation a step and no guidance of its own.

        guidance_scale: for a network with a guidance embedding, the scale that is folded into its weights (a copy), or one
        for each timestep that is run, so that whatever the caller passes is ignored; None leaves the embedding live, as the
        caller's `guidance_scale`.
        """

    def stock_pipeline(
        self, student: Denoiser, scheduler: "SchedulerMixin", guidance: StudentGuidance = UNGUIDED
    ) -> "DiffusionPipeline":
        """The stock pipeline that a student is exported, pictured and scored in."""
        if guidance.by_caller:
            return self.guided_pipeline(student, scheduler)
        return self.pipeline(student, scheduler, guidance.scale)

    def guided_pipeline(self, student: Denoiser, scheduler: "SchedulerMixin") -> "DiffusionPipeline":
        """The stock pipeline that guides `student` as the caller asks, with two evaluations a step.

        Raises ValueError for a family that has none.
        """
        raise FewstepError(
            "method.null_share", "a number", "null for this teacher", "Only Stable Diffusion and SDXL keep guidance"
        )

    def assembled(
        self, kind: "type[DiffusionPipeline]", net: "ModelMixin", scheduler: "SchedulerMixin", **settings: object
    ) -> "DiffusionPipeline":
        """A pipeline of a network and a scheduler with the teacher's other parts, in the network's type.

        settings: arguments of the pipeline's class, which go before the teacher's parts.
        """
        self.placement.recall(self.placement.parts)
        own = self.placement.pipeline.components
        name = next(name for name in NETWORKS if name in own)
        changed = {name: net.requires_grad_(False).eval(), "scheduler": copy.deepcopy(scheduler)} | settings
        others = {key: part for key, part in own.items() if key not in changed}
        pipeline = kind(
            **changed, **{k: in_dtype(v, net.dtype) if isinstance(v, nn.Module) else v for k, v in others.items()}
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline
