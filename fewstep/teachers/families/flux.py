"""Flux (Black Forest Labs 2024): a rectified flow on 2 x 2 patches of latents, which embeds its guidance scale."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fewstep.diffusion.schedule import ShiftedFlow
from fewstep.diffusion.shapes import Latents, Tokens
from fewstep.teachers.base import Teacher
from fewstep.teachers.conditioner import Prompts, call_defaults
from fewstep.teachers.denoiser import Cond, Denoiser, Inputs, Scale
from fewstep.teachers.embeddings.transformer import time_input
from fewstep.teachers.families._flow import JOINT_BLOCK, JOINT_FEATURES, flow_schedule, network_time, time_modules
from fewstep.teachers.families._transformer import TransformerStudents
from fewstep.teachers.flow_schedulers import shifted_scheduler
from fewstep.teachers.guidance_contract import GuidanceContract
from fewstep.teachers.latents import Autoencoder
from fewstep.teachers.placement import Placement
from fewstep.teachers.samplers import FlowSamplers

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, FluxTransformer2DModel, SchedulerMixin


@dataclass(frozen=True)
class FluxCall:
    """FluxTransformer2DModel at latents [B, C, h, w], packed into patches, with the positions of text and image."""

    schedule: ShiftedFlow

    def __call__(self, net: "FluxTransformer2DModel", inputs: Inputs) -> Latents:
        x_t, cond = inputs.x_t, inputs.cond
        hidden = cond["encoder_hidden_states"].to(net.dtype)
        packed = net(
            hidden_states=pack(x_t).to(net.dtype),
            # The network takes a thousandth of the time, and multiplies it by a thousand.
            timestep=time_input(net.time_text_embed, network_time(self.schedule, inputs.t), inputs) / 1000,
            guidance=cond.get("guidance"),
            encoder_hidden_states=hidden,
            pooled_projections=cond["pooled_projections"].to(net.dtype),
            txt_ids=torch.zeros(hidden.shape[1], 3, device=x_t.device, dtype=net.dtype),
            img_ids=positions(x_t.shape[-1] // 2, x_t.device, net.dtype),
        ).sample
        return unpack(packed)


def pack(x: Latents) -> Tokens:
    """x [B, C, 2 h, 2 w] as tokens [B, h w, 4 C]."""
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack(tokens: Tokens) -> Latents:
    """The inverse of `pack` for square images."""
    b, n, c = tokens.shape
    side = round(n**0.5)
    return tokens.view(b, side, side, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, 2 * side, 2 * side)


def positions(side: int, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "n 3"]:
    """(0, row, column) of the tokens of a square image, [side side, 3]."""
    line = torch.arange(side, device=device, dtype=dtype)
    row, column = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=2).view(-1, 3)


class FluxSamplers(FlowSamplers):
    """The pipeline passes its scheduler an even grid, of any count."""

    def counts(self, steps: int) -> tuple[int, ...]:
        return tuple(n for n in range(1, steps + 1) if steps % n == 0)

    def scheduler(self, steps: int, stochastic: bool) -> "SchedulerMixin":
        return shifted_scheduler(self.schedule, stochastic)

    def set_timesteps(self, scheduler: "SchedulerMixin", steps: int) -> None:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))


class FluxStudents(TransformerStudents):
    """Students without the network's own embedding of the guidance scale: its call's default is part of their weights."""

    def pipeline(
        self, student: Denoiser, scheduler: "SchedulerMixin", guidance_scale: Scale | None = None
    ) -> "DiffusionPipeline":
        pipeline = super().pipeline(student, scheduler, guidance_scale)
        if pipeline.transformer.config.guidance_embeds:
            scale = call_defaults(self.placement.pipeline, "guidance_scale")["guidance_scale"]
            fold_embedded_guidance(pipeline.transformer, scale)
        return pipeline


@torch.no_grad()
def fold_embedded_guidance(net: "FluxTransformer2DModel", scale: float) -> None:
    """Make a FluxTransformer2DModel's guidance scale part of its weights, in place; then it embeds none.

    The scale's embedding is added to that of the time, whose last bias takes it up.
    """
    from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings

    old = net.time_text_embed
    dim = old.timestep_embedder.linear_2.out_features
    plain = CombinedTimestepTextProjEmbeddings(dim, old.text_embedder.linear_1.in_features)
    plain.load_state_dict({k: v for k, v in old.state_dict().items() if not k.startswith("guidance_embedder")})
    plain = plain.to(net.device, net.dtype)
    sinusoids = old.time_proj(1000 * torch.full((1,), scale, device=net.device)).to(net.dtype)
    plain.timestep_embedder.linear_2.bias += old.guidance_embedder(sinusoids)[0]
    net.time_text_embed = plain.requires_grad_(False)
    net.register_to_config(guidance_embeds=False)


class Flux(Teacher):
    """A FluxPipeline; unconditional is the empty prompt.

    Where its network embeds a guidance scale (FLUX.1-dev), that is its call's default, as a condition. In a student's
    pipeline this scale is part of the weights, and a caller's guidance_scale has no effect.
    """

    guidance = GuidanceContract()

    def __init__(self, pipeline: "DiffusionPipeline") -> None:
        net, side = pipeline.transformer, pipeline.default_sample_size
        schedule = flow_schedule(pipeline.scheduler, (side // 2) ** 2)
        placement = Placement(pipeline, net, text_parts=("text_encoder", "text_encoder_2"), image_parts=("vae",))
        denoiser = Denoiser(net, FluxCall(schedule), schedule, "flow", JOINT_FEATURES)
        shape, image_size = (net.config.in_channels // 4, side, side), side * pipeline.vae_scale_factor
        targets = (*JOINT_BLOCK, "norm.linear", "proj_mlp", "proj_out")
        super().__init__(
            denoiser,
            placement,
            conditioner=Prompts(placement, self._encode_prompts),
            codec=Autoencoder(placement, shape, image_size),
            students=FluxStudents(denoiser, placement, targets, time_modules),
            samplers=FluxSamplers(schedule),
        )

    def _encode_prompts(self, prompts: list[str]) -> Cond:
        defaults = call_defaults(self.pipeline, "guidance_scale", "max_sequence_length")
        scale = defaults.pop("guidance_scale")
        encoded, pooled, _ = self.pipeline.encode_prompt(prompts, None, device=self.placement.device, **defaults)
        cond = {"encoder_hidden_states": encoded, "pooled_projections": pooled}
        if self.pipeline.transformer.config.guidance_embeds:
            cond["guidance"] = torch.full((len(prompts),), scale, device=encoded.device)
        return cond
