"""Tiny untrained pipelines from the real classes, seeded, each saved once a session as a folder."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One for each core of this process, to a bound: every one of them holds torch and the session's tiny pipelines."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if config.getoption("usepdb") else min(cores, 8)


def clip_tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=8)


def build_sd(folder: Path, prediction_type: str = "v_prediction", zero_terminal_snr: bool = False) -> Path:
    """A StableDiffusionPipeline of 32x32 images and 4x8x8 latents."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = clip_tokenizer(folder.with_name(folder.name + "_words"))
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 16), norm_num_groups=8, latent_channels=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=8, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, projection_dim=32,
        )
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        prediction_type=prediction_type, timestep_spacing="trailing", steps_offset=1,
        rescale_betas_zero_snr=zero_terminal_snr,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def build_ddpm(folder: Path, channels: int = 3) -> Path:
    """A DDPMPipeline of 16x16 images."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16, in_channels=channels, out_channels=channels, block_out_channels=(16, 32), layers_per_block=1,
        norm_num_groups=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8,
    )  # fmt: skip
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny v-prediction Stable Diffusion."""
    return build_sd(tmp_path_factory.mktemp("pipelines") / "sd")


@pytest.fixture(scope="session")
def tiny_sd_epsilon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny epsilon-prediction Stable Diffusion."""
    return build_sd(tmp_path_factory.mktemp("pipelines") / "sd_epsilon", "epsilon")


@pytest.fixture(scope="session")
def tiny_ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny pixel model in colour."""
    return build_ddpm(tmp_path_factory.mktemp("pipelines") / "ddpm")


@pytest.fixture(scope="session")
def tiny_ddpm_grey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny pixel model with one channel."""
    return build_ddpm(tmp_path_factory.mktemp("pipelines") / "ddpm_grey", channels=1)


@pytest.fixture(scope="session")
def tiny_sd_path(tiny_sd: Path, tiny_sd_epsilon: Path) -> Callable[[str], Path]:
    """Prediction type -> folder of a tiny Stable Diffusion."""
    return {"v_prediction": tiny_sd, "epsilon": tiny_sd_epsilon}.__getitem__


@pytest.fixture(scope="session")
def tiny_ddpm_path(tiny_ddpm: Path) -> Path:
    """Folder of a tiny pixel model in colour, by the name that says so."""
    return tiny_ddpm


@pytest.fixture(scope="session")
def trained_pixels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A DDIMPipeline of 8x8 images that is trained for seconds on two kinds of stripes, and the folder of these."""
    import numpy as np
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
    from PIL import Image

    folder = tmp_path_factory.mktemp("stripes")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    images = []
    for i in range(64):
        line = np.sign(np.sin(np.pi * (np.arange(8) + rng.integers(4)) / 2 + 0.1)) * 90 + rng.normal(0, 5, 8)
        pixels = np.clip(128 + np.broadcast_to(line, (8, 8)), 0, 255).astype(np.uint8)
        images.append(pixels if i % 2 else pixels.T)
        Image.fromarray(images[-1]).convert("RGB").save(folder / "images" / f"{i}.png")
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), add_attention=False,
    )  # fmt: skip
    scheduler = DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False)
    data = torch.from_numpy(np.stack(images)).float()[:, None] / 127.5 - 1
    optimizer = torch.optim.AdamW(unet.parameters(), 5e-3)
    for i in range(300):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - i / 300)
        x0, t = data[torch.randint(64, (24,))], torch.randint(1000, (24,))
        noise = torch.randn_like(x0)
        output = unet(scheduler.add_noise(x0, noise, t), t).sample
        optimizer.zero_grad()
        (output - scheduler.get_velocity(x0, noise, t)).square().mean().backward()
        optimizer.step()
    DDIMPipeline(unet, scheduler).save_pretrained(folder / "pipeline")
    return folder / "pipeline", folder / "images"
