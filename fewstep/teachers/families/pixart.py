"""PixArt-alpha and PixArt-Sigma (Chen et al. 2023, 2024): a diffusion transformer on T5 prompts."""

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fewstep.teachers.denoiser import Call, Cond, FeatureMap, tokens_as_map
from fewstep.teachers.embeddings import transformer as told
from fewstep.teachers.families._transformer import TransformerTeacher
from fewstep.teachers.guidance_contract import GUIDED_BY_DEFAULT
from fewstep.teachers.lora import ATTENTION, FEED_FORWARD
from fewstep.teachers.prompt_cache import PromptCache
from fewstep.teachers.schedulers import DiscreteGrids, read_schedule, tcd_scheduler

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

SIZED = 128
"""The `sample_size` of networks whose PixArt-alpha pipeline tells them the image's size."""


def call(
    net: Any, x_t: Tensor, t: Tensor, cond: Cond, guidance_scale: Tensor | None, progress: Tensor | None = None
) -> Tensor:
    """The network's output at x_t [B, C, h, w], t [B], without the variance that it may predict behind it."""
    sizes = {key: cond[key].to(net.dtype) if key in cond else None for key in ("resolution", "aspect_ratio")}
    output: Tensor = net(
        x_t.to(net.dtype),
        encoder_hidden_states=cond["encoder_hidden_states"].to(net.dtype),
        encoder_attention_mask=cond["encoder_attention_mask"],
        timestep=told.columns(net.adaln_single.emb, t, guidance_scale, progress),
        added_cond_kwargs=sizes,
    ).sample
    return output[:, : x_t.shape[1]]


class PixArt(DiscreteGrids, TransformerTeacher):
    """A PixArtAlphaPipeline or PixArtSigmaPipeline; unconditional is the empty prompt.

    Both guide by default, and nothing in a folder can stop them: a student's caller passes guidance_scale=1.
    """

    conditions = "prompt"
    guidance = GUIDED_BY_DEFAULT
    text_parts = ("text_encoder",)
    prompts: PromptCache
    lora_targets = (*ATTENTION, *FEED_FORWARD, "adaln_single.linear")
    call: Call = staticmethod(call)
    feature_map: FeatureMap = staticmethod(tokens_as_map)

    def __init__(self, pipeline: "DiffusionPipeline") -> None:
        kind = pipeline.scheduler.config.prediction_type
        super().__init__(pipeline, read_schedule(pipeline.scheduler), kind)
        alpha = type(pipeline).__name__ == "PixArtAlphaPipeline"
        self.sized = alpha and pipeline.transformer.config.sample_size == SIZED
        self.prompts = PromptCache(self, self._encode_prompts)
        self.placement.moved.append(self.prompts.clear)

    @staticmethod
    def time_modules(net: Any) -> Sequence[Any]:
        return [net.adaln_single.emb]

    def condition(self, raw: Sequence[Any]) -> Cond:
        return self.prompts(raw)

    def _encode_prompts(self, prompts: list[str]) -> Cond:
        device = self.pipeline.text_encoder.device
        encoded, mask, _, _ = self.pipeline.encode_prompt(prompts, False, device=device, **self._defaults())
        cond = {"encoder_hidden_states": encoded, "encoder_attention_mask": mask}
        if self.sized:
            size, like = float(self.image_size), {"device": device, "dtype": encoded.dtype}
            cond["resolution"] = torch.full((len(prompts), 2), size, **like)
            cond["aspect_ratio"] = torch.ones(len(prompts), 1, **like)
        return cond

    def _defaults(self) -> dict[str, Any]:
        """What the pipeline's call passes to encode_prompt, whose own defaults are others."""
        parameters = inspect.signature(type(self.pipeline).__call__).parameters
        return {name: parameters[name].default for name in ("clean_caption", "max_sequence_length")}

    def null_condition(self, size: int) -> Cond:
        return self.condition([""] * size)

    def jump_scheduler(self, steps: int) -> "SchedulerMixin":
        return tcd_scheduler(self.pipeline.scheduler, steps)
