"""Distances and diversities of two sets of features, in float64 and in blocks. Pure functions of tensors."""

import math

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import FewstepError

BLOCK = 1024
"""Rows at a time: what is held of a matrix of pairs."""


def kernel_distance(
    generated: Tensor, real: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> float:
    """KID: the mean over random subsets of the unbiased MMD^2 with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018).

    generated [N, D], real [M, D]. Subsets, drawn as torch-fidelity draws them, are at most as large as the smaller set.
    """
    _check(generated, real)
    size = min(subset_size, len(generated), len(real))
    if size < 2:
        raise FewstepError("kid", f"{size} image", "at least 2, generated and real", "Raise --num-images")
    rng = np.random.RandomState(seed)
    total = 0.0
    for _ in range(subsets):
        x = generated[torch.from_numpy(rng.choice(len(generated), size, replace=False))].double()
        y = real[torch.from_numpy(rng.choice(len(real), size, replace=False))].double()
        total += float(_mean_off_diagonal(_cubic(x, x)) + _mean_off_diagonal(_cubic(y, y)) - 2 * _cubic(x, y).mean())
    return total / subsets


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _mean_off_diagonal(kernel: Tensor) -> Tensor:
    n = len(kernel)
    return (kernel.sum() - kernel.trace()) / (n * (n - 1))


def cmmd(generated: Tensor, real: Tensor, *, sigma: float = 10.0) -> float:
    """1000 times the biased MMD^2 of unit vectors with exp(-|x - y|^2 / (2 sigma^2)) (Jayasumana et al. 2024, CMMD).

    generated [N, D], real [M, D]: CLIP's image embeddings, normalised here.
    """
    _check(generated, real)
    x, y = (torch.nn.functional.normalize(v.double(), dim=1) for v in (generated, real))

    def mean(a: Tensor, b: Tensor) -> float:
        # |a - b|^2 of unit vectors; expm1 keeps the digits that a kernel near 1 would lose.
        sums = [torch.expm1((block @ b.T - 1) / sigma**2).sum() for block in a.split(BLOCK)]
        return float(torch.stack(sums).sum()) / (len(a) * len(b))

    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


def precision_recall(generated: Tensor, real: Tensor, *, nearest_k: int) -> tuple[float, float]:
    """Part of the generated that lie within some real image's distance to its k-th neighbour, and the reverse.

    Kynkäänniemi et al. 2019. generated [N, D], real [M, D].
    """
    _check(generated, real, nearest_k)
    x, y = generated.double(), real.double()
    precision = _within(x, y, _radii(y, nearest_k)).gt(0).double().mean()
    recall = _within(y, x, _radii(x, nearest_k)).gt(0).double().mean()
    return float(precision), float(recall)


def density_coverage(generated: Tensor, real: Tensor, *, nearest_k: int) -> tuple[float, float]:
    """Mean number of real balls around a generated image over k, and the part of real balls that hold one (Naeem et al. 2020)."""
    _check(generated, real, nearest_k)
    x, y = generated.double(), real.double()
    radii = _radii(y, nearest_k)
    density = _within(x, y, radii).double().mean() / nearest_k
    nearest = torch.cat([torch.cdist(block, x).amin(1) for block in y.split(BLOCK)])
    return float(density), float((nearest <= radii).double().mean())


def _radii(points: Tensor, k: int) -> Tensor:
    """Distance of each point to its k-th neighbour, itself not counted: [N]."""
    return torch.cat([torch.cdist(block, points).kthvalue(k + 1, dim=1).values for block in points.split(BLOCK)])


def _within(points: Tensor, centres: Tensor, radii: Tensor) -> Tensor:
    """Count the balls around each point: [N]."""
    return torch.cat([(torch.cdist(block, centres) <= radii).sum(1) for block in points.split(BLOCK)])


def _check(generated: Tensor, real: Tensor, nearest_k: int = 0) -> None:
    if generated.shape[1] != real.shape[1]:
        raise FewstepError(
            "features",
            f"{generated.shape[1]} dimensions of generated and {real.shape[1]} of real images",
            "the same features of both",
            "Make the reference again with these features",
        )
    if min(len(generated), len(real)) <= nearest_k:
        raise FewstepError(
            "nearest_k",
            f"{nearest_k} for {min(len(generated), len(real))} images",
            "fewer neighbours than images",
            "Raise --num-images",
        )


def inception_score(count: Tensor, entropy: Tensor, mass: Tensor) -> tuple[float, float]:
    """Mean and standard deviation over parts of exp(mean KL(p(y|x) || p(y))) (Salimans et al. 2016).

    Of each part: count [S] of images, the sum of p log p over images and classes [S], and the sum of p [S, C].
    """
    marginal = mass / count[:, None]
    scores = (entropy / count - torch.special.xlogy(marginal, marginal).sum(1)).exp()
    return float(scores.mean()), math.sqrt(float((scores - scores.mean()).square().mean()))


def diversity(count: Tensor, total: Tensor) -> float:
    """Mean over groups of the mean of 1 - cosine over pairs of a group; groups of one are left out.

    Of each group: count [G], and the sum of its unit vectors [G, D], whose square is the sum of all cosines.
    """
    several = count > 1
    if not several.any():
        raise FewstepError(
            "diversity", "one image of each prompt or label", "conditions drawn more than once", "Raise --num-images"
        )
    n, squared = count[several], total[several].square().sum(1)
    return float((1 - (squared - n) / (n * (n - 1))).mean())
