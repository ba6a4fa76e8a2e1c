"""Training and test images of a run, as tensors."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.data import fashion


@dataclass(frozen=True)
class Data:
    """uint8 images [N, 3, 32, 32] with labels [N]."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_data(limit: int | None = None) -> Data:
    """The whole data set, or its first `limit` training and test images."""
    parts: list[Tensor] = []
    for images, labels in (fashion.load_idx("train"), fashion.load_idx("test")):
        parts += [torch.from_numpy(x[:limit]) for x in (images, labels)]
    return Data(*parts)


def scaled(images: Tensor) -> Tensor:
    """uint8 pixels in [-1, 1]."""
    return images.float() / 127.5 - 1


def as_uint8(images: Tensor) -> Tensor:
    """Pixels in [-1, 1] rounded to uint8, as saving an image does."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def shifted(images: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Each image moved by up to `pixels` in both directions; what leaves on one side is background."""
    n, _, height, width = images.shape
    dy, dx = torch.randint(-pixels, pixels + 1, (2, n, 1), generator=generator)
    rows = (torch.arange(height) + dy) % height
    columns = (torch.arange(width) + dx) % width
    # The two-pixel border is background, so that wrapping around moves in nothing else.
    index = torch.arange(n)[:, None, None]
    return images[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
