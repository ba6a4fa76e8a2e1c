"""Base of the families of latent UNets, Stable Diffusion and SDXL: students that embed the guidance scale."""

from abc import abstractmethod
from typing import TYPE_CHECKING

from fewstep.diffusion.shapes import Latents
from fewstep.errors import FewstepError
from fewstep.teachers.denoiser import Denoiser, Inputs, Scale
from fewstep.teachers.embeddings.unet import (
    attach_guidance,
    attach_progress,
    fold_guidance,
    fold_progress,
    guidance_embedding,
    with_guidance_embedding,
)
from fewstep.teachers.lora import plain_copy
from fewstep.teachers.students import Students

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
    from torch import Tensor


def call_unet(
    net: "UNet2DConditionModel", inputs: Inputs, added_cond_kwargs: "dict[str, Tensor] | None" = None
) -> Latents:
    """The UNet's output at latents [B, C, h, w]; it takes a guidance_scale if and only if it embeds one."""
    dim, dtype, scale = net.config.time_cond_proj_dim, net.dtype, inputs.guidance_scale
    if (dim is None) != (scale is None):
        given = "none" if scale is None else "one"
        raise ValueError(f"guidance_scale: found {given}; expected {'none' if dim is None else 'one'} for this network")
    output: Latents = net(
        inputs.x_t.to(dtype),
        inputs.t,
        encoder_hidden_states=inputs.cond["encoder_hidden_states"].to(dtype),
        timestep_cond=None if scale is None else guidance_embedding(scale, dim).to(dtype),
        class_labels=inputs.progress,
        added_cond_kwargs=added_cond_kwargs,
    ).sample
    return output


class UNetStudents(Students):
    """Students whose stock pipelines take the guidance scale that the network embeds, and pass it on.

    Those pipelines switch classifier-free guidance off for a UNet that embeds the guidance scale, so every exported UNet
    does, if only with zeros. A guidance_scale for a student without the embedding raises ValueError.
    """

    def new(self, guidance_embedding: bool = False, progress_embedding: bool = False) -> Denoiser:
        if guidance_embedding and self.lora is None:
            student = self.denoiser.with_net(with_guidance_embedding(self.denoiser.net))
        else:
            student = self.trainable()
            if guidance_embedding:
                attach_guidance(student.net)
        if progress_embedding:
            attach_progress(student.net)
        return student.learnable()

    def fold(self, student: Denoiser, guidance_scale: Scale | None = None) -> "UNet2DConditionModel":
        unet = plain_copy(student)
        fold_progress(unet)
        embeds = unet.config.time_cond_proj_dim is not None
        if guidance_scale is not None and not embeds:
            raise FewstepError("guidance_scale", guidance_scale, "null, for the student embeds no guidance")
        if guidance_scale is not None:
            fold_guidance(unet, guidance_scale)
        return unet

    def pipeline(
        self, student: Denoiser, scheduler: "SchedulerMixin", guidance_scale: Scale | None = None
    ) -> "DiffusionPipeline":
        unet = self.fold(student, guidance_scale)
        if unet.config.time_cond_proj_dim is None:
            unet = with_guidance_embedding(unet)
        return self.assembled(self.kind(scheduler), unet, scheduler, **self.settings())

    def guided_pipeline(self, student: Denoiser, scheduler: "SchedulerMixin") -> "DiffusionPipeline":
        return self.assembled(type(self.placement.pipeline), self.fold(student), scheduler, **self.settings())

    @abstractmethod
    def kind(self, scheduler: "SchedulerMixin") -> "type[DiffusionPipeline]":
        """The class of a student's pipeline with this scheduler."""

    @abstractmethod
    def settings(self) -> dict[str, object]:
        """Arguments of the pipeline's class that are not the teacher's parts."""


def check_no_student(unet: "UNet2DConditionModel") -> None:
    """Raises ValueError for a UNet that embeds the guidance scale."""
    if unet.config.time_cond_proj_dim is not None:
        raise FewstepError(
            "teacher", "a UNet that embeds the guidance scale (time_cond_proj_dim)", "a teacher, not a student"
        )
