"""Rectified flow transformers: Stable Diffusion 3 and 3.5 (Esser et al. 2024), Flux (Black Forest Labs 2024).

Their timesteps here are even, 0 ... T - 1; the network is told T sigma, where sigma has the shift of the teacher's own
scheduler at the resolution of the pipeline's default call. Students run on that shifted grid at any resolution.
"""

import inspect
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fewstep.diffusion.schedule import ShiftedFlow
from fewstep.teachers.denoiser import Cond, Denoiser, Scale, tokens_as_map
from fewstep.teachers.embeddings import transformer as told
from fewstep.teachers.families._transformer import TransformerTeacher
from fewstep.teachers.flow_schedulers import even_grid_scheduler, shift_of, shifted_scheduler
from fewstep.teachers.guidance_contract import GUIDED_BY_DEFAULT, GuidanceContract
from fewstep.teachers.lora import ATTENTION, FEED_FORWARD
from fewstep.teachers.prompt_cache import PromptCache

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

JOINT_ATTENTION = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""Projections of attention over image and text together."""


@dataclass(frozen=True)
class SD3Call:
    """SD3Transformer2DModel at x_t [B, C, h, w], t [B]."""

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
        time = self.schedule.num_train_timesteps * self.schedule(t)[1]
        output: Tensor = net(
            hidden_states=x_t.to(net.dtype),
            timestep=told.columns(net.time_text_embed, time, guidance_scale, progress),
            encoder_hidden_states=cond["encoder_hidden_states"].to(net.dtype),
            pooled_projections=cond["pooled_projections"].to(net.dtype),
        ).sample
        return output


@dataclass(frozen=True)
class FluxCall:
    """FluxTransformer2DModel at x_t [B, C, h, w], t [B]: packed into 2 x 2 patches, with the positions of text and image."""

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
        time = self.schedule.num_train_timesteps * self.schedule(t)[1]
        hidden = cond["encoder_hidden_states"].to(net.dtype)
        side = x_t.shape[-1] // 2
        packed = net(
            hidden_states=pack(x_t).to(net.dtype),
            # The network takes a thousandth of what it is told, and multiplies it by a thousand.
            timestep=told.columns(net.time_text_embed, time, guidance_scale, progress) / 1000,
            guidance=cond.get("guidance"),
            encoder_hidden_states=hidden,
            pooled_projections=cond["pooled_projections"].to(net.dtype),
            txt_ids=torch.zeros(hidden.shape[1], 3, device=x_t.device, dtype=net.dtype),
            img_ids=positions(side, x_t.device, net.dtype),
        ).sample
        return unpack(packed)


def pack(x: Tensor) -> Tensor:
    """x [B, C, 2 h, 2 h] as tokens [B, h h, 4 C]."""
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack(tokens: Tensor) -> Tensor:
    """The inverse of `pack`."""
    b, n, c = tokens.shape
    side = round(n**0.5)
    return tokens.view(b, side, side, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, 2 * side, 2 * side)


def positions(side: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(0, row, column) of the tokens of a square image, [side side, 3]."""
    line = torch.arange(side, device=device, dtype=dtype)
    row, column = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=2).view(-1, 3)


def block_output_as_map(output: Any) -> Tensor:
    """The image's part of what a block with two streams returns, (text, image)."""
    return tokens_as_map(output[1])


class FlowTeacher(TransformerTeacher):
    """A pipeline of a rectified flow; unconditional is the empty prompt."""

    conditions = "prompt"
    prompts: PromptCache
    schedule: ShiftedFlow

    def __init__(self, pipeline: "DiffusionPipeline", image_tokens: int, call: Any) -> None:
        config = pipeline.scheduler.config
        schedule = ShiftedFlow(shift_of(config, image_tokens), config.num_train_timesteps)
        self.call, self.feature_map = call(schedule), block_output_as_map
        super().__init__(pipeline, schedule, "flow")
        self.prompts = PromptCache(self, self._encode_prompts)
        self.placement.moved.append(self.prompts.clear)

    @staticmethod
    def time_modules(net: Any) -> Sequence[Any]:
        return [net.time_text_embed]

    def condition(self, raw: Sequence[Any]) -> Cond:
        return self.prompts(raw)

    @abstractmethod
    def _encode_prompts(self, prompts: list[str]) -> Cond: ...

    def null_condition(self, size: int) -> Cond:
        return self.condition([""] * size)

    def _max_length(self) -> int:
        """How many T5 tokens a call that is told nothing takes."""
        default: int = inspect.signature(type(self.pipeline).__call__).parameters["max_sequence_length"].default
        return default

    def renoise_scheduler(
        self, steps: int, timestep_scaling: float = 10.0, spacing: int | None = None
    ) -> "SchedulerMixin":
        """FlowMatchEulerDiscreteScheduler with stochastic_sampling, which re-noises x0.

        It has no c_skip and c_out (Luo et al. 2023), which must be 0 and 1 at its timesteps up to 1e-4; and it starts at pure
        noise. Raises ValueError where that does not hold. It runs any count: it cannot refuse one.
        """
        total = self.num_train_timesteps
        if spacing is not None and spacing != total // steps:
            raise ValueError(f"steps: a flow starts at pure noise, timestep {total - 1}, not at {steps * spacing - 1}")
        if timestep_scaling * (total / steps - 1) < 50:
            raise ValueError(
                f"timestep_scaling: {timestep_scaling} is too small for {steps} steps: the stock scheduler has no c_skip"
            )
        return self._scheduler(steps, stochastic=True)

    def jump_scheduler(self, steps: int) -> "SchedulerMixin":
        """FlowMatchEulerDiscreteScheduler. It runs any count: it cannot refuse one."""
        return self._scheduler(steps, stochastic=False)

    @abstractmethod
    def _scheduler(self, steps: int, stochastic: bool) -> "SchedulerMixin":
        """The scheduler with which the pipeline, told `steps`, runs the even grid of so many timesteps."""

    @abstractmethod
    def _set_timesteps(self, scheduler: Any, steps: int) -> None:
        """As the pipeline's call does it."""

    def jump_grid(self, scheduler: "SchedulerMixin", steps: int) -> Tensor:
        self._set_timesteps(scheduler, steps)
        sigmas: Tensor = scheduler.sigmas[:-1]  # type: ignore[attr-defined]
        found = self.schedule.timestep(sigmas.double())
        even = self.num_train_timesteps * torch.arange(steps, 0, -1).double() / steps - 1
        if not torch.allclose(found, even, atol=1e-2):
            raise ValueError(f"the scheduler's {steps} timesteps are {found.tolist()}, which is no even grid")
        grid = torch.cat([even, even.new_tensor([-1])])
        return grid.long() if bool((grid == grid.round()).all()) else grid.float()


class StableDiffusion3(FlowTeacher):
    """A StableDiffusion3Pipeline.

    It guides by default, and nothing in a folder can stop it: a student's caller passes guidance_scale=1.
    """

    guidance = GUIDED_BY_DEFAULT
    text_parts = ("text_encoder", "text_encoder_2", "text_encoder_3")
    lora_targets = (*JOINT_ATTENTION, *FEED_FORWARD, "norm1.linear", "norm1_context.linear")

    def __init__(self, pipeline: "DiffusionPipeline") -> None:
        config = pipeline.transformer.config
        super().__init__(pipeline, (config.sample_size // config.patch_size) ** 2, SD3Call)

    def _encode_prompts(self, prompts: list[str]) -> Cond:
        encoded, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, None, device=self.placement.device, do_classifier_free_guidance=False,
            max_sequence_length=self._max_length(),
        )  # fmt: skip
        return {"encoder_hidden_states": encoded, "pooled_projections": pooled}

    def renoise_counts(self, steps: int) -> tuple[int, ...]:
        """One: the grid of other counts would end where that of `steps` does."""
        return (steps,)

    def _scheduler(self, steps: int, stochastic: bool) -> "SchedulerMixin":
        return even_grid_scheduler(self.schedule, steps, stochastic)

    def _set_timesteps(self, scheduler: Any, steps: int) -> None:
        config = scheduler.config
        scheduler.set_timesteps(steps, **({"mu": config.base_shift} if config.use_dynamic_shifting else {}))


class Flux(FlowTeacher):
    """A FluxPipeline. Where its network embeds a guidance scale (FLUX.1-dev), that is its call's default, as a condition.

    In a student's pipeline this scale is part of the weights, and a caller's guidance_scale has no effect.
    """

    guidance = GuidanceContract()
    text_parts = ("text_encoder", "text_encoder_2")
    lora_targets = (
        *JOINT_ATTENTION, *FEED_FORWARD, "norm1.linear", "norm1_context.linear", "norm.linear", "proj_mlp", "proj_out",
    )  # fmt: skip

    def __init__(self, pipeline: "DiffusionPipeline") -> None:
        super().__init__(pipeline, (self.sizes(pipeline)[0][1] // 2) ** 2, FluxCall)

    @staticmethod
    def sizes(pipeline: "DiffusionPipeline") -> tuple[tuple[int, int, int], int]:
        side: int = pipeline.default_sample_size
        return (pipeline.transformer.config.in_channels // 4, side, side), side * pipeline.vae_scale_factor

    def _encode_prompts(self, prompts: list[str]) -> Cond:
        encoded, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, device=self.placement.device, max_sequence_length=self._max_length()
        )
        cond = {"encoder_hidden_states": encoded, "pooled_projections": pooled}
        if self.pipeline.transformer.config.guidance_embeds:
            scale = inspect.signature(type(self.pipeline).__call__).parameters["guidance_scale"].default
            cond["guidance"] = torch.full((len(prompts),), scale, device=encoded.device)
        return cond

    def renoise_counts(self, steps: int) -> tuple[int, ...]:
        return tuple(n for n in range(1, steps + 1) if steps % n == 0)

    def _scheduler(self, steps: int, stochastic: bool) -> "SchedulerMixin":
        return shifted_scheduler(self.schedule, stochastic)

    def _set_timesteps(self, scheduler: Any, steps: int) -> None:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))

    def student_pipeline(
        self, student: Denoiser, scheduler: "SchedulerMixin", guidance_scale: Scale | None = None
    ) -> "DiffusionPipeline":
        pipeline = super().student_pipeline(student, scheduler, guidance_scale)
        net: Any = pipeline.transformer
        if net.config.guidance_embeds:
            fold_embedded_guidance(net, self.condition([""])["guidance"])
        return pipeline


@torch.no_grad()
def fold_embedded_guidance(net: Any, scale: Tensor) -> None:
    """Make a FluxTransformer2DModel's guidance scale [1] part of its weights, in place; then it embeds none.

    The scale's embedding is added to that of the time, whose last bias takes it up.
    """
    from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings

    old = net.time_text_embed
    dim = old.timestep_embedder.linear_2.out_features
    plain = CombinedTimestepTextProjEmbeddings(dim, old.text_embedder.linear_1.in_features)
    plain.load_state_dict({k: v for k, v in old.state_dict().items() if not k.startswith("guidance_embedder")})
    plain = plain.to(net.device, net.dtype)
    sinusoids = old.time_proj(1000 * scale.to(net.device)).to(net.dtype)
    plain.timestep_embedder.linear_2.bias += old.guidance_embedder(sinusoids)[0]
    net.time_text_embed = plain.requires_grad_(False)
    net.register_to_config(guidance_embeds=False)
