"""A transformer in place of the embedded teacher's UNet: its data, its training, and the figures of its pipeline."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor, nn
from tqdm import tqdm

from fewstep import io
from fewstep.assets import asset_path
from fewstep.data.base import Condition
from fewstep.data.fashion import CLASSES, caption
from fewstep.evaluate import sample
from fewstep.evaluate.generate import condition_kind
from fewstep.evaluate.statistics import load_moments
from fewstep.io import atomic
from fewstep.pretrain.classifier import load_classifier
from fewstep.pretrain.config import TransformerTraining
from fewstep.pretrain.data import load_data
from fewstep.pretrain.denoiser import cached_latents
from fewstep.pretrain.loop import best_device, fit
from fewstep.pretrain.measure import balanced, grid, judge, recommended

ASSET = asset_path("fashion")
IMAGES_PER_CALL = 250
C = TypeVar("C", bound=TransformerTraining)


def load_vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(ASSET / "pipeline" / "vae").eval().requires_grad_(False)


@dataclass(frozen=True)
class Latents:
    """Mean and standard deviation [N, 4, 8, 8] of the training images' latents, scaled as `vae` says, and labels [N]."""

    mean: Tensor
    std: Tensor
    labels: Tensor

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """x0 [n, 4, 8, 8] and labels [n] of random images."""
        i = torch.randint(len(self.mean), (n,), generator=generator)
        noise = torch.randn(self.mean[i].shape, generator=generator)
        return self.mean[i] + self.std[i] * noise, self.labels[i]


def load_latents(config: TransformerTraining, vae: AutoencoderKL, folder: Path, centred: bool = False) -> Latents:
    """Encoded once per run; centred: their mean becomes the `shift_factor` of `vae`."""
    data = load_data(config.limit_images)
    mean, std = cached_latents(vae.to(best_device()), data, folder)
    vae.to("cpu")
    if centred:
        vae.register_to_config(shift_factor=float(mean.mean()))
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
    return Latents((mean - shift) * scale, std * scale, data.train_labels)


def start_at_zero(layers: Iterable[nn.Linear]) -> None:
    """Modulations and last layer at zero make each block the identity at first, as in DiT (Peebles & Xie 2023)."""
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def train(
    config: TransformerTraining, pipeline: DiffusionPipeline, loss: Callable[[torch.Generator], Tensor], folder: Path
) -> None:
    """Fits the pipeline's transformer, which is on its device, and saves the pipeline."""
    fit(
        "denoiser",
        pipeline.transformer,
        loss,
        config.denoiser,
        folder,
        config.seed,
        config.checkpoint_seconds,
        ema_decay=config.ema_decay,
    )
    with atomic(folder / "pipeline") as part:
        pipeline.to("cpu").save_pretrained(part)


def samples(pipeline: DiffusionPipeline, labels: Tensor, guidance_scale: float, steps: int, seed: int) -> Tensor:
    """uint8 images [N, 3, 32, 32] of labels [N], or of their first caption, by the pipeline's own call."""
    prompts = condition_kind(pipeline) == "prompt"
    conditions: list[Condition] = [caption(label) for label in labels.tolist()] if prompts else labels.tolist()
    parts = torch.arange(len(labels)).split(IMAGES_PER_CALL)
    return torch.cat(
        [
            sample(
                pipeline,
                [conditions[i] for i in part],
                part.tolist(),
                steps=steps,
                seed=seed,
                guidance_scale=guidance_scale,
            )
            for part in tqdm(parts, f"guidance {guidance_scale:g}")
        ]
    )


def measure(config: TransformerTraining, folder: Path) -> None:
    """Write figures.json, FID and class accuracy at each guidance scale and at the best of them, and samples.png."""
    settings = config.measure
    pipeline = DiffusionPipeline.from_pretrained(folder / "pipeline").to(best_device())
    classifier, reference = load_classifier(ASSET), load_moments(ASSET / "reference.safetensors")

    def figures(images: Tensor, labels: Tensor) -> dict[str, float]:
        return dict(zip(("fid", "class_accuracy"), judge(classifier, reference, images, labels), strict=True))

    labels, sweep = balanced(settings.sweep_samples), {}
    for scale in settings.guidance_scales:
        images = samples(pipeline, labels, scale, settings.steps, config.seed)
        sweep[str(scale)] = figures(images, labels)
        print(scale, sweep[str(scale)], flush=True)
    best = recommended(sweep, settings.class_accuracy)
    labels = balanced(settings.samples)
    images = samples(pipeline, labels, best, settings.steps, config.seed + 1)
    result = {
        "guidance_scale": best,
        "steps": settings.steps,
        "samples": settings.samples,
        **figures(images, labels),
        "parameters": sum(p.numel() for p in pipeline.transformer.parameters()),
        "guidance_sweep": {"samples": settings.sweep_samples, **sweep},
    }
    print(json.dumps(result, indent=2))
    rows = [images[labels == label][:16] for label in range(len(CLASSES))]
    grid(torch.cat(rows), len(rows[0])).save(folder / "samples.png")
    io.write_json(result, folder / "figures.json")


def run_stages(config: C, train_stage: Callable[[C, Path], None]) -> None:
    """Write the trained pipeline to output_dir/pipeline, then its figures and its samples beside it."""
    folder = config.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    stages: dict[str, Callable[[C, Path], None]] = {"pipeline": train_stage, "figures.json": measure}
    for output, stage in stages.items():
        if (folder / output).exists():
            print(f"{output}: already there")
        else:
            stage(config, folder)
