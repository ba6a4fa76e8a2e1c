"""Images to latents and back: an autoencoder's, or the pixels themselves."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fewstep.diffusion.shapes import Images, Latents
from fewstep.errors import FewstepError
from fewstep.teachers.denoiser import Posterior
from fewstep.teachers.placement import Placement

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin


class Codec(ABC):
    """Turns images into what a network denoises, and back.

    Attributes:
        latent_shape: shape of one x0, without the batch: (C, h, w).
        image_size: side of a decoded image in pixels.
    """

    def __init__(self, latent_shape: tuple[int, ...], image_size: int) -> None:
        self.latent_shape, self.image_size = latent_shape, image_size

    @abstractmethod
    def encode(self, images: Images) -> Posterior:
        """Images in [-1, 1] to latents, scaled as the network wants them; H = W = image_size."""

    @abstractmethod
    def decode(self, x0: Latents) -> Images:
        """Latents to images, about [-1, 1]; differentiable."""

    def check(self, images: Images) -> None:
        """Raises ValueError for images of another size."""
        expected = (3, self.image_size, self.image_size)
        if tuple(images.shape[1:]) != expected:
            raise FewstepError("images", f"size {tuple(images.shape[1:])}", f"{expected}, the teacher's")


class Autoencoder(Codec):
    """The `vae` of a pipeline, an AutoencoderKL: x0 = (latent - shift) * scale.

    upcast: whether it runs in float32, whatever the pipeline's type, where its config asks for that (force_upcast).
    """

    def __init__(
        self, placement: Placement, latent_shape: tuple[int, ...], image_size: int, upcast: bool = False
    ) -> None:
        super().__init__(latent_shape, image_size)
        self.placement, self.upcast = placement, upcast

    @property
    def vae(self) -> "ModelMixin":
        """The autoencoder, in a type that holds its activations."""
        own = self.placement.part("vae")
        return self.placement.part_in_float32("vae") if self.upcast and own.config.force_upcast else own

    def encode(self, images: Images) -> Posterior:
        self.check(images)
        vae = self.vae
        with torch.no_grad():
            posterior = vae.encode(images.to(vae.device, vae.dtype)).latent_dist
        scale, shift = vae.config.scaling_factor, vae.config.get("shift_factor") or 0.0
        return Posterior((posterior.mean.float() - shift) * scale, posterior.std.float() * scale)

    def decode(self, x0: Latents) -> Images:
        vae = self.vae
        z = x0.to(vae.dtype) / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
        images: Tensor = vae.decode(z, return_dict=False)[0].float()
        return images


class Pixels(Codec):
    """Square images themselves; of one channel, the mean over colours."""

    def __init__(self, channels: int, image_size: int) -> None:
        super().__init__((channels, image_size, image_size), image_size)

    def encode(self, images: Images) -> Posterior:
        self.check(images)
        x0 = images.float()
        if self.latent_shape[0] == 1:
            x0 = x0.mean(1, keepdim=True)
        return Posterior(x0, torch.zeros_like(x0))

    def decode(self, x0: Latents) -> Images:
        x0 = x0.float()
        return x0.expand(-1, 3, -1, -1) if self.latent_shape[0] == 1 else x0


def square_size(network: "ModelMixin", pipeline: "DiffusionPipeline") -> tuple[int, int]:
    """Sides of a latent and of an image: the network's sample_size, which must be one number, and what the VAE makes of it."""
    side = network.config.sample_size
    if not isinstance(side, int):
        raise FewstepError("teacher", f"sample_size {side}", "one number: square images")
    return side, side * 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
