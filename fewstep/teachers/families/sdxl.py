"""Stable Diffusion XL (Podell et al. 2023): two text encoders, a pooled prompt, and the image's size as a condition."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from fewstep.diffusion.shapes import Latents
from fewstep.errors import FewstepError
from fewstep.teachers.base import Teacher
from fewstep.teachers.conditioner import Prompts
from fewstep.teachers.denoiser import Cond, Denoiser, Inputs
from fewstep.teachers.families._unet import UNetStudents, call_unet, check_no_student
from fewstep.teachers.guidance_contract import GuidanceContract
from fewstep.teachers.latents import Autoencoder, square_size
from fewstep.teachers.lora import UNET
from fewstep.teachers.placement import Placement
from fewstep.teachers.samplers import DiscreteSamplers
from fewstep.teachers.schedulers import read_schedule, tcd_scheduler

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin, UNet2DConditionModel


def call(net: "UNet2DConditionModel", inputs: Inputs) -> Latents:
    """The UNet's output, given the pooled prompt and the size, too."""
    added = {key: inputs.cond[key].to(net.dtype) for key in ("text_embeds", "time_ids")}
    return call_unet(net, inputs, added)


class XLPrompts(Prompts):
    """Prompts; unconditional is zeros where the pipeline's force_zeros_for_empty_prompt says so."""

    def __init__(self, placement: Placement, encode: Callable[[list[str]], Cond]) -> None:
        super().__init__(placement, encode)
        self.force_zeros: bool = placement.pipeline.config.force_zeros_for_empty_prompt

    def null(self, size: int) -> Cond:
        cond = super().null(size)
        if self.force_zeros:
            cond |= {key: torch.zeros_like(cond[key]) for key in ("encoder_hidden_states", "text_embeds")}
        return cond


class XLStudents(UNetStudents):
    """StableDiffusionXLPipeline, which does not guide a UNet that embeds the guidance scale."""

    def kind(self, scheduler: "SchedulerMixin") -> "type[DiffusionPipeline]":
        return type(self.placement.pipeline)

    def settings(self) -> dict[str, object]:
        zeros = self.placement.pipeline.config.force_zeros_for_empty_prompt
        return {"force_zeros_for_empty_prompt": zeros, "feature_extractor": None, "image_encoder": None}


class StableDiffusionXL(Teacher):
    """A StableDiffusionXLPipeline. Unconditional is zeros where its force_zeros_for_empty_prompt says so, otherwise "".

    Images are square, not cropped, and as large as the network wants them; that is the size it is conditioned on.
    Raises ValueError for an autoencoder whose latents have a mean and deviation of their own.
    """

    guidance = GuidanceContract(live=True, scale_to_pass_with_adapters=1.0)

    def __init__(self, pipeline: "DiffusionPipeline") -> None:
        unet, scheduler = pipeline.unet, pipeline.scheduler
        check_no_student(unet)
        if pipeline.vae.config.get("latents_mean") is not None:
            raise FewstepError("teacher", "a VAE with latents_mean", "one with scaling_factor alone")
        placement = Placement(pipeline, unet, text_parts=("text_encoder", "text_encoder_2"), image_parts=("vae",))
        denoiser = Denoiser(unet, call, read_schedule(scheduler), scheduler.config.prediction_type)
        side, image_size = square_size(unet, pipeline)
        super().__init__(
            denoiser,
            placement,
            conditioner=XLPrompts(placement, self._encode_prompts),
            codec=Autoencoder(placement, (unet.config.in_channels, side, side), image_size, upcast=True),
            students=XLStudents(denoiser, placement, UNET),
            samplers=DiscreteSamplers(scheduler, tcd_scheduler),
        )

    def _encode_prompts(self, prompts: list[str]) -> Cond:
        device = self.pipeline.text_encoder_2.device
        encoded, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        # (height, width) of the original, top and left of its crop, (height, width) of the image.
        ids = torch.tensor([self.image_size, self.image_size, 0, 0, self.image_size, self.image_size])
        ids = ids.to(device, encoded.dtype)[None].expand(len(prompts), -1).contiguous()
        return {"encoder_hidden_states": encoded, "text_embeds": pooled, "time_ids": ids}
