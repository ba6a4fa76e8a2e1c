"""Stage 3: the VAE, four times smaller in each direction."""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from fewstep.io import atomic
from fewstep.pretrain.classifier import enlarged, load_classifier
from fewstep.pretrain.config import TeacherTraining
from fewstep.pretrain.data import Data, as_uint8, scaled
from fewstep.pretrain.loop import fit


def train_autoencoder(config: TeacherTraining, data: Data, folder: Path) -> None:
    torch.manual_seed(config.seed + 2)
    settings = config.autoencoder
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    )
    resnet = load_classifier(folder).resnet

    def feature_maps(pixels: Tensor) -> list[Tensor]:
        x = resnet.embedder(enlarged(pixels))
        maps = []
        for stage in resnet.encoder.stages[:2]:
            x = stage(x)
            maps.append(x)
        return maps

    def loss(generator: torch.Generator) -> Tensor:
        i = torch.randint(len(data.train_images), (settings.batch_size,), generator=generator)
        pixels = scaled(data.train_images[i])
        posterior = model.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        decoded = model.decode(posterior.mean + posterior.std * noise).sample
        with torch.no_grad():
            target = feature_maps(pixels)
        features = torch.stack([F.l1_loss(a, b) for a, b in zip(feature_maps(decoded), target, strict=True)]).sum()
        kl = posterior.kl().mean()
        return F.l1_loss(decoded, pixels) + settings.feature_weight * features + settings.kl_weight * kl

    fit("autoencoder", model, loss, settings, folder, config.seed + 2, config.checkpoint_seconds)
    mean, std = encode(model, data.train_images[:5000])
    model.register_to_config(scaling_factor=float(1 / (mean + std * torch.randn(std.shape)).std()))
    with atomic(folder / "autoencoder") as part:
        model.save_pretrained(part)


def load_autoencoder(folder: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(folder / "autoencoder").eval().requires_grad_(False)


@torch.no_grad()
def encode(model: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents of uint8 images, before scaling, on the CPU."""
    posteriors = [model.encode(scaled(part).to(model.device)).latent_dist for part in images.split(500)]
    return torch.cat([p.mean.cpu() for p in posteriors]), torch.cat([p.std.cpu() for p in posteriors])


@torch.no_grad()
def decode(model: AutoencoderKL, latents: Tensor) -> Tensor:
    """uint8 images of unscaled latents."""
    return torch.cat([as_uint8(model.decode(part).sample) for part in latents.split(500)])
