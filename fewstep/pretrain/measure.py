"""The figures and the picture of the data card."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import ResNetForImageClassification

from fewstep import io
from fewstep.data.fashion import CLASSES, caption
from fewstep.evaluate.metrics.frechet import frechet_distance
from fewstep.evaluate.statistics import Moments, load_moments, moments
from fewstep.pretrain.autoencoder import decode, encode, load_autoencoder
from fewstep.pretrain.classifier import features_and_logits, load_classifier
from fewstep.pretrain.clip import clip_scores, load_clip
from fewstep.pretrain.config import TeacherTraining
from fewstep.pretrain.data import Data
from fewstep.pretrain.loop import best_device

BLURS = (0.5, 1.0, 2.0)
NOISES = (10.0, 20.0, 40.0)


def sample(pipeline: StableDiffusionPipeline, labels: Tensor, guidance_scale: float, steps: int, seed: int) -> Tensor:
    """uint8 images of the first caption template, by the pipeline's own call."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    images = []
    for part in tqdm(labels.split(250), f"guidance {guidance_scale:g}"):
        result = pipeline(
            prompt=[caption(int(label)) for label in part],
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=generator,
            output_type="pt",
        )
        images.append((result.images * 255).round().to("cpu", torch.uint8))
    return torch.cat(images)


def blurred(images: Tensor, sigma: float) -> Tensor:
    x = torch.arange(-6, 7).float()
    kernel = torch.exp(-x.square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).repeat(3, 1, 1, 1)
    y = F.conv2d(images.float(), kernel.view(3, 1, 13, 1), padding=(6, 0), groups=3)
    y = F.conv2d(y, kernel.view(3, 1, 1, 13), padding=(0, 6), groups=3)
    return y.round().clamp(0, 255).to(torch.uint8)


def noised(images: Tensor, sigma: float, seed: int) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (images + sigma * noise).round().clamp(0, 255).to(torch.uint8)


def judge(
    classifier: ResNetForImageClassification, reference: Moments, images: Tensor, labels: Tensor
) -> tuple[float, float]:
    """FID against the reference and class accuracy."""
    features, logits = features_and_logits(classifier, images)
    accuracy = (logits.argmax(1) == labels).double().mean()
    return round(frechet_distance(moments(features), reference), 3), round(float(accuracy), 4)


def balanced(n: int) -> Tensor:
    return torch.arange(n) % len(CLASSES)


def balanced_subset(labels: Tensor, n: int) -> Tensor:
    """Positions of the first n / 10 images of each class."""
    return torch.cat([(labels == label).nonzero()[: n // len(CLASSES), 0] for label in range(len(CLASSES))])


def grid(images: Tensor, columns: int, zoom: int = 2) -> Image.Image:
    rows = [torch.cat(list(row[:, 0]), 1) for row in images.split(columns)]
    picture = Image.fromarray(torch.cat(rows).numpy())
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)


class Judges:
    """The trained scorers of a run, and its test images with their reconstructions."""

    def __init__(self, config: TeacherTraining, data: Data, folder: Path) -> None:
        self.config, self.settings = config, config.measure
        self.classifier = load_classifier(folder)
        self.clip, self.tokenizer = load_clip(folder)
        self.reference = load_moments(folder / "reference.safetensors")
        self.test, self.labels = data.test_images, data.test_labels
        vae = load_autoencoder(folder)
        self.reconstructions = decode(vae, encode(vae, self.test)[0])

    def judge(self, images: Tensor, labels: Tensor) -> tuple[float, float]:
        return judge(self.classifier, self.reference, images, labels)


def scorer_figures(j: Judges) -> dict[str, object]:
    """Scores of real, reconstructed, blurred and noised test images."""
    test, labels, seed = j.test, j.labels, j.config.seed
    similarity = clip_scores(j.clip, j.tokenizer, test, [caption(label) for label in range(len(CLASSES))])
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    rows = torch.arange(len(test))
    real_fid, accuracy = j.judge(test, labels)
    few, few_labels = test[:1000], labels[:1000]
    return {
        "classifier_accuracy": accuracy,
        "clip_zero_shot_accuracy": round(float((similarity.argmax(1) == labels).double().mean()), 4),
        "clip_score_matched": round(float(similarity[rows, labels].mean()), 4),
        "clip_score_shuffled": round(float(similarity[rows, shuffled].mean()), 4),
        "fid_real_test": real_fid,
        "real_test_count": len(test),
        "fid_reconstructions": j.judge(j.reconstructions, labels)[0],
        "reconstruction_l1": round(float((j.reconstructions.float() - test.float()).abs().mean() / 127.5), 4),
        "degraded_count": len(few),
        "fid_undegraded": j.judge(few, few_labels)[0],
        "fid_blurred": {str(s): j.judge(blurred(few, s), few_labels)[0] for s in BLURS},
        "fid_noised": {str(s): j.judge(noised(few, s, seed), few_labels)[0] for s in NOISES},
    }


def guidance_sweep(j: Judges, pipeline: StableDiffusionPipeline) -> dict[str, dict[str, float]]:
    """FID and class accuracy of a few samples at each guidance scale."""
    labels, sweep = balanced(j.settings.sweep_samples), {}
    for scale in j.settings.guidance_scales:
        images = sample(pipeline, labels, scale, j.settings.steps, j.config.seed)
        fid, accuracy = j.judge(images, labels)
        sweep[str(scale)] = {"fid": fid, "class_accuracy": accuracy}
        print(scale, sweep[str(scale)], flush=True)
    return sweep


def recommended(sweep: dict[str, dict[str, float]], class_accuracy: float) -> float:
    """The scale with the lowest FID among the accurate ones; where none is, the most accurate."""
    accurate = [scale for scale, row in sweep.items() if row["class_accuracy"] >= class_accuracy]
    if accurate:
        return float(min(accurate, key=lambda scale: sweep[scale]["fid"]))
    return float(max(sweep, key=lambda scale: sweep[scale]["class_accuracy"]))


def teacher_figures(j: Judges, images: Tensor, labels: Tensor) -> dict[str, object]:
    """The teacher's samples beside as many balanced test images, for FID falls with number and balance."""
    fid, accuracy = j.judge(images, labels)
    matched = balanced_subset(j.labels, len(labels))
    return {
        "fid_teacher": fid,
        "fid_reconstructions_as_many": j.judge(j.reconstructions[matched], j.labels[matched])[0],
        "fid_real_test_as_many": j.judge(j.test[matched], j.labels[matched])[0],
        "teacher_class_accuracy": accuracy,
        "teacher_samples": j.settings.samples,
        "teacher_steps": j.settings.steps,
    }


def picture(j: Judges, images: Tensor, labels: Tensor) -> Image.Image:
    """A row of samples for each class, then test images above their reconstructions."""
    columns = min(16, len(labels) // len(CLASSES), len(j.test))
    rows = [images[labels == label][:columns] for label in range(len(CLASSES))]
    return grid(torch.cat([*rows, j.test[:columns], j.reconstructions[:columns]]), columns)


def measure(config: TeacherTraining, data: Data, folder: Path) -> None:
    j, settings = Judges(config, data, folder), config.measure
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "pipeline").to(best_device())
    figures = scorer_figures(j)
    print(json.dumps(figures, indent=2), flush=True)
    sweep = guidance_sweep(j, pipeline)
    best = recommended(sweep, settings.class_accuracy)
    labels = balanced(settings.samples)
    images = sample(pipeline, labels, best, settings.steps, config.seed + 1)
    picture(j, images, labels).save(folder / "samples.png")
    asset = {
        "guidance_scale": best,
        "steps": settings.steps,
        "resolution": 32,
        "prediction_type": config.denoiser.prediction_type,
        "classes": list(CLASSES),
        "figures": figures
        | {"guidance_sweep": {"samples": settings.sweep_samples, **sweep}}
        | teacher_figures(j, images, labels),
    }
    io.write_json(asset, folder / "asset.json")
