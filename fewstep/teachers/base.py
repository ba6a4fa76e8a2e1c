"""A teacher: the facts of a pretrained pipeline, and the services that depend on its family."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fewstep.diffusion.shapes import Images, Latents, PerSample, Times
from fewstep.teachers.conditioner import Conditioner
from fewstep.teachers.denoiser import Cond, Denoiser, Posterior
from fewstep.teachers.guidance_contract import GuidanceContract
from fewstep.teachers.latents import Codec
from fewstep.teachers.placement import Placement
from fewstep.teachers.prompt_cache import PromptCache
from fewstep.teachers.samplers import Samplers
from fewstep.teachers.students import Students

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class Teacher:
    """A pretrained pipeline behind one interface. A family is a subclass whose constructor chooses the parts below.

    Attributes:
        denoiser: the pipeline's network, frozen and in eval mode.
        schedule: alpha and sigma at its timesteps.
        num_train_timesteps: the timesteps are 0 ... num_train_timesteps - 1; the family's `Call` converts them for the network.
        conditions: "prompt", "label" or "none": what `condition` takes.
        latent_shape: shape of one x0, without the batch: (C, h, w).
        image_size: side of a decoded image in pixels.
        guidance: who guides its students, and how their pipelines are called.
        students: networks that learn from it, and the pipelines that they leave in.
        samplers: stock schedulers for students, and the timesteps that they run.
        placement: where the pipeline's networks are.
    """

    guidance: GuidanceContract

    def __init__(
        self,
        denoiser: Denoiser,
        placement: Placement,
        *,
        conditioner: Conditioner,
        codec: Codec,
        students: Students,
        samplers: Samplers,
    ) -> None:
        self.denoiser, self.schedule, self.placement = denoiser, denoiser.schedule, placement
        self.num_train_timesteps: int = placement.pipeline.scheduler.config.num_train_timesteps
        self.conditioner, self.codec = conditioner, codec
        self.students, self.samplers = students, samplers
        self.conditions = conditioner.kind
        self.latent_shape, self.image_size = codec.latent_shape, codec.image_size

    @property
    def pipeline(self) -> "DiffusionPipeline":
        """The diffusers pipeline, frozen; some of its parts may be away, see `Placement.whole`."""
        return self.placement.pipeline

    @property
    def prompts(self) -> PromptCache | None:
        """The cache of the conditions of prompts; None for teachers without prompts."""
        return self.conditioner.cache

    def encode(self, images: Images) -> Posterior:
        """Images in [-1, 1] to latents, scaled as the denoiser wants them; H = W = image_size."""
        return self.codec.encode(images)

    def decode(self, x0: Latents) -> Images:
        """Latents to images, about [-1, 1]; differentiable."""
        return self.codec.decode(x0)

    def condition(self, raw: Sequence[object]) -> Cond:
        """B prompts, labels or Nones to the network's conditions. Equal prompts are encoded once."""
        return self.conditioner(raw)

    def null_condition(self, size: int) -> Cond:
        """Unconditional conditions of classifier-free guidance, for `size` samples."""
        return self.conditioner.null(size)

    def negative(self, prompt: str) -> str:
        """The argument of `condition` for a negative prompt; "" is for unconditional."""
        return self.conditioner.negative(prompt)

    def error_weight(self, t: Times) -> PerSample:
        """Weight, in the network's own training, of the squared error of what its denoiser predicts, at t."""
        return torch.ones(t.shape, device=t.device)
