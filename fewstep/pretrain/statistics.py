"""Feature statistics of an image set and the Fréchet distance between two."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

DDOF = 1


@dataclass(frozen=True)
class Statistics:
    mean: Tensor
    covariance: Tensor


def statistics(features: Tensor) -> Statistics:
    features = features.double()
    return Statistics(features.mean(0), features.T.cov(correction=DDOF))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """FID of two sets of features."""
    # tr sqrt(A B) = tr sqrt(A^1/2 B A^1/2), and that product is symmetric: real eigenvalues only.
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    squared = (a.mean - b.mean).square().sum()
    return float(squared + a.covariance.trace() + b.covariance.trace() - 2 * cross)


def save_statistics(stats: Statistics, file: Path, metadata: dict[str, str]) -> None:
    tensors = {"mean": stats.mean.contiguous(), "covariance": stats.covariance.contiguous()}
    save_file(tensors, file, metadata={"ddof": str(DDOF), **metadata})


def load_statistics(file: Path) -> Statistics:
    tensors = load_file(file)
    return Statistics(tensors["mean"], tensors["covariance"])
