"""What generated images are compared with: a reference's moments, its features, its prompts and its CLIP."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.assets import ASSETS, asset_path
from fewstep.evaluate.clip_score import Clip, load_clip
from fewstep.evaluate.features import ImageFeatures, load_features
from fewstep.evaluate.frechet import Moments, load_moments, moments
from fewstep.evaluate.generate import ConditionKind
from fewstep.fashion import CLASSES, caption

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@dataclass(frozen=True)
class Sources:
    """What a comparison is made of, by name: resolved and checked, nothing loaded yet.

    reference: `fashion`, or a .safetensors or .npz file of moments, or a folder of images.
    features, clip: `fashion` or a folder; clip is None for no CLIP score.
    prompts: a text file with one prompt a line; None for the captions of `fashion`.
    """

    reference: str
    features: str
    clip: str | None
    prompts: Path | None


def resolve(
    reference: str, features: str | None = None, clip: str | None = None, prompts: Path | str | None = None
) -> Sources:
    """Fills in what the asset's reference implies; ValueError, in one sentence, for what is missing.

    clip: "none" turns the CLIP score off; None is the asset's own CLIP, or off for any other reference.
    """
    if prompts is not None and not Path(prompts).is_file():
        raise ValueError(f"prompts {str(prompts)!r} is not a file")
    file = None if prompts is None else Path(prompts)
    if reference in ASSETS:
        clip = None if clip == "none" else clip or reference
        if not (asset_path(reference) / "reference.safetensors").exists():
            raise ValueError(f"reference {reference!r}: this installation lacks its reference.safetensors")
        return Sources(reference, features or reference, clip, file)
    path = Path(reference)
    if not path.exists():
        raise ValueError(
            f"reference {reference!r} is neither bundled ({', '.join(ASSETS)}) nor a path: data sets from the hub "
            "are not bundled, so give the path of its statistics (.npz with mu and sigma, .safetensors) or of a folder "
            "of images"
        )
    if path.is_file() and path.suffix not in (".npz", ".safetensors"):
        raise ValueError(f"reference {reference!r}: a file of statistics ends in .npz or .safetensors")
    if features is None:
        raise ValueError(f"reference {reference!r} needs features: the folder of the extractor it is compared in")
    return Sources(reference, features, None if clip == "none" else clip, file)


def _read(file: Path) -> Tensor:
    with Image.open(file) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _folder_features(folder: Path, features: ImageFeatures, batch_size: int = 64) -> Iterable[Tensor]:
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)
    for start in range(0, len(files), batch_size):
        images = [_read(f) for f in files[start : start + batch_size]]
        # Images of one size go through together; others one by one, since each is resized by itself.
        if len({image.shape for image in images}) == 1:
            yield features(torch.stack(images)).cpu()
        else:
            yield from (features(image[None]).cpu() for image in images)


def folder_moments(folder: Path, features: ImageFeatures) -> Moments:
    """Moments of all images under a folder; ValueError for fewer than two."""
    parts = list(_folder_features(folder, features))
    if not parts:
        raise ValueError(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return moments(torch.cat(parts))


@dataclass(frozen=True)
class Reference:
    """A loaded `Sources`."""

    sources: Sources
    moments: Moments
    features: ImageFeatures
    clip: Clip | None


def load_reference(sources: Sources, device: torch.device) -> Reference:
    features = load_features(sources.features).to(device)
    if sources.reference in ASSETS:
        m = load_moments(asset_path(sources.reference) / "reference.safetensors")
    elif (path := Path(sources.reference)).is_dir():
        m = folder_moments(path, features)
    else:
        m = load_moments(path)
    clip = None if sources.clip is None else load_clip(sources.clip).to(device)
    return Reference(sources, m, features, clip)


@dataclass(frozen=True)
class Subjects:
    """What image `index` shows: its condition for the pipeline, and its prompt for CLIP (None where there is none)."""

    conditions: Sequence[Any]
    prompts: Sequence[str] | None


def subjects(sources: Sources, kind: ConditionKind, num_images: int, num_labels: int | None) -> Subjects:
    """Conditions of images 0 ... num_images - 1; prompts and classes repeat in order, so they are balanced.

    Raises ValueError for a pipeline that wants prompts where the reference brings none.
    """
    fashion = sources.reference == "fashion"
    prompts: list[str] | None = None
    if sources.prompts is not None:
        lines = [line.strip() for line in sources.prompts.read_text().splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"prompts {str(sources.prompts)!r} holds no prompt")
        prompts = [lines[i % len(lines)] for i in range(num_images)]
    elif fashion:
        prompts = [caption(i % len(CLASSES)) for i in range(num_images)]
    match kind:
        case "prompt" if prompts is None:
            raise ValueError(f"reference {sources.reference!r} brings no prompts: give a file with one prompt a line")
        case "prompt":
            return Subjects(prompts or [], prompts)
        case "label":
            classes = len(CLASSES) if fashion else num_labels
            if classes is None:
                raise ValueError("the pipeline does not say how many classes it has")
            # The captions of a prompts file need not be those of the labels; those of `fashion` are.
            return Subjects([i % classes for i in range(num_images)], None if sources.prompts else prompts)
        case "none":
            return Subjects([None] * num_images, None)
