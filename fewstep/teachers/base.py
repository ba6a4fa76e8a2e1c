"""A teacher is a diffusers pipeline; a denoiser is any network of its kind.

A new pipeline family is one subclass of Teacher in a file of its own. Methods see nothing but what stands here.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fewstep.config import LoraConfig
from fewstep.diffusion.schedule import Schedule
from fewstep.teachers.denoiser import Cond, Denoiser, Posterior, Scale
from fewstep.teachers.guidance_contract import GuidanceContract
from fewstep.teachers.placement import Placement
from fewstep.teachers.samplers import Samplers
from fewstep.teachers.students import Students

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

    from fewstep.teachers.prompt_cache import PromptCache


class Teacher(ABC):
    """A pretrained pipeline behind one interface.

    Attributes:
        pipeline: the diffusers pipeline, frozen.
        denoiser: its network, frozen and in eval mode.
        schedule: alpha and sigma at its timesteps.
        num_train_timesteps: the timesteps are 0 ... num_train_timesteps - 1; what the network is told of them is `call`'s.
        latent_shape: shape of one x0, without the batch: (C, h, w).
        image_size: side of a decoded image in pixels.
        conditions: "prompt", "label" or "none": what `condition` wants.
        text_parts: names of the pipeline's networks that turn prompts into conditions; some of them may be None in it.
        image_parts: of those that turn images into latents and back.
        prompts: what keeps conditions of prompts; None for teachers without prompts.
        lora_targets: ends of the names of the linear and convolutional modules that adapters are for by default.
        lora: adapters under which networks learn, see `adapt`; None = whole copies learn.
        guidance: who guides its students, and how their pipelines are called.
        students: networks that learn from it, and the pipelines that they leave in.
        samplers: stock schedulers for students, and their grids.
        placement: where the pipeline's networks are.
    """

    pipeline: "DiffusionPipeline"
    denoiser: Denoiser
    schedule: Schedule
    num_train_timesteps: int
    latent_shape: tuple[int, ...]
    image_size: int
    conditions: str
    guidance: GuidanceContract
    text_parts: tuple[str, ...] = ()
    image_parts: tuple[str, ...] = ()
    prompts: "PromptCache | None" = None
    lora_targets: tuple[str, ...]
    lora: LoraConfig | None = None

    @cached_property
    def students(self) -> Students:
        return Students(self)

    @cached_property
    def samplers(self) -> Samplers:
        return Samplers(self)

    @cached_property
    def placement(self) -> Placement:
        return Placement(self.pipeline, self.denoiser.net, self.text_parts, self.image_parts)

    @abstractmethod
    def encode(self, images: Tensor) -> Posterior:
        """Images [B, 3, H, W] in [-1, 1] to latents, scaled as the denoiser wants them; H = W = image_size."""

    @abstractmethod
    def decode(self, x0: Tensor) -> Tensor:
        """Latents [B, C, h, w] to images [B, 3, H, W], about [-1, 1]; differentiable."""

    @abstractmethod
    def condition(self, raw: Sequence[Any]) -> Cond:
        """B prompts, labels or Nones to the network's conditions. Equal prompts are encoded once."""

    def negative(self, prompt: str) -> str:
        """What `condition` has to be given for a prompt that guidance leads away from; "" is for unconditional.

        The prompt itself, but for pipelines that encode the two kinds differently.
        """
        return prompt

    @abstractmethod
    def null_condition(self, size: int) -> Cond:
        """What classifier-free guidance calls unconditional, for `size` samples."""

    def error_weight(self, t: Tensor) -> Tensor:
        """Weight [B], in the network's own training, of the squared error of what its denoiser predicts, at t [B]."""
        return torch.ones(t.shape, device=t.device)

    def adapt(self, lora: LoraConfig) -> None:
        """From now on `learner` and `student` give the teacher's own weights, frozen, under adapters (Hu et al. 2021).

        Raises ValueError where `lora.targets` name no module of the network, or peft is not installed.
        """
        from fewstep.teachers.lora import adapted_modules

        adapted_modules(self.denoiser.net, lora.targets or self.lora_targets)
        self.lora = lora

    def learner(self) -> Denoiser:
        """A trainable network that starts as the teacher's: a copy; or, after `adapt`, its weights under adapters."""
        if self.lora is None:
            return self.denoiser.clone()
        from fewstep.teachers.lora import under_adapters

        return under_adapters(self.denoiser, self.lora, self.lora.targets or self.lora_targets)

    @abstractmethod
    def student(self, guidance_embedding: bool = False, progress_embedding: bool = False) -> Denoiser:
        """A trainable network that starts as the teacher's.

        If asked, with zero-initialised embeddings of the guidance scale, and of the progress of the target time, which
        `student_pipeline` folds into the weights at 1. Raises ValueError where the network has no place for them.
        """

    @abstractmethod
    def feature_module(self, denoiser: Denoiser) -> nn.Module:
        """The module in the middle of the network on whose output, by `Denoiser.feature_map`, a discriminator listens."""

    @abstractmethod
    def renoise_scheduler(
        self, steps: int, timestep_scaling: float = 10.0, spacing: int | None = None
    ) -> "SchedulerMixin":
        """The stock scheduler that predicts x0 and re-noises it, on an even grid of `steps` timesteps.

        spacing: distance of the timesteps, also of the last one from clean data; None spreads them over all of the
            teacher's, which steps has to divide.

        Asked for one of `renoise_counts`, it runs so many of those timesteps; asked for more, it raises if it can.
        """

    @abstractmethod
    def renoise_counts(self, steps: int) -> tuple[int, ...]:
        """The counts 1 ... steps for which the pipeline with `renoise_scheduler(steps)` runs timesteps of that grid only."""

    @abstractmethod
    def jump_scheduler(self, steps: int) -> "SchedulerMixin":
        """The stock scheduler that takes `steps` deterministic steps of the ODE (DDIM, Euler), each to the next timestep."""

    @abstractmethod
    def jump_grid(self, scheduler: "SchedulerMixin", steps: int) -> Tensor:
        """The timesteps at which `scheduler`, of either kind, evaluates the network in `steps` steps, and where its last
        step ends: [steps + 1], whole numbers unless the pipeline's are not.

        -1 stands for clean data, as everywhere.
        """

    @abstractmethod
    def folded(self, student: Denoiser, guidance_scale: Scale | None = None) -> nn.Module:
        """A frozen copy of the student's network as diffusers has it, adapters merged.

        What the student is told beside the time is part of its weights: the end of a segment and, where one is given, the
        guidance scale. Families whose stock pipelines pass no scale (`live_guidance`) raise ValueError for one a timestep.
        """

    @abstractmethod
    def student_pipeline(
        self, student: Denoiser, scheduler: "SchedulerMixin", guidance_scale: Scale | None = None
    ) -> "DiffusionPipeline":
        """The stock pipeline that samples `student` with one network evaluation a step and no guidance of its own.

        guidance_scale: for a network with a guidance embedding, the scale that is folded into its weights (a copy), or one
        for each timestep that is run, so that whatever the caller passes is ignored; None leaves the embedding live, as the
        caller's `guidance_scale`.
        """

    def guided_pipeline(self, student: Denoiser, scheduler: "SchedulerMixin") -> "DiffusionPipeline":
        """The stock pipeline that guides `student` as the caller asks, with two evaluations a step.

        Raises ValueError for a family that has none.
        """
        raise ValueError("method.keep_guidance: for Stable Diffusion and SDXL only; set it to false")
