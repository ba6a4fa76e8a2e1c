"""LPIPS (Zhang et al. 2018) on decoded samples, where the weights of its network are at hand."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

SIDE = 224
"""Pixels a side to which smaller images are enlarged: those of the network's own training."""


def load_lpips(key: str = "regression_distance", instead: str = "huber") -> Callable[[Tensor, Tensor], Tensor]:
    """The LPIPS distances (VGG16) [B] of two batches of images [B, 3, H, W] in about [-1, 1], differentiable.

    key, instead: of the method's config, for the message.
    Raises ValueError where torchvision's weights of VGG16 are neither on this machine nor to be had.
    """
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        metric = LearnedPerceptualImagePatchSimilarity("vgg").requires_grad_(False).eval()
    except (OSError, ImportError, ModuleNotFoundError, RuntimeError) as error:
        raise ValueError(
            f"method.{key}: lpips needs torchvision's weights of VGG16, which are not at hand ({error}); take l2 or {instead}"
        ) from None

    def distance(a: Tensor, b: Tensor) -> Tensor:
        metric.to(a.device)
        return metric.net(*(_enlarged(v).clamp(-1, 1) for v in (a, b))).flatten()  # type: ignore[no-any-return]

    return distance


def _enlarged(images: Tensor) -> Tensor:
    if min(images.shape[-2:]) >= SIDE:
        return images
    return F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", antialias=True)
