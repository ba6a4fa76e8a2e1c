"""LPIPS (Zhang et al. 2018) on decoded samples."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from fewstep.diffusion.shapes import Images, PerSample
from fewstep.errors import MissingError

SIDE = 224
"""Pixels a side to which smaller images are enlarged: those of the network's own training."""


def load_lpips(key: str = "regression.distance", instead: str = "huber") -> Callable[[Images, Images], PerSample]:
    """The LPIPS distances (VGG16) of two batches of images in about [-1, 1], differentiable.

    key, instead: of the method's config, for the message.
    Raises MissingError where torchvision's weights of VGG16 are neither on this machine nor can be downloaded.
    """
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        metric = LearnedPerceptualImagePatchSimilarity("vgg").requires_grad_(False).eval()
    except (OSError, ImportError, ModuleNotFoundError, RuntimeError) as error:
        raise MissingError(
            f"method.{key}",
            f"lpips without torchvision's weights of VGG16 ({error})",
            "these weights in torch's cache",
            f"Download them, or set it to l2 or {instead}",
        ) from None

    def distance(a: Images, b: Images) -> PerSample:
        metric.to(a.device)
        distances: Tensor = metric.net(*(_enlarged(v).clamp(-1, 1) for v in (a, b)))
        return distances.flatten()

    return distance


def _enlarged(images: Tensor) -> Tensor:
    if min(images.shape[-2:]) >= SIDE:
        return images
    return F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", antialias=True)
