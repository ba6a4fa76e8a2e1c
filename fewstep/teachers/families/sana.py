"""Sana (Xie et al. 2024): a rectified flow of linear attention on Gemma's states, in the latents of a deep autoencoder."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fewstep.diffusion.schedule import ShiftedFlow
from fewstep.diffusion.shapes import Images, Latents
from fewstep.teachers.base import Teacher
from fewstep.teachers.conditioner import Prompts, call_defaults
from fewstep.teachers.denoiser import Cond, Denoiser, Inputs, Posterior
from fewstep.teachers.embeddings.transformer import TimeModules, time_input
from fewstep.teachers.families._flow import flow_schedule, network_time
from fewstep.teachers.families._transformer import TOKEN_FEATURES, TransformerStudents
from fewstep.teachers.flow_schedulers import twice_shifted_scheduler
from fewstep.teachers.guidance_contract import GUIDED_BY_DEFAULT
from fewstep.teachers.latents import Autoencoder
from fewstep.teachers.lora import ATTENTION
from fewstep.teachers.placement import Placement
from fewstep.teachers.samplers import FlowSamplers

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SanaTransformer2DModel, SchedulerMixin

AWAY = "\0away from: "
"""Begins the name of a prompt that guidance leads away from: the pipeline encodes it without its instruction to Gemma."""


@dataclass(frozen=True)
class SanaCall:
    """SanaTransformer2DModel at latents [B, C, h, w]."""

    schedule: ShiftedFlow

    def __call__(self, net: "SanaTransformer2DModel", inputs: Inputs) -> Latents:
        time = network_time(self.schedule, inputs.t) * net.config.timestep_scale
        output: Latents = net(
            hidden_states=inputs.x_t.to(net.dtype),
            encoder_hidden_states=inputs.cond["encoder_hidden_states"].to(net.dtype),
            encoder_attention_mask=inputs.cond["encoder_attention_mask"],
            timestep=time_input(net.time_embed.emb, time, inputs),
        ).sample
        return output[:, : inputs.x_t.shape[1]]


def time_modules(net: "SanaTransformer2DModel") -> Sequence[TimeModules]:
    return [net.time_embed.emb]


class SanaPrompts(Prompts):
    """Prompts; unconditional is the empty one without the pipeline's instruction to Gemma."""

    def negative(self, prompt: str) -> str:
        return AWAY + prompt


class DeepAutoencoder(Autoencoder):
    """An AutoencoderDC, which is deterministic: std is 0."""

    def encode(self, images: Images) -> Posterior:
        self.check(images)
        vae = self.vae
        with torch.no_grad():
            latent = vae.encode(images.to(vae.device, vae.dtype)).latent.float() * vae.config.scaling_factor
        return Posterior(latent, torch.zeros_like(latent))


class SanaSamplers(FlowSamplers):
    """The pipeline passes its scheduler nothing but the count, with which that has to be made."""

    def counts(self, steps: int) -> tuple[int, ...]:
        """One: the grid of other counts would end where that of `steps` does."""
        return (steps,)

    def scheduler(self, steps: int, stochastic: bool) -> "SchedulerMixin":
        return twice_shifted_scheduler(self.schedule, steps, stochastic)

    def set_timesteps(self, scheduler: "SchedulerMixin", steps: int) -> None:
        scheduler.set_timesteps(steps)


class Sana(Teacher):
    """A SanaPipeline; unconditional is the empty prompt without the pipeline's instruction to Gemma.

    It guides by default, and nothing in a folder can stop it: a student's caller passes guidance_scale=1. Its images are
    1024 pixels wide unless the caller asks for others: those of networks for another size are resized by its call.
    """

    guidance = GUIDED_BY_DEFAULT

    def __init__(self, pipeline: "DiffusionPipeline") -> None:
        net, config = pipeline.transformer, pipeline.scheduler.config
        if config.get("use_flow_sigmas"):  # published with DPM-Solver, which has its shift under another name
            schedule = ShiftedFlow(float(config["flow_shift"]), config.num_train_timesteps)
        else:
            schedule = flow_schedule(pipeline.scheduler, 0)
        placement = Placement(pipeline, net, text_parts=("text_encoder",), image_parts=("vae",))
        denoiser = Denoiser(net, SanaCall(schedule), schedule, "flow", TOKEN_FEATURES)
        side, targets = net.config.sample_size, (*ATTENTION, "conv_inverted", "conv_point", "time_embed.linear")
        super().__init__(
            denoiser,
            placement,
            conditioner=SanaPrompts(placement, self._encode_prompts),
            codec=DeepAutoencoder(placement, (net.config.in_channels, side, side), side * pipeline.vae_scale_factor),
            students=TransformerStudents(denoiser, placement, targets, time_modules),
            samplers=SanaSamplers(schedule),
        )

    def _encode_prompts(self, prompts: list[str]) -> Cond:
        names = ("complex_human_instruction", "clean_caption", "max_sequence_length")
        defaults = call_defaults(self.pipeline, *names)
        usual = defaults.pop("complex_human_instruction")
        rows: dict[str, tuple[Tensor, Tensor]] = {}
        for away, instruction in ((False, usual), (True, None)):
            if some := [prompt for prompt in prompts if prompt.startswith(AWAY) == away]:
                encoded, mask, _, _ = self.pipeline.encode_prompt(
                    [prompt.removeprefix(AWAY) for prompt in some], False, device=self.placement.device,
                    complex_human_instruction=instruction, **defaults,
                )  # fmt: skip
                rows |= dict(zip(some, zip(encoded, mask, strict=True), strict=True))
        states, masks = (torch.stack([rows[prompt][i] for prompt in prompts]) for i in range(2))
        return {"encoder_hidden_states": states, "encoder_attention_mask": masks}
