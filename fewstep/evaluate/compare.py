"""Two pipelines image by image: same initial noise and conditions, and the distance of each to the teacher's image."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fewstep.data.base import Condition
from fewstep.errors import FewstepError
from fewstep.evaluate.generate import Rounding, sample
from fewstep.evaluate.models.features import ImageFeatures
from fewstep.evaluate.models.view import View, apply_view

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Candidate:
    """A pipeline and how it is called."""

    name: str
    pipeline: "DiffusionPipeline"
    steps: int
    guidance_scale: float | None = None


def draw(
    candidate: Candidate, conditions: Sequence[Condition], *, seed: int, batch_size: int, uint8: Rounding = "round"
) -> Tensor:
    """uint8 [N, 3, H, W], one image per condition; image i has the noise of (seed, i), whoever draws it."""
    parts = []
    for start in range(0, len(conditions), batch_size):
        indices = range(start, min(start + batch_size, len(conditions)))
        parts.append(
            sample(
                candidate.pipeline,
                [conditions[i] for i in indices],
                indices,
                steps=candidate.steps,
                seed=seed,
                guidance_scale=candidate.guidance_scale,
                uint8=uint8,
            )
        )
    return torch.cat(parts)


def distances(a: Tensor, b: Tensor, features: ImageFeatures, view: View, batch_size: int = 64) -> dict[str, Tensor]:
    """Distances of pairs of images, uint8 [N, 3, H, W]: `pixels`, the root mean squared difference in [0, 1], and `features`,
    the Euclidean distance of their features; float64 [N] each. ValueError for images of two sizes.
    """
    if a.shape != b.shape:
        sizes = " and ".join(f"{v.shape[-1]} x {v.shape[-2]}" for v in (a, b))
        raise FewstepError("images", f"{sizes} pixels", "images of one size, to compare pixel by pixel")
    pixels = (a.double() - b.double()).div(255).square().mean((1, 2, 3)).sqrt()
    gaps = [
        (features(apply_view(x, view)).double() - features(apply_view(y, view)).double()).norm(dim=1).cpu()
        for x, y in zip(a.split(batch_size), b.split(batch_size), strict=True)
    ]
    return {"pixels": pixels, "features": torch.cat(gaps)}


def paired(a: Tensor, b: Tensor) -> dict[str, float]:
    """Means of two paired measurements [N], of their difference with its standard error, and how often `a` is smaller."""
    gap = a - b
    error = float(gap.std(unbiased=True)) / math.sqrt(len(gap)) if len(gap) > 1 else math.nan
    wins = (gap < 0).double() + 0.5 * (gap == 0).double()
    return {
        "a": float(a.mean()),
        "b": float(b.mean()),
        "difference": float(gap.mean()),
        "standard_error": error,
        "a_closer": float(wins.mean()),
    }
