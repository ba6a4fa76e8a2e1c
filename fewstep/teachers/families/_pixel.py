"""Base of the families of pixel models with a UNet2DModel: checks of the network, and students without guidance."""

from typing import TYPE_CHECKING

from fewstep.errors import FewstepError
from fewstep.teachers.denoiser import Denoiser, Scale
from fewstep.teachers.embeddings.unet import attach_progress, fold_progress
from fewstep.teachers.lora import plain_copy
from fewstep.teachers.students import Students

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin, UNet2DModel


def check_network(net: "UNet2DModel") -> None:
    """Raises ValueError for a UNet2DModel that is not a denoiser of square images."""
    config = net.config
    if config.class_embed_type is not None:
        raise FewstepError("teacher", f"a UNet2DModel with class_embed_type {config.class_embed_type!r}", "none")
    if config.in_channels != config.out_channels or config.in_channels not in (1, 3):
        raise FewstepError(
            "teacher",
            f"a UNet2DModel with {config.in_channels} input and {config.out_channels} output channels",
            "1 or 3 of both (no learnt variance)",
        )
    if not isinstance(config.sample_size, int):
        raise FewstepError("teacher", f"sample_size {config.sample_size}", "one number: square images")


class PixelStudents(Students):
    """Students of a network that has no guidance scale to embed.

    Their pipeline is DDPMPipeline, whose loop runs any stock scheduler; its default of 1000 steps raises with a few-step grid.
    """

    def new(self, guidance_embedding: bool = False, progress_embedding: bool = False) -> Denoiser:
        if guidance_embedding:
            raise FewstepError(
                "guidance", "an embedding for an unconditional UNet2DModel", "none", "Set method.guidance to null"
            )
        student = self.trainable()
        if progress_embedding:
            attach_progress(student.net)
        return student.learnable()

    def fold(self, student: Denoiser, guidance_scale: Scale | None = None) -> "UNet2DModel":
        if guidance_scale is not None:
            raise FewstepError("guidance_scale", guidance_scale, "null, for an unconditional student has no guidance")
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
