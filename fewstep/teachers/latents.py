"""Images to latents and back by the autoencoder that all families of latent diffusion share, AutoencoderKL."""

from typing import Any

import torch
from torch import Tensor

from fewstep.teachers.denoiser import Posterior


def encode_images(vae: Any, images: Tensor, image_size: int) -> Posterior:
    """Images [B, 3, H, W] in [-1, 1] to x0 = (latent - shift) * scale. Raises ValueError for another size."""
    expected = (3, image_size, image_size)
    if tuple(images.shape[1:]) != expected:
        raise ValueError(f"images are {tuple(images.shape[1:])}; the teacher takes {expected}")
    with torch.no_grad():
        posterior = vae.encode(images.to(vae.device, vae.dtype)).latent_dist
    scale, shift = vae.config.scaling_factor, vae.config.get("shift_factor") or 0.0
    return Posterior((posterior.mean.float() - shift) * scale, posterior.std.float() * scale)


def decode_latents(vae: Any, x0: Tensor) -> Tensor:
    """x0 [B, C, h, w] to images [B, 3, H, W], about [-1, 1]; differentiable."""
    z = x0.to(vae.dtype) / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
    images: Tensor = vae.decode(z, return_dict=False)[0].float()
    return images


def square_size(network: Any, pipeline: Any) -> tuple[int, int]:
    """Sides of a latent and of an image: the network's sample_size, which must be one number, and what the VAE makes of it."""
    side = network.config.sample_size
    if not isinstance(side, int):
        raise ValueError(f"the teacher's sample_size is {side}; only square images are supported")
    return side, side * 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
