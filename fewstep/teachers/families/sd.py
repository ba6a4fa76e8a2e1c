"""Stable Diffusion 1.x and 2.x (Rombach et al. 2022): latents, CLIP prompts, a UNet that predicts epsilon or v."""

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fewstep.teachers.base import Teacher
from fewstep.teachers.denoiser import Call, Cond, Denoiser, Posterior, Scale
from fewstep.teachers.embeddings.unet import attach_progress, fold_progress
from fewstep.teachers.guidance_contract import GuidanceContract
from fewstep.teachers.latents import decode_latents, encode_images, square_size
from fewstep.teachers.lora import UNET, plain_copy
from fewstep.teachers.prompt_cache import PromptCache, freeze
from fewstep.teachers.schedulers import DiscreteGrids, read_schedule, tcd_scheduler

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

EMBEDDING_DIM = 256
"""Width of the guidance scale's embedding (Luo et al. 2023); also `time_cond_proj_dim` of an exported UNet."""

COND_PROJ = "time_embedding.cond_proj.weight"


def guidance_embedding(guidance_scale: Tensor, dim: int = EMBEDDING_DIM) -> Tensor:
    """Sinusoids of w = guidance_scale - 1 [B] as [B, dim] in float32: sin, then cos, of 1000 w 10000^(-j / (H - 1))."""
    half = dim // 2
    frequencies = torch.exp(
        torch.arange(half, dtype=torch.float32) * -(torch.log(torch.tensor(10000.0)) / (half - 1))
    ).to(guidance_scale.device)
    angles = (guidance_scale.float() - 1)[:, None] * 1000.0 * frequencies[None]
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return nn.functional.pad(embedding, (0, dim % 2))


def call(
    net: Any,
    x_t: Tensor,
    t: Tensor,
    cond: Cond,
    guidance_scale: Tensor | None,
    progress: Tensor | None = None,
    **more: Any,
) -> Tensor:
    """The UNet's output at x_t [B, C, h, w], t [B]; guidance_scale [B] if and only if the network embeds it."""
    dim = net.config.time_cond_proj_dim
    if (dim is None) != (guidance_scale is None):
        has, given = ("no" if dim is None else "a"), ("none" if guidance_scale is None else "one")
        raise ValueError(f"the network has {has} guidance embedding and was given {given} guidance_scale")
    dtype = net.dtype
    timestep_cond = None if guidance_scale is None else guidance_embedding(guidance_scale, dim).to(dtype)
    hidden = cond["encoder_hidden_states"].to(dtype)
    return net(
        x_t.to(dtype), t, encoder_hidden_states=hidden, timestep_cond=timestep_cond, class_labels=progress, **more
    ).sample


def with_guidance_embedding(unet: Any) -> Any:
    """A copy of a UNet2DConditionModel with a zero-initialised guidance embedding: the same function for any scale."""
    from diffusers import UNet2DConditionModel

    # A keyword, not a key of the config: diffusers overrules config entries that the source left at their default.
    wider = UNet2DConditionModel.from_config(unet.config, time_cond_proj_dim=EMBEDDING_DIM)
    missing, unexpected = wider.load_state_dict(unet.state_dict(), strict=False)
    if set(missing) != {COND_PROJ} or unexpected:
        raise ValueError(f"the UNet's weights do not fit its config: missing {missing}, unexpected {unexpected}")
    nn.init.zeros_(wider.time_embedding.cond_proj.weight)
    return in_dtype(wider, unet.dtype).to(unet.device)


def attach_guidance(unet: Any) -> None:
    """Give a UNet2DConditionModel a zero-initialised guidance embedding, in place: the same function for any scale."""
    embedding = unet.time_embedding
    embedding.cond_proj = nn.Linear(EMBEDDING_DIM, embedding.linear_1.in_features, bias=False).to(unet.device)
    nn.init.zeros_(embedding.cond_proj.weight)
    unet.register_to_config(time_cond_proj_dim=EMBEDDING_DIM)


@torch.no_grad()
def fold_guidance(unet: Any, guidance_scale: Scale) -> None:
    """Bake a guidance scale, or one for each timestep, into the UNet, in place; its embedding then has no effect.

    The embedding is added to the sinusoids of t before a linear layer. So it is a constant in that layer's bias; and as
    sinusoids of different timesteps are linearly independent, scales that differ are a part of its weight.
    """
    embedding = unet.time_embedding
    layer, projection = embedding.linear_1, embedding.cond_proj.weight.double()
    scales = list(guidance_scale.values()) if isinstance(guidance_scale, Mapping) else [guidance_scale]
    told = guidance_embedding(torch.tensor(scales, device=projection.device), projection.shape[1]).double()
    shifts = told @ projection.T @ layer.weight.double().T
    if isinstance(guidance_scale, Mapping):
        shift_at(layer, unet.time_proj(torch.tensor(list(guidance_scale), device=projection.device)), shifts)
    else:
        layer.bias += shifts[0].to(layer.bias.dtype)
    embedding.cond_proj.weight.zero_()


@torch.no_grad()
def shift_at(layer: nn.Linear, inputs: Tensor, shifts: Tensor) -> None:
    """Move what a layer answers to inputs [n, in] by shifts [n, out], exactly, with the least change of its weight, in place.

    Raises ValueError where the inputs are linearly dependent, so that no weight does.
    """
    inputs, shifts = inputs.double(), shifts.double()
    mean = shifts.mean(dim=0)
    change = torch.linalg.pinv(inputs) @ (shifts - mean)
    error = (inputs @ change - (shifts - mean)).abs().max()
    if error > 1e-6 * shifts.abs().max():
        raise ValueError(f"{len(inputs)} inputs of {inputs.shape[1]} numbers cannot be told apart by a linear layer")
    layer.weight.add_(change.T.to(layer.weight.dtype))
    layer.bias.add_(mean.to(layer.bias.dtype))


class StableDiffusion(DiscreteGrids, Teacher):
    """A StableDiffusionPipeline; its conditions are prompts, unconditional is the empty one.

    Raises ValueError for a UNet that embeds the guidance scale (a student already) and for epsilon with zero terminal
    SNR.
    """

    conditions = "prompt"
    guidance = GuidanceContract(live=True, scale_to_pass_with_adapters=1.0)
    text_parts: tuple[str, ...] = ("text_encoder",)
    image_parts = ("vae",)
    prompts: PromptCache
    lora_targets = UNET
    call: Call = staticmethod(call)

    def __init__(self, pipeline: "DiffusionPipeline") -> None:
        unet = pipeline.unet
        if unet.config.time_cond_proj_dim is not None:
            raise ValueError(
                "the teacher's UNet embeds the guidance scale (time_cond_proj_dim): it is a student already"
            )
        freeze(pipeline)
        self.pipeline = pipeline
        self.schedule = read_schedule(pipeline.scheduler)
        self.num_train_timesteps = pipeline.scheduler.config.num_train_timesteps
        self.denoiser = Denoiser(unet, self.call, self.schedule, pipeline.scheduler.config.prediction_type)
        side, self.image_size = square_size(unet, pipeline)
        self.latent_shape = (unet.config.in_channels, side, side)
        self.prompts = PromptCache(self, self._encode_prompts)
        self.placement.moved.append(self.prompts.clear)

    def encode(self, images: Tensor) -> Posterior:
        return encode_images(self.placement.part("vae"), images, self.image_size)

    def decode(self, x0: Tensor) -> Tensor:
        return decode_latents(self.placement.part("vae"), x0)

    def condition(self, raw: Sequence[Any]) -> Cond:
        return self.prompts(raw)

    def _encode_prompts(self, prompts: list[str]) -> Cond:
        encoded, _ = self.pipeline.encode_prompt(prompts, self.pipeline.text_encoder.device, 1, False)
        return {"encoder_hidden_states": encoded}

    def null_condition(self, size: int) -> Cond:
        return self.condition([""] * size)

    def student(self, guidance_embedding: bool = False, progress_embedding: bool = False) -> Denoiser:
        if guidance_embedding and self.lora is None:
            student = self.denoiser.with_net(with_guidance_embedding(self.denoiser.net))
        else:
            student = self.learner()
            if guidance_embedding:
                attach_guidance(student.net)
        if progress_embedding:
            attach_progress(student.net)
        return student.learnable()

    def feature_module(self, denoiser: Denoiser) -> nn.Module:
        return denoiser.net.get_submodule("mid_block")

    def jump_scheduler(self, steps: int) -> "SchedulerMixin":
        return tcd_scheduler(self.pipeline.scheduler, steps)

    def student_pipeline(
        self, student: Denoiser, scheduler: "SchedulerMixin", guidance_scale: Scale | None = None
    ) -> "DiffusionPipeline":
        """LatentConsistencyModelPipeline for re-noising schedulers, else StableDiffusionPipeline.

        Both switch classifier-free guidance off for a UNet that embeds the guidance scale, so every exported UNet does,
        if only with zeros. A guidance_scale for a student without the embedding raises ValueError.
        """
        from diffusers import LatentConsistencyModelPipeline, LCMScheduler, StableDiffusionPipeline

        kind = LatentConsistencyModelPipeline if isinstance(scheduler, LCMScheduler) else StableDiffusionPipeline
        return self._assembled(kind, self._stock_unet(student, guidance_scale), scheduler)

    def guided_pipeline(self, student: Denoiser, scheduler: "SchedulerMixin") -> "DiffusionPipeline":
        from diffusers import StableDiffusionPipeline

        return self._assembled(StableDiffusionPipeline, self.folded(student).requires_grad_(False).eval(), scheduler)

    def _assembled(self, kind: Any, unet: Any, scheduler: "SchedulerMixin") -> "DiffusionPipeline":
        self.placement.recall(self.placement.parts)
        pipeline: DiffusionPipeline = kind(
            vae=in_dtype(self.pipeline.vae, unet.dtype),
            text_encoder=in_dtype(self.pipeline.text_encoder, unet.dtype),
            tokenizer=self.pipeline.tokenizer,
            unet=unet,
            scheduler=copy.deepcopy(scheduler),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def folded(self, student: Denoiser, guidance_scale: Scale | None = None) -> Any:
        unet = plain_copy(student)
        fold_progress(unet)
        embeds = unet.config.time_cond_proj_dim is not None
        if guidance_scale is not None and not embeds:
            raise ValueError(f"guidance_scale is {guidance_scale}, but the student has no guidance embedding")
        if guidance_scale is not None:
            fold_guidance(unet, guidance_scale)
        return unet

    def _stock_unet(self, student: Denoiser, guidance_scale: Scale | None) -> Any:
        """The folded network with an embedding of the guidance scale, if only of zeros."""
        unet = self.folded(student, guidance_scale)
        if unet.config.time_cond_proj_dim is None:
            unet = with_guidance_embedding(unet)
        return unet.requires_grad_(False).eval()


def in_dtype(module: Any, dtype: torch.dtype) -> Any:
    """The module itself where it has that dtype, else a converted copy: the teacher's own must not change."""
    return module if module.dtype == dtype else copy.deepcopy(module).to(dtype)
