"""Stable Diffusion XL (Podell et al. 2023): two text encoders, a pooled prompt, and the image's size as a condition."""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fewstep.teachers.denoiser import Call, Cond, Denoiser, Posterior, Scale
from fewstep.teachers.families import sd
from fewstep.teachers.families.sd import StableDiffusion, in_dtype
from fewstep.teachers.latents import decode_latents, encode_images
from fewstep.teachers.prompt_cache import repeated

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin


def call(
    net: Any, x_t: Tensor, t: Tensor, cond: Cond, guidance_scale: Tensor | None, progress: Tensor | None = None
) -> Tensor:
    """The UNet's output at x_t [B, C, h, w], t [B]; guidance_scale [B] if and only if the network embeds it."""
    added = {key: cond[key].to(net.dtype) for key in ("text_embeds", "time_ids")}
    return sd.call(net, x_t, t, cond, guidance_scale, progress, added_cond_kwargs=added)


class StableDiffusionXL(StableDiffusion):
    """A StableDiffusionXLPipeline. Unconditional is zeros where its force_zeros_for_empty_prompt says so, else "".

    Images are square, not cropped, and as large as the network wants them; that is what it is told of them.
    Raises ValueError for an autoencoder whose latents have a mean and deviation of their own.
    """

    text_parts = ("text_encoder", "text_encoder_2")
    call: Call = staticmethod(call)

    def __init__(self, pipeline: "DiffusionPipeline") -> None:
        super().__init__(pipeline)
        if pipeline.vae.config.get("latents_mean") is not None:
            raise ValueError("the teacher's VAE has a latents_mean; only those with a scaling_factor are supported")

    @property
    def vae(self) -> Any:
        """The autoencoder in a type that holds its activations: float32 where its config asks for that (force_upcast)."""
        own: Any = self.placement.part("vae")
        return self.placement.part_in_float32("vae") if own.config.force_upcast else own

    def encode(self, images: Tensor) -> Posterior:
        return encode_images(self.vae, images, self.image_size)

    def decode(self, x0: Tensor) -> Tensor:
        return decode_latents(self.vae, x0)

    def _encode_prompts(self, prompts: list[str]) -> Cond:
        device = self.pipeline.text_encoder_2.device
        encoded, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        # (height, width) of the original, top and left of its crop, (height, width) of what is wanted.
        ids = torch.tensor([self.image_size, self.image_size, 0, 0, self.image_size, self.image_size])
        ids = repeated(ids.to(device, encoded.dtype), len(prompts))
        return {"encoder_hidden_states": encoded, "text_embeds": pooled, "time_ids": ids}

    def null_condition(self, size: int) -> Cond:
        cond = self.condition([""] * size)
        if self.pipeline.config.force_zeros_for_empty_prompt:
            cond |= {key: torch.zeros_like(cond[key]) for key in ("encoder_hidden_states", "text_embeds")}
        return cond

    def student_pipeline(
        self, student: Denoiser, scheduler: "SchedulerMixin", guidance_scale: Scale | None = None
    ) -> "DiffusionPipeline":
        """StableDiffusionXLPipeline, which does not guide a UNet that embeds the guidance scale; every exported one does.

        A guidance_scale for a student without the embedding raises ValueError.
        """
        from diffusers import StableDiffusionXLPipeline

        return self._assembled(StableDiffusionXLPipeline, self._stock_unet(student, guidance_scale), scheduler)

    def guided_pipeline(self, student: Denoiser, scheduler: "SchedulerMixin") -> "DiffusionPipeline":
        from diffusers import StableDiffusionXLPipeline

        return self._assembled(StableDiffusionXLPipeline, self.folded(student).requires_grad_(False).eval(), scheduler)

    def _assembled(self, kind: Any, unet: Any, scheduler: "SchedulerMixin") -> "DiffusionPipeline":
        self.placement.recall(self.placement.parts)
        own = self.pipeline
        pipeline: DiffusionPipeline = kind(
            vae=in_dtype(own.vae, unet.dtype),
            text_encoder=in_dtype(own.text_encoder, unet.dtype),
            text_encoder_2=in_dtype(own.text_encoder_2, unet.dtype),
            tokenizer=own.tokenizer,
            tokenizer_2=own.tokenizer_2,
            unet=unet,
            scheduler=copy.deepcopy(scheduler),
            force_zeros_for_empty_prompt=own.config.force_zeros_for_empty_prompt,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline
