"""Sana (Xie et al. 2024): a rectified flow of linear attention on Gemma's states, in the latents of a deep autoencoder."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fewstep.diffusion.schedule import ShiftedFlow
from fewstep.teachers.denoiser import Cond, Posterior, tokens_as_map
from fewstep.teachers.embeddings import transformer as told
from fewstep.teachers.families._transformer import TransformerTeacher
from fewstep.teachers.families.flow import FlowTeacher
from fewstep.teachers.flow_schedulers import shift_of, twice_shifted_scheduler
from fewstep.teachers.guidance_contract import GUIDED_BY_DEFAULT
from fewstep.teachers.lora import ATTENTION
from fewstep.teachers.prompt_cache import PromptCache

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

AWAY = "\0away from: "
"""Begins the name of a prompt that guidance leads away from: the pipeline encodes it without its instruction to Gemma."""


@dataclass(frozen=True)
class SanaCall:
    """SanaTransformer2DModel at x_t [B, C, h, w], t [B]."""

    schedule: ShiftedFlow

    def __call__(
        self,
        net: Any,
        x_t: Tensor,
        t: Tensor,
        cond: Cond,
        guidance_scale: Tensor | None,
        progress: Tensor | None = None,
    ) -> Tensor:
        time = self.schedule.num_train_timesteps * self.schedule(t)[1] * net.config.timestep_scale
        output: Tensor = net(
            hidden_states=x_t.to(net.dtype),
            encoder_hidden_states=cond["encoder_hidden_states"].to(net.dtype),
            encoder_attention_mask=cond["encoder_attention_mask"],
            timestep=told.columns(net.time_embed.emb, time, guidance_scale, progress),
        ).sample
        return output[:, : x_t.shape[1]]


class Sana(FlowTeacher):
    """A SanaPipeline; unconditional is the empty prompt without the pipeline's instruction to Gemma.

    It guides by default, and nothing in a folder can stop it: a student's caller passes guidance_scale=1. Its images are
    1024 pixels wide unless the caller asks for others: those of networks for another size are resized by its call.
    """

    guidance = GUIDED_BY_DEFAULT
    text_parts = ("text_encoder",)
    lora_targets = (*ATTENTION, "conv_inverted", "conv_point", "time_embed.linear")

    def __init__(self, pipeline: "DiffusionPipeline") -> None:
        config = pipeline.scheduler.config
        # Published with DPM-Solver, which has its shift under another name.
        shift = float(config["flow_shift"]) if config.get("use_flow_sigmas") else shift_of(config, 0)
        schedule = ShiftedFlow(shift, config.num_train_timesteps)
        self.call, self.feature_map = SanaCall(schedule), tokens_as_map
        TransformerTeacher.__init__(self, pipeline, schedule, "flow")
        self.prompts = PromptCache(self, self._encode_prompts)
        self.placement.moved.append(self.prompts.clear)

    @staticmethod
    def sizes(pipeline: "DiffusionPipeline") -> tuple[tuple[int, int, int], int]:
        side = pipeline.transformer.config.sample_size
        return (pipeline.transformer.config.in_channels, side, side), side * pipeline.vae_scale_factor

    @staticmethod
    def time_modules(net: Any) -> Sequence[Any]:
        return [net.time_embed.emb]

    def encode(self, images: Tensor) -> Posterior:
        """The autoencoder is deterministic: std is 0."""
        vae, expected = self.placement.part("vae"), (3, self.image_size, self.image_size)
        if tuple(images.shape[1:]) != expected:
            raise ValueError(f"images are {tuple(images.shape[1:])}; the teacher takes {expected}")
        with torch.no_grad():
            latent = vae.encode(images.to(vae.device, vae.dtype)).latent.float() * vae.config.scaling_factor
        return Posterior(latent, torch.zeros_like(latent))

    def negative(self, prompt: str) -> str:
        return AWAY + prompt

    def null_condition(self, size: int) -> Cond:
        return self.condition([self.negative("")] * size)

    def _encode_prompts(self, prompts: list[str]) -> Cond:
        given = inspect.signature(type(self.pipeline).__call__).parameters
        defaults = {name: given[name].default for name in ("clean_caption", "max_sequence_length")}
        rows: dict[str, tuple[Tensor, Tensor]] = {}
        for away, instruction in ((False, given["complex_human_instruction"].default), (True, None)):
            if some := [prompt for prompt in prompts if prompt.startswith(AWAY) == away]:
                encoded, mask, _, _ = self.pipeline.encode_prompt(
                    [prompt.removeprefix(AWAY) for prompt in some], False, device=self.placement.device,
                    complex_human_instruction=instruction, **defaults,
                )  # fmt: skip
                rows |= dict(zip(some, zip(encoded, mask, strict=True), strict=True))
        states, masks = (torch.stack([rows[prompt][i] for prompt in prompts]) for i in range(2))
        return {"encoder_hidden_states": states, "encoder_attention_mask": masks}

    def renoise_counts(self, steps: int) -> tuple[int, ...]:
        """One: the grid of other counts would end where that of `steps` does."""
        return (steps,)

    def _scheduler(self, steps: int, stochastic: bool) -> "SchedulerMixin":
        return twice_shifted_scheduler(self.schedule, steps, stochastic)

    def _set_timesteps(self, scheduler: Any, steps: int) -> None:
        scheduler.set_timesteps(steps)
