"""Stage 4: the UNet on the latents, and the Stable Diffusion pipeline it completes."""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.io import atomic
from fewstep.pretrain.autoencoder import encode, load_autoencoder
from fewstep.pretrain.clip import CAPTIONS, TEMPLATES, caption_ids, load_clip, text_tower
from fewstep.pretrain.config import DenoiserConfig, TeacherTraining
from fewstep.pretrain.data import Data
from fewstep.pretrain.loop import best_device, fit, stratified


def build_unet(config: DenoiserConfig) -> UNet2DConditionModel:
    deeper = len(config.channels) - 1
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        # No attention in the widest maps: it would cost a third of the parameters and of the time.
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * deeper),
        up_block_types=(*["CrossAttnUpBlock2D"] * deeper, "UpBlock2D"),
        block_out_channels=config.channels,
        layers_per_block=1,
        # In this class the key holds the number of heads.
        attention_head_dim=4,
        cross_attention_dim=64,
        norm_num_groups=16,
    )


def build_scheduler(config: DenoiserConfig) -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=config.prediction_type,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        # One step then starts at t=999, where training ends.
        timestep_spacing="trailing",
    )


def assemble(
    folder: Path, unet: UNet2DConditionModel, vae: AutoencoderKL, config: DenoiserConfig
) -> StableDiffusionPipeline:
    clip, tokenizer = load_clip(folder)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_tower(clip),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@torch.no_grad()
def caption_states(folder: Path) -> Tensor:
    """Text encoder states of every caption, then of the empty prompt: [len(CAPTIONS) + 1, 16, 64]."""
    clip, tokenizer = load_clip(folder)
    states: Tensor = text_tower(clip)(caption_ids(tokenizer, [*CAPTIONS, ""])).last_hidden_state
    return states


def cached_latents(vae: AutoencoderKL, data: Data, folder: Path) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the training images' latents, encoded once per run."""
    cache = folder / "latents.safetensors"
    if not cache.exists():
        mean, std = encode(vae, data.train_images)
        with atomic(cache) as part:
            save_file({"mean": mean.contiguous(), "std": std.contiguous()}, part)
    latents = load_file(cache)
    return latents["mean"], latents["std"]


def train_denoiser(config: TeacherTraining, data: Data, folder: Path) -> None:
    torch.manual_seed(config.seed + 3)
    settings = config.denoiser
    device = best_device()
    vae = load_autoencoder(folder)
    mean, std = (x * vae.config.scaling_factor for x in cached_latents(vae.to(device), data, folder))
    states = caption_states(folder).to(device)
    scheduler = build_scheduler(settings)
    unet = build_unet(settings).to(device)
    network = torch.compile(unet, mode="reduce-overhead") if settings.compile else unet

    def loss(generator: torch.Generator) -> Tensor:
        n = settings.batch_size
        i = torch.randint(len(mean), (n,), generator=generator)
        latents = mean[i] + std[i] * torch.randn(mean[i].shape, generator=generator)
        templates = torch.randint(len(TEMPLATES), (n,), generator=generator)
        texts = data.train_labels[i] * len(TEMPLATES) + templates
        texts[torch.rand(n, generator=generator) < settings.empty_prompts] = len(CAPTIONS)
        timesteps = (stratified(n, generator) * 1000).long()
        noise = torch.randn(latents.shape, generator=generator)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        target = noise
        if settings.prediction_type == "v_prediction":
            target = scheduler.get_velocity(latents, noise, timesteps)
        noisy, target, timesteps, texts = (x.to(device, non_blocking=True) for x in (noisy, target, timesteps, texts))
        return F.mse_loss(network(noisy, timesteps, states[texts]).sample, target)

    fit(
        "denoiser",
        unet,
        loss,
        settings,
        folder,
        config.seed + 3,
        config.checkpoint_seconds,
        ema_decay=settings.ema_decay,
    )
    # Half the bytes in the package; diffusers loads them as fp32 unless asked otherwise.
    with atomic(folder / "pipeline") as part:
        assemble(folder, unet.cpu().half(), vae.cpu(), settings).save_pretrained(part)
