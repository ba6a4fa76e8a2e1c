"""Tiny untrained pipelines from the real classes, seeded, each saved once a session as a folder."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from builders import shapes

shapes.install()  # before the first import of what it checks

from builders.pipelines import build_ddpm, build_sd  # noqa: E402

torch.set_num_threads(1)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One for each core of this process, to a bound: every one of them holds torch and the session's tiny pipelines."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if config.getoption("usepdb") else min(cores, 8)


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
