"""Views of images before a network sees them: a central part, resized by PIL and rounded, as in the papers' scripts."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.evaluate.protocol import View

FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
}


def apply_view(images: Tensor, view: View) -> Tensor:
    """uint8 [B, 3, H, W] -> uint8 [B, 3, h, w]; ValueError for a crop that is larger than the images."""
    height, width = images.shape[-2:]
    if view.crop is not None:
        side = min(height, width) if view.crop == "square" else view.crop
        if side > min(height, width):
            raise FewstepError(
                "view.crop", f"{side} for images of {width} x {height} pixels", "at most the images' size"
            )
        top, left = (height - side) // 2, (width - side) // 2
        images = images[..., top : top + side, left : left + side]
    if view.size is None or images.shape[-2:] == (view.size, view.size):
        return images
    resized = [_resize(image, view.size, FILTERS[view.filter]) for image in images.cpu()]
    return torch.stack(resized).to(images.device)


def _resize(image: Tensor, size: int, resample: Image.Resampling) -> Tensor:
    picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    return torch.from_numpy(np.array(picture.resize((size, size), resample))).permute(2, 0, 1)
