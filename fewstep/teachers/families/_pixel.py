"""Base of the families of pixel models with a UNet2DModel: checks of the network, and students without guidance."""

from typing import TYPE_CHECKING

from fewstep.teachers.denoiser import Denoiser, Scale
from fewstep.teachers.embeddings.unet import attach_progress, fold_progress
from fewstep.teachers.lora import plain_copy
from fewstep.teachers.students import Students

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin, UNet2DModel


def check_network(net: "UNet2DModel") -> None:
    """Raises ValueError for a network that is none of a denoiser of square images."""
    config = net.config
    if config.class_embed_type is not None:
        raise ValueError(f"the teacher's UNet2DModel has class_embed_type {config.class_embed_type!r}; supported: none")
    if config.in_channels != config.out_channels or config.in_channels not in (1, 3):
        raise ValueError(
            f"the teacher's UNet2DModel has {config.in_channels} channels in and {config.out_channels} out; "
            "supported: 1 or 3, and as many out as in (no learnt variance)"
        )
    if not isinstance(config.sample_size, int):
        raise ValueError(f"the teacher's sample_size is {config.sample_size}; only square images are supported")


class PixelStudents(Students):
    """Students of a network that has no guidance scale to embed.

    Their pipeline is DDPMPipeline, whose loop runs any stock scheduler; its default of 1000 steps raises with a few-step grid.
    """

    def new(self, guidance_embedding: bool = False, progress_embedding: bool = False) -> Denoiser:
        if guidance_embedding:
            raise ValueError("an unconditional UNet2DModel has no guidance to embed: switch the guidance embedding off")
        student = self.trainable()
        if progress_embedding:
            attach_progress(student.net)
        return student.learnable()

    def fold(self, student: Denoiser, guidance_scale: Scale | None = None) -> "UNet2DModel":
        if guidance_scale is not None:
            raise ValueError(f"guidance_scale is {guidance_scale}, but an unconditional student has no guidance")
        unet = plain_copy(student)
        fold_progress(unet)
        return unet

    def pipeline(
        self, student: Denoiser, scheduler: "SchedulerMixin", guidance_scale: Scale | None = None
    ) -> "DiffusionPipeline":
        return self.assembled(self.kind(), self.fold(student, guidance_scale), scheduler)

    def kind(self) -> "type[DiffusionPipeline]":
        """The class of a student's pipeline."""
        from diffusers import DDPMPipeline

        return DDPMPipeline
