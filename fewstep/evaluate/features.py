"""Image features: a transformers backbone behind its own preprocessing, done in torch and in float32."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.assets import ASSETS, asset_path

RESAMPLE = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}
"""PIL's numbers of the filters that torch has too."""


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size["height"], size["width"])


class Preprocess(nn.Module):
    """What a folder's image processor does, batched: uint8 [B, 3, H, W] -> float32 [B, 3, h, w].

    Resizing is not rounded to uint8 afterwards, and is antialiased where it shrinks.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.size = config["size"] if config.get("do_resize", True) else None
        self.crop = _pair(config["crop_size"]) if config.get("do_center_crop", False) else None
        resample = config.get("resample", 2)
        if resample not in RESAMPLE:
            raise ValueError(f"preprocessor: resample {resample} is not one of {sorted(RESAMPLE)}")
        self.mode = RESAMPLE[resample]
        self.factor = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0
        normalize = config.get("do_normalize", True)
        mean, std = (config["image_mean"], config["image_std"]) if normalize else ([0.0] * 3, [1.0] * 3)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def _target(self, height: int, width: int) -> tuple[int, int]:
        match self.size:
            case None:
                return height, width
            case {"shortest_edge": int(edge)}:
                scale = edge / min(height, width)
                return round(height * scale), round(width * scale)
            case size:
                return _pair(size)

    def forward(self, images: Tensor) -> Tensor:
        x = images.float()
        height, width = x.shape[-2:]
        target = self._target(height, width)
        if target != (height, width):
            if self.mode == "nearest-exact":
                x = F.interpolate(x, size=target, mode=self.mode)
            else:
                shrinks = target[0] < height or target[1] < width
                x = F.interpolate(x, size=target, mode=self.mode, align_corners=False, antialias=shrinks)
            # Bicubic overshoots.
            x = x.clamp(0, 255)
        if self.crop is not None:
            top, left = (x.shape[-2] - self.crop[0]) // 2, (x.shape[-1] - self.crop[1]) // 2
            if top < 0 or left < 0:
                raise ValueError(f"preprocessor: a crop of {self.crop} does not fit into {tuple(x.shape[-2:])}")
            x = x[..., top : top + self.crop[0], left : left + self.crop[1]]
        return (x * self.factor - self.mean) / self.std


def load_preprocess(folder: Path) -> Preprocess:
    """The preprocessing of a folder: preprocessor_config.json, or transformers 5's processor_config.json."""
    old, new = folder / "preprocessor_config.json", folder / "processor_config.json"
    if old.exists():
        return Preprocess(json.loads(old.read_text()))
    if new.exists():
        return Preprocess(json.loads(new.read_text())["image_processor"])
    raise ValueError(f"{folder} has no preprocessor_config.json, which says how images are resized and normalised")


class ImageFeatures(nn.Module):
    """Pooled features: uint8 images [B, 3, H, W] -> float32 [B, D]."""

    def __init__(self, name: str, backbone: nn.Module, preprocess: Preprocess) -> None:
        super().__init__()
        self.name, self.backbone, self.preprocess = name, backbone, preprocess
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be uint8 [B, 3, H, W], got {images.dtype} {list(images.shape)}")
        output = self.backbone(pixel_values=self.preprocess(images.to(self.preprocess.mean.device)))
        pooled: Tensor | None = output.pooler_output
        if pooled is None:
            raise ValueError(f"features {self.name!r}: {type(self.backbone).__name__} has no pooled output")
        return pooled.flatten(1).float()


def features_folder(name: str) -> Path:
    """An asset's classifier, or the folder of that name."""
    if name in ASSETS:
        return asset_path(name) / "classifier"
    if not (Path(name) / "config.json").exists():
        raise ValueError(f"features {name!r}: neither one of {', '.join(ASSETS)} nor a folder of a transformers model")
    return Path(name)


def load_features(name: str) -> ImageFeatures:
    """`fashion`, or the folder of a transformers image model with pooled output and its image processor's config.

    Raises ValueError where the folder lacks weights of the backbone, which transformers would otherwise fill at random.
    """
    from transformers import AutoModel
    from transformers.utils import logging

    folder = features_folder(name)
    verbosity = logging.get_verbosity()
    # A classifier's head is not a feature: that it goes unused is no news.
    logging.set_verbosity_error()
    try:
        backbone, info = AutoModel.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, dtype=torch.float32
        )
    finally:
        logging.set_verbosity(verbosity)
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ValueError(f"{folder} lacks weights of {type(backbone).__name__}: {missing}")
    return ImageFeatures(name, backbone, load_preprocess(folder))
