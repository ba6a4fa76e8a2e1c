"""PixArt-alpha and PixArt-Sigma (Chen et al. 2023, 2024): a diffusion transformer on T5 prompts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fewstep.diffusion.shapes import Latents
from fewstep.teachers.base import Teacher
from fewstep.teachers.conditioner import Prompts, call_defaults
from fewstep.teachers.denoiser import Cond, Denoiser, Inputs
from fewstep.teachers.embeddings.transformer import TimeModules, time_input
from fewstep.teachers.families._transformer import TOKEN_FEATURES, TransformerStudents
from fewstep.teachers.guidance_contract import GUIDED_BY_DEFAULT
from fewstep.teachers.latents import Autoencoder, square_size
from fewstep.teachers.lora import ATTENTION, FEED_FORWARD
from fewstep.teachers.placement import Placement
from fewstep.teachers.samplers import DiscreteSamplers
from fewstep.teachers.schedulers import read_schedule, tcd_scheduler

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, PixArtTransformer2DModel

SIZED = 128
"""The `sample_size` of networks that PixArt-alpha's pipeline conditions on the image's size."""


def call(net: "PixArtTransformer2DModel", inputs: Inputs) -> Latents:
    """The network's output at latents [B, C, h, w], without the variance that it may predict behind it."""
    cond = inputs.cond
    output: Latents = net(
        inputs.x_t.to(net.dtype),
        encoder_hidden_states=cond["encoder_hidden_states"].to(net.dtype),
        encoder_attention_mask=cond["encoder_attention_mask"],
        timestep=time_input(net.adaln_single.emb, inputs.t, inputs),
        added_cond_kwargs={
            key: cond[key].to(net.dtype) if key in cond else None for key in ("resolution", "aspect_ratio")
        },
    ).sample
    return output[:, : inputs.x_t.shape[1]]


def time_modules(net: "PixArtTransformer2DModel") -> Sequence[TimeModules]:
    return [net.adaln_single.emb]


class PixArt(Teacher):
    """A PixArtAlphaPipeline or PixArtSigmaPipeline; unconditional is the empty prompt.

    Both guide by default, and nothing in a folder can stop them: a student's caller passes guidance_scale=1.
    """

    guidance = GUIDED_BY_DEFAULT

    def __init__(self, pipeline: "DiffusionPipeline") -> None:
        net, scheduler = pipeline.transformer, pipeline.scheduler
        self.sized = type(pipeline).__name__ == "PixArtAlphaPipeline" and net.config.sample_size == SIZED
        placement = Placement(pipeline, net, text_parts=("text_encoder",), image_parts=("vae",))
        kind = scheduler.config.prediction_type
        denoiser = Denoiser(net, call, read_schedule(scheduler), kind, TOKEN_FEATURES)
        side, image_size = square_size(net, pipeline)
        targets = (*ATTENTION, *FEED_FORWARD, "adaln_single.linear")
        super().__init__(
            denoiser,
            placement,
            conditioner=Prompts(placement, self._encode_prompts),
            codec=Autoencoder(placement, (net.config.in_channels, side, side), image_size),
            students=TransformerStudents(denoiser, placement, targets, time_modules),
            samplers=DiscreteSamplers(scheduler, tcd_scheduler),
        )

    def _encode_prompts(self, prompts: list[str]) -> Cond:
        defaults = call_defaults(self.pipeline, "clean_caption", "max_sequence_length")
        device = self.pipeline.text_encoder.device
        encoded, mask, _, _ = self.pipeline.encode_prompt(prompts, False, device=device, **defaults)
        cond = {"encoder_hidden_states": encoded, "encoder_attention_mask": mask}
        if self.sized:
            cond["resolution"] = encoded.new_full((len(prompts), 2), float(self.image_size), device=device)
            cond["aspect_ratio"] = encoded.new_ones(len(prompts), 1, device=device)
        return cond
