"""A teacher is a diffusers pipeline; a denoiser is any network of its kind.

A new pipeline family is one subclass of Teacher in a file of its own. Methods see nothing but what stands here.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fewstep.config import LoraConfig
from fewstep.diffusion.schedule import Prediction, PredictionType, Schedule, read
from fewstep.teachers.placement import Parts

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

    from fewstep.teachers.prompt_cache import PromptCache

Cond = dict[str, Tensor]
"""Keyword arguments of the network beside sample and timestep, each batched: [B, ...]."""
Scale = float | Mapping[int, float]
"""A guidance scale (1 = none); or one for each timestep at which a student is evaluated."""


class Call(Protocol):
    """A family's calling convention: (net, x_t, t, cond, guidance_scale, progress) -> raw network output, shaped as x_t."""

    def __call__(
        self,
        net: nn.Module,
        x_t: Tensor,
        t: Tensor,
        cond: Cond,
        guidance_scale: Tensor | None,
        progress: Tensor | None = None,
    ) -> Tensor: ...


FeatureMap = Callable[[Any], Tensor]
"""What a block of the network returns, as a map [B, C, h, w]."""


def first_output(output: Any) -> Tensor:
    """The feature map of a UNet's block."""
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


def tokens_as_map(tokens: Tensor) -> Tensor:
    """Tokens [B, h h, C] of a square image, row by row, as a map [B, C, h, h]."""
    side = round(tokens.shape[1] ** 0.5)
    return tokens.transpose(1, 2).unflatten(2, (side, side))


class Posterior(NamedTuple):
    """What an image is in the teacher's latent space: x0 = mean + std * noise, each [B, C, h, w]; std is 0 for pixels."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        return self.mean + self.std * noise


class Denoiser(nn.Module):
    """A network of the teacher's kind: (x_t [B, ...], t [B], cond) -> Prediction in float32.

    `guidance_scale` [B] (1 = none) goes to networks that embed it, `progress` [B] of the target time in its segment, in
    [0, 1], to those that embed that; the others must be given None.

    Attributes:
        shared: the tensors that `net` has in common with another network, which owns them; usually none.
        compiled: whether `net` runs compiled.
    """

    shared: tuple[Tensor, ...] = ()
    compiled: bool = False

    def __init__(
        self,
        net: nn.Module,
        call: Call,
        schedule: Schedule,
        prediction_type: PredictionType,
        feature_map: FeatureMap = first_output,
    ) -> None:
        super().__init__()
        self.net, self.call, self.schedule, self.prediction_type = net, call, schedule, prediction_type
        self.feature_map = feature_map

    def compile_net(self) -> None:
        """Let the network run compiled from its next call on."""
        # nn.Module.compile works in place: the network's class, names and copies stay plain.
        self.net.compile()
        self.compiled = True

    def eagerly(self) -> AbstractContextManager[Any]:
        """Where the network runs as written, so that hooks on its modules are called."""
        return torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()

    def with_net(self, net: nn.Module) -> "Denoiser":
        """The same reading of another network."""
        return Denoiser(net, self.call, self.schedule, self.prediction_type, self.feature_map)

    def forward(
        self, x_t: Tensor, t: Tensor, cond: Cond, guidance_scale: Tensor | None = None, progress: Tensor | None = None
    ) -> Prediction:
        output = self.call(self.net, x_t, t, cond, guidance_scale, progress)
        return read(self.schedule, self.prediction_type, output, x_t, t)

    def clone(self) -> "Denoiser":
        """A trainable copy; `call`, `schedule` and the tensors that are `shared` stay shared, weights do not."""
        copied = self.with_net(copy.deepcopy(self.net, {id(tensor): tensor for tensor in self.shared}))
        copied.shared = self.shared
        return copied.learnable()

    def learnable(self) -> "Denoiser":
        """Itself in training mode; what is its own is in float32 and takes gradients, what it shares is left as it is."""
        shared = {id(tensor) for tensor in self.shared}
        for parameter in self.parameters():
            if id(parameter) not in shared:
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        return self.train()


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, but for those that the denoisers in `module` share with another network."""
    shared = {id(tensor) for part in module.modules() if isinstance(part, Denoiser) for tensor in part.shared}
    return {name: v for name, v in module.state_dict(keep_vars=True).items() if id(v) not in shared}


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
        guidable: whether the network has an unconditional answer, away from which to guide.
        call_guidance_scale: the `guidance_scale` that a caller of a student's pipeline has to pass, where its class would
            guide by default and nothing in the folder can stop it; None where nothing has to be passed.
        plain_guidance_scale: the same for the teacher's own pipeline with adapters in it, and with its scheduler replaced.
        live_guidance: whether that pipeline can pass a guidance scale on to a student that embeds it.
        text_parts: names of the pipeline's networks that turn prompts into conditions; some of them may be None in it.
        image_parts: of those that turn images into latents and back.
        prompts: what keeps conditions of prompts; None for teachers without prompts.
        lora_targets: ends of the names of the linear and convolutional modules that adapters are for by default.
        lora: adapters under which networks learn, see `adapt`; None = whole copies learn.
        visited: the device that the network's layers visit, see `offload`; None = the network stays where it is.
    """

    pipeline: "DiffusionPipeline"
    denoiser: Denoiser
    schedule: Schedule
    num_train_timesteps: int
    latent_shape: tuple[int, ...]
    image_size: int
    conditions: str
    guidable: bool = True
    call_guidance_scale: float | None
    plain_guidance_scale: float | None
    live_guidance: bool
    text_parts: tuple[str, ...] = ()
    image_parts: tuple[str, ...] = ()
    prompts: "PromptCache | None" = None
    lora_targets: tuple[str, ...]
    lora: LoraConfig | None = None
    visited: torch.device | None = None

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

    def to(self, device: torch.device, dtype: torch.dtype) -> "Teacher":
        """Move the frozen pipeline, but for parts that are away; the denoiser follows."""
        # A type it has already is not asked for: diffusers would warn of layers that it keeps in float32, and name none.
        self.pipeline.to(device=device, dtype=None if self.pipeline.dtype == dtype else dtype)
        return self

    @property
    def device(self) -> torch.device:
        """Where the denoiser runs, and conditions and latents with it."""
        return self.visited or next(self.denoiser.parameters()).device

    def offload(self) -> None:
        """The network's weights leave for main memory; each layer's come back, where the network was, while it is called.

        Gradients may pass through it: what a backward pass needs stays there until it is over.
        """
        from accelerate import cpu_offload

        self.visited = self.device
        cpu_offload(self.denoiser.net, self.visited)

    def settle(self) -> None:
        """The network's weights, if they are away, come back to stay."""
        from accelerate.hooks import remove_hook_from_submodules

        if self.visited is not None:
            remove_hook_from_submodules(self.denoiser.net)
            self.visited = None

    @cached_property
    def parts(self) -> Parts:
        """Which of `text_parts` and `image_parts` are away."""
        return Parts(self.pipeline)

    def part(self, name: str) -> Any:
        """A part of the pipeline, brought back if it was away."""
        self.recall((name,))
        return self.pipeline.components[name]

    def release(self, names: Sequence[str]) -> None:
        """Parts that nothing will call for a while leave the device, and main memory where they can be loaded again.

        `condition`, `encode`, `decode` and `student_pipeline` bring back what they need, to stay. Whoever calls the pipeline
        itself does so within `whole`.
        """
        self.parts.release(names)

    def recall(self, names: Sequence[str]) -> None:
        """Those of these parts that are away return to the denoiser's device and dtype."""
        self.parts.recall(names, self.device, next(self.denoiser.parameters()).dtype)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """The pipeline has all of its parts within the block; those that were away leave again after it."""
        away, lent = tuple(self.parts.away), self.visited is not None
        self.settle()
        self.recall(away)
        try:
            yield
        finally:
            self.release(away)
            if lent:
                self.offload()
