"""A small pixel teacher: an unconditional DDIMPipeline on scikit-learn's handwritten digits, in minutes on a CPU."""

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from PIL import Image
from torch import Tensor

from fewstep.io import atomic
from fewstep.pretrain.config import DigitsTraining
from fewstep.pretrain.loop import fit, stratified


def load_digits(image_size: int) -> Tensor:
    """The 1,797 digits of 8x8 pixels (Alpaydin & Kaynak 1998), resized: float32 [N, 1, H, W] in [-1, 1]."""
    from sklearn.datasets import load_digits as load

    images = torch.from_numpy(load().images).float()[:, None] / 8 - 1
    return F.interpolate(images, size=image_size, mode="bilinear", align_corners=False)


def build_unet(config: DigitsTraining) -> UNet2DModel:
    deeper = len(config.channels) - 1
    return UNet2DModel(
        sample_size=config.image_size,
        in_channels=1,
        out_channels=1,
        block_out_channels=config.channels,
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=16,
        down_block_types=("DownBlock2D", *["AttnDownBlock2D"] * deeper),
        up_block_types=(*["AttnUpBlock2D"] * deeper, "UpBlock2D"),
    )


def build_scheduler(config: DigitsTraining) -> DDIMScheduler:
    """Trailing timesteps, so that one step starts at t = 999, where training ends."""
    return DDIMScheduler(
        prediction_type=config.prediction_type, beta_schedule="linear", timestep_spacing="trailing", clip_sample=False
    )


def run(config: DigitsTraining) -> None:
    """Write the images to output_dir/images and the trained pipeline to output_dir/pipeline."""
    folder = config.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    images = load_digits(config.image_size)
    if not (folder / "images").exists():
        with atomic(folder / "images") as part:
            part.mkdir()
            for i, image in enumerate(images):
                pixels = ((image[0] + 1) * 127.5).round().clamp(0, 255).numpy().astype(np.uint8)
                Image.fromarray(pixels).save(part / f"{i:04}.png")
    if (folder / "pipeline").exists():
        print("pipeline: already there")
        return
    torch.manual_seed(config.seed)
    unet, scheduler = build_unet(config), build_scheduler(config)
    settings = config.denoiser

    def loss(generator: torch.Generator) -> Tensor:
        n = settings.batch_size
        x0 = images[torch.randint(len(images), (n,), generator=generator)]
        t = (stratified(n, generator) * 1000).long()
        noise = torch.randn(x0.shape, generator=generator)
        predicted = unet(scheduler.add_noise(x0, noise, t), t).sample
        epsilon = config.prediction_type == "epsilon"
        return F.mse_loss(predicted, noise if epsilon else scheduler.get_velocity(x0, noise, t))

    fit("denoiser", unet, loss, settings, folder, config.seed, config.checkpoint_seconds, ema_decay=config.ema_decay)
    with atomic(folder / "pipeline") as part:
        DDIMPipeline(unet=unet, scheduler=scheduler).save_pretrained(part)
