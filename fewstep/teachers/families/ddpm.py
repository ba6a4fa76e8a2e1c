"""Unconditional pixel models: DDPMPipeline and DDIMPipeline with a UNet2DModel (Ho et al. 2020, Song et al. 2021)."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fewstep.teachers.base import Teacher
from fewstep.teachers.denoiser import Cond, Denoiser, Posterior, Scale
from fewstep.teachers.embeddings.unet import attach_progress, fold_progress
from fewstep.teachers.guidance_contract import GuidanceContract
from fewstep.teachers.lora import FEED_FORWARD, UNET, plain_copy
from fewstep.teachers.schedulers import DiscreteGrids, deterministic_scheduler, read_schedule

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin


def call(
    net: Any, x_t: Tensor, t: Tensor, cond: Cond, guidance_scale: Tensor | None, progress: Tensor | None = None
) -> Tensor:
    """The UNet's output at x_t [B, C, H, W], t [B]. Raises ValueError for a guidance_scale, which it cannot embed."""
    if guidance_scale is not None:
        raise ValueError("an unconditional UNet2DModel takes no guidance_scale")
    return net(x_t.to(net.dtype), t, class_labels=progress).sample


def check_network(config: Any) -> None:
    """Raises ValueError for a UNet2DModel's config that is none of a denoiser of square images."""
    if config.class_embed_type is not None:
        raise ValueError(f"the teacher's UNet2DModel has class_embed_type {config.class_embed_type!r}; supported: none")
    if config.in_channels != config.out_channels or config.in_channels not in (1, 3):
        raise ValueError(
            f"the teacher's UNet2DModel has {config.in_channels} channels in and {config.out_channels} out; "
            "supported: 1 or 3, and as many out as in (no learnt variance)"
        )
    if not isinstance(config.sample_size, int):
        raise ValueError(f"the teacher's sample_size is {config.sample_size}; only square images are supported")


class Pixel(DiscreteGrids, Teacher):
    """A DDPMPipeline or DDIMPipeline. x0 is the image itself; one-channel models see the mean over colours.

    Raises ValueError for class-conditional networks, for those that also predict a variance, and for epsilon with zero
    terminal SNR.
    """

    conditions = "none"
    guidance = GuidanceContract(guidable=False)
    lora_targets = tuple(name for name in UNET if name not in (*FEED_FORWARD, "proj_in", "proj_out"))

    def __init__(self, pipeline: "DiffusionPipeline") -> None:
        config = pipeline.unet.config
        if config.num_class_embeds is not None:
            raise ValueError(
                "the teacher's UNet2DModel is class-conditional; only unconditional ones are supported in its pipeline"
            )
        check_network(config)
        pipeline.unet.requires_grad_(False).eval()
        self.pipeline = pipeline
        self.schedule = read_schedule(pipeline.scheduler)
        self.num_train_timesteps = pipeline.scheduler.config.num_train_timesteps
        self.denoiser = Denoiser(pipeline.unet, call, self.schedule, pipeline.scheduler.config.prediction_type)
        self.image_size = config.sample_size
        self.latent_shape = (config.in_channels, config.sample_size, config.sample_size)

    def encode(self, images: Tensor) -> Posterior:
        expected = (3, self.image_size, self.image_size)
        if tuple(images.shape[1:]) != expected:
            raise ValueError(f"images are {tuple(images.shape[1:])}; the teacher takes {expected}")
        x0 = images.float()
        if self.latent_shape[0] == 1:
            x0 = x0.mean(1, keepdim=True)
        return Posterior(x0, torch.zeros_like(x0))

    def decode(self, x0: Tensor) -> Tensor:
        x0 = x0.float()
        return x0.expand(-1, 3, -1, -1) if self.latent_shape[0] == 1 else x0

    def condition(self, raw: Sequence[Any]) -> Cond:
        return {}

    def null_condition(self, size: int) -> Cond:
        return {}

    def student(self, guidance_embedding: bool = False, progress_embedding: bool = False) -> Denoiser:
        if guidance_embedding:
            raise ValueError("an unconditional UNet2DModel has no guidance to embed: switch the guidance embedding off")
        student = self.learner()
        if progress_embedding:
            attach_progress(student.net)
        return student.learnable()

    def feature_module(self, denoiser: Denoiser) -> nn.Module:
        return denoiser.net.get_submodule("mid_block")

    def jump_scheduler(self, steps: int) -> "SchedulerMixin":
        return deterministic_scheduler(self.pipeline.scheduler, steps)

    def folded(self, student: Denoiser, guidance_scale: Scale | None = None) -> Any:
        if guidance_scale is not None:
            raise ValueError(f"guidance_scale is {guidance_scale}, but an unconditional student has no guidance")
        unet = plain_copy(student)
        fold_progress(unet)
        return unet

    def student_pipeline(
        self, student: Denoiser, scheduler: "SchedulerMixin", guidance_scale: Scale | None = None
    ) -> "DiffusionPipeline":
        """DDPMPipeline, whose loop runs any stock scheduler; its default of 1000 steps raises with a few-step grid."""
        from diffusers import DDPMPipeline

        pipeline = DDPMPipeline(unet=self.folded(student, guidance_scale), scheduler=copy.deepcopy(scheduler))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline
