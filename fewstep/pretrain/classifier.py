"""Stage 1: the classifier whose pooled features FID is measured in."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from fewstep.data.fashion import CLASSES
from fewstep.io import atomic
from fewstep.pretrain.config import TeacherTraining
from fewstep.pretrain.data import Data, scaled, shifted
from fewstep.pretrain.loop import fit

SIZE = 64
"""The stem strides by four: images are doubled first, or 32 pixels would leave an 8x8 map."""


def enlarged(images: Tensor) -> Tensor:
    return F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", align_corners=False)


def train_classifier(config: TeacherTraining, data: Data, folder: Path) -> None:
    torch.manual_seed(config.seed)
    model = ResNetForImageClassification(
        ResNetConfig(
            embedding_size=32,
            hidden_sizes=[32, 64, 128],
            depths=[1, 2, 2],
            layer_type="basic",
            id2label=dict(enumerate(CLASSES)),
            label2id={name: i for i, name in enumerate(CLASSES)},
        )
    ).to(memory_format=torch.channels_last)

    def loss(generator: torch.Generator) -> Tensor:
        i = torch.randint(len(data.train_images), (config.classifier.batch_size,), generator=generator)
        pixels = scaled(shifted(data.train_images[i], 1, generator))
        pixels = enlarged(pixels).contiguous(memory_format=torch.channels_last)
        return F.cross_entropy(model(pixels).logits, data.train_labels[i], label_smoothing=0.05)

    fit("classifier", model, loss, config.classifier, folder, config.seed, config.checkpoint_seconds)
    processor = ViTImageProcessor(
        size={"height": SIZE, "width": SIZE}, resample=2, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    with atomic(folder / "classifier") as part:
        processor.save_pretrained(part)
        model.save_pretrained(part)


def load_classifier(folder: Path) -> ResNetForImageClassification:
    return ResNetForImageClassification.from_pretrained(folder / "classifier").eval().requires_grad_(False)


@torch.no_grad()
def features_and_logits(
    model: ResNetForImageClassification, images: Tensor, batch_size: int = 500
) -> tuple[Tensor, Tensor]:
    """Pooled features [N, 128] and logits of uint8 images."""
    pooled, logits = [], []
    for part in images.split(batch_size):
        features = model.resnet(enlarged(scaled(part))).pooler_output
        pooled.append(features.flatten(1))
        logits.append(model.classifier(features))
    return torch.cat(pooled), torch.cat(logits)
