"""Tiny untrained pipelines of further families, from the real classes."""

from pathlib import Path
from typing import Any

import torch

from builders.pipelines import clip_tokenizer


def _vae(blocks: int = 3, channels: int = 4, **changes: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8,) * blocks, norm_num_groups=8, latent_channels=channels, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks, **changes,
    )  # fmt: skip


def _clip(tokenizer: Any, projection: bool, width: int = 16) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, projection_dim=width,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def build_sdxl(folder: Path, force_zeros: bool = True) -> Path:
    """A StableDiffusionXLPipeline of 32x32 images that predicts epsilon; its VAE asks for float32."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    tokenizer = clip_tokenizer(folder.with_name(folder.name + "_words"))
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), transformer_layers_per_block=1, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=16 + 6 * 8,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    StableDiffusionXLPipeline(
        vae=_vae(force_upcast=True), text_encoder=_clip(tokenizer, False), text_encoder_2=_clip(tokenizer, True),
        tokenizer=tokenizer, tokenizer_2=tokenizer, unet=unet, scheduler=scheduler,
        force_zeros_for_empty_prompt=force_zeros, add_watermarker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def build_dit(folder: Path, num_labels: int = 10) -> Path:
    """A DiTPipeline of 32x32 images that also predicts a variance."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=num_labels,
    )  # fmt: skip
    _stir(transformer)
    pipeline = DiTPipeline(transformer=transformer, vae=_vae(), scheduler=DDIMScheduler(clip_sample=False))
    pipeline.register_to_config(id2label={0: "bag", 3: "shoe, boot"})  # as in the published folders
    pipeline.save_pretrained(folder)
    return folder


def _stir(transformer: Any) -> None:
    """Untrained transformers answer with next to nothing: give every weight some size."""
    with torch.no_grad():
        for p in transformer.parameters():
            p.add_(torch.randn(p.shape), alpha=0.1)


def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5Tokenizer(vocab=[*pieces, *((c, -3.0) for c in "abcdefghijklmnopqrstuvwxyz")], extra_ids=0)


def _t5(tokenizer: Any, width: int = 16) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )


def build_pixart(folder: Path, sigma: bool = False, sample_size: int = 32, patch_size: int = 8) -> Path:
    """A PixArtAlphaPipeline, or a PixArtSigmaPipeline, of 256x256 images, their smallest, that also predicts a variance."""
    from diffusers import (
        DPMSolverMultistepScheduler,
        PixArtAlphaPipeline,
        PixArtSigmaPipeline,
        PixArtTransformer2DModel,
    )

    torch.manual_seed(0)
    tokenizer = t5_tokenizer()
    transformer = PixArtTransformer2DModel(
        num_attention_heads=3, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=24,
        sample_size=sample_size, patch_size=patch_size, caption_channels=16,
    )  # fmt: skip
    _stir(transformer)
    kind = PixArtSigmaPipeline if sigma else PixArtAlphaPipeline
    kind(
        tokenizer=tokenizer, text_encoder=_t5(tokenizer).eval(), vae=_vae(blocks=4), transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def build_sd3(folder: Path, medium: bool = False) -> Path:
    """A StableDiffusion3Pipeline of 32x32 images with a shift of 3; or with the transformer of SD 3.5 medium."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(0)
    clip, t5 = clip_tokenizer(folder.with_name(folder.name + "_words")), t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32,
        pos_embed_max_size=8, **({"qk_norm": "rms_norm", "dual_attention_layers": (0,)} if medium else {}),
    )  # fmt: skip
    _stir(transformer)
    StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(scaling_factor=1.5, shift_factor=0.06), text_encoder=_clip(clip, True), tokenizer=clip,
        text_encoder_2=_clip(clip, True), tokenizer_2=clip, text_encoder_3=_t5(t5, 32).eval(), tokenizer_3=t5,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def build_flux(folder: Path, schnell: bool = False) -> Path:
    """A FluxPipeline like FLUX.1-dev (or -schnell) of 128x128 images and latents: its call knows no other size by itself."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    clip, t5 = clip_tokenizer(folder.with_name(folder.name + "_words")), t5_tokenizer()
    transformer = FluxTransformer2DModel(
        in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=1,
        joint_attention_dim=16, pooled_projection_dim=16, guidance_embeds=not schnell, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    _stir(transformer)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0 if schnell else 3.0, use_dynamic_shifting=not schnell)
    FluxPipeline(
        transformer=transformer, scheduler=scheduler, vae=_vae(1, 2, scaling_factor=0.5, shift_factor=0.1),
        text_encoder=_clip(clip, False), tokenizer=clip, text_encoder_2=_t5(t5).eval(), tokenizer_2=t5,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def gemma_tokenizer() -> Any:
    from transformers import GemmaTokenizer

    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁"]
    # Few letters, so that most of the pipeline's long instruction is unknown, and runs of it are one token.
    return GemmaTokenizer(vocab={word: i for i, word in enumerate([*words, *"abcgl"])}, merges=[])


def build_sana(folder: Path, solver: bool = True) -> Path:
    """A SanaPipeline of 1024x1024 images, for its call knows no other size, and 4x32x32 latents; with DPM-Solver or Euler."""
    from diffusers import (
        AutoencoderDC,
        DPMSolverMultistepScheduler,
        FlowMatchEulerDiscreteScheduler,
        SanaPipeline,
        SanaTransformer2DModel,
    )
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(0)
    tokenizer = gemma_tokenizer()
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2, caption_channels=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, sample_size=32,
    )  # fmt: skip
    _stir(transformer)
    gemma = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    blocks: dict[str, Any] = {
        "block_out_channels": (4,) * 6,
        "layers_per_block": (0, 1, 1, 1, 1, 1),
        "qkv_multiscales": ((),) * 6,
    }
    sides = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in blocks.items()}
    dpm = DPMSolverMultistepScheduler(flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction")
    SanaPipeline(
        tokenizer=tokenizer, text_encoder=Gemma2Model(gemma).eval(), transformer=transformer,
        vae=AutoencoderDC(latent_channels=4, scaling_factor=0.4, **sides),
        scheduler=dpm if solver else FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def build_edm(folder: Path, num_labels: int | None = 10, levels: int = 1000) -> Path:
    """A ConsistencyModelPipeline of 32x32 images, of the blocks that the published ones for ImageNet have."""
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=32, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attn_norm_num_groups=4,
        attention_head_dim=8, num_class_embeds=num_labels, resnet_time_scale_shift="scale_shift",
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"), downsample_type="resnet",
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"), upsample_type="resnet",
    )  # fmt: skip
    ConsistencyModelPipeline(
        unet=unet, scheduler=CMStochasticIterativeScheduler(num_train_timesteps=levels)
    ).save_pretrained(folder)
    return folder
