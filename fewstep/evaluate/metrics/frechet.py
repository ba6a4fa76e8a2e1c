"""The Fréchet distance between two Gaussians fitted to image features: FID, in whatever features are given.

Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium".
"""

import functools
import logging

import torch
from torch import Tensor
from torchmetrics import Metric

from fewstep.errors import FewstepError
from fewstep.evaluate.models.features import ImageFeatures
from fewstep.evaluate.statistics import Moments, moments

log = logging.getLogger(__name__)


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 sqrt(A B)), in float64; a warning where A or B has fewer images than would fill it.

    Raises ValueError for moments of two numbers of dimensions, or that are not finite.
    """
    for m in (a, b):
        warn_few(m.count, len(m.mean))
    return _distance(a, b)


@functools.cache
def warn_few(count: int | None, dimensions: int) -> None:
    """Warn, once in a process, of too few images for a covariance of full rank; None = unknown number."""
    if count is not None and count <= dimensions:
        log.warning(
            "covariance: found %d images; expected more than the %d dimensions of the features. Compare this FID with others of "
            "as many images only",
            count,
            dimensions,
        )


def _distance(a: Moments, b: Moments) -> float:
    if a.mean.shape != b.mean.shape:
        raise FewstepError(
            "features",
            f"{len(a.mean)} and {len(b.mean)} dimensions",
            "the same features of both",
            "Make the reference again with these features",
        )
    if not all(v.isfinite().all() for m in (a, b) for v in (m.mean, m.covariance)):
        raise FewstepError(
            "features",
            "a mean or a covariance that is not finite",
            "finite moments",
            "Check the images and the reference",
        )
    traces = a.covariance.trace() + b.covariance.trace()
    squared = (a.mean - b.mean).square().sum()
    # What never varies in one of them, as a feature that never fires, adds nothing to the root of A B.
    varies = _varies(a) & _varies(b)
    if not varies.all():
        a, b = (Moments(m.mean[varies], m.covariance[varies][:, varies], m.count) for m in (a, b))
    (root, full), (other, other_full) = _root(a), _root(b)
    if full and other_full:
        # tr sqrt(A B) = tr sqrt(R' B R) with A = R R', whose argument is symmetric: no complex parts.
        product = root.T @ b.covariance @ root
        cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    else:
        # With B = S S' too these are the singular values of R' S.
        cross = _nuclear_norm(root.T @ other, 2e-9 * traces)
    return max(0.0, float(squared + traces - 2 * cross))


def _varies(m: Moments) -> Tensor:
    """[D], False where the variance is no more than rounding."""
    variance = m.covariance.diagonal()
    return variance > torch.finfo(variance.dtype).eps * variance.max()


def frechet_infinity(generated: Tensor, real: Moments, *, points: int = 15, seed: int = 0) -> float:
    """The distance that infinitely many generated images would have: FID's bias falls as 1 / N (Chong and Forsyth 2020).

    generated [N, D]. The value at 1 / N = 0 of the line through the distances of `points` random subsets, of sizes even from
    min(5000, N / 10) to N. What is extrapolated is the number of generated images; the reference is unchanged.
    """
    n = len(generated)
    if n < 20:
        raise FewstepError("fid_infinity", f"{n} images", "at least 20", "Raise --num-images")
    g = torch.Generator().manual_seed(seed)
    sizes = torch.linspace(min(5000, n // 10), n, points).long().tolist()
    warn_few(real.count, len(real.mean))
    values = [_distance(moments(generated[torch.randperm(n, generator=g)[:size]]), real) for size in sizes]
    x, y = 1 / torch.tensor(sizes).double(), torch.tensor(values).double()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return float(y.mean() - slope * x.mean())


def _nuclear_norm(m: Tensor, tolerance: Tensor) -> Tensor:
    """Sum of the singular values: from their squares, which is five times as quick, where that errs by no more than `tolerance`.

    Rounding moves the squares by `noise`, and small roots by more: those of many that are 0 would add up to what is seen in the
    seventh digit of a distance.
    """
    if not min(m.shape):
        return m.new_zeros(())
    squares = torch.linalg.eigvalsh(m @ m.T if m.shape[0] < m.shape[1] else m.T @ m)
    noise = 2 * torch.finfo(m.dtype).eps * squares[-1]
    roots = squares.clamp(min=0).sqrt()
    error = (noise / (2 * roots.clamp(min=noise.sqrt() / 2))).sum()
    return roots.sum() if error <= tolerance else torch.linalg.svdvals(m).sum()


def _root(m: Moments) -> tuple[Tensor, bool]:
    """R [D, r] with R R' = the covariance, and whether it has full rank: Cholesky's, with pivots where it has not."""
    d = len(m.mean)
    if m.count is None or m.count > d:
        factor, failed = torch.linalg.cholesky_ex(m.covariance)
        if not failed:
            return factor, True
    root = _pivoted_cholesky(m.covariance)
    if m.count is None or m.count > d:
        _warn_rank(root.shape[1], d)
    return root, False


def _pivoted_cholesky(covariance: Tensor, block: int = 64) -> Tensor:
    """R [D, r] with R R' = a positive semidefinite [D, D] of rank r: what is left is rounding.

    Higham 2002, "Accuracy and Stability of Numerical Algorithms", section 10.3, in blocks as LAPACK's dpstrf, which torch lacks.
    It costs D^2 r, and a tenth of the time of eigenvectors for 500 images in 2048 dimensions.
    """
    d = len(covariance)
    left, diagonal = covariance.clone(), covariance.diagonal().clone()
    least = d * torch.finfo(covariance.dtype).eps * diagonal.max().clamp(min=0)
    rows, start = covariance.new_zeros(d, d), 0
    for k in range(d):
        pivot = int(diagonal.argmax())
        if diagonal[pivot] <= least:
            return rows[:k].T
        if k - start == block:
            left.addmm_(rows[start:k].T, rows[start:k], alpha=-1)
            start = k
        rows[k] = torch.addmv(left[pivot], rows[start:k].T, rows[start:k, pivot], alpha=-1) / diagonal[pivot].sqrt()
        diagonal -= rows[k].square()
        diagonal[pivot] = -torch.inf  # used up; what rounding leaves of it is no variance
    return rows.T


@functools.cache
def _warn_rank(rank: int, dimensions: int) -> None:
    log.warning(
        "covariance: found rank %d; expected the %d dimensions of the features. Use more images; features that never vary add "
        "nothing",
        rank,
        dimensions,
    )


def check_width(name: str, features: int, reference: int) -> None:
    """Check a number of dimensions. Raises FewstepError for features that cannot be those of the reference."""
    if features != reference:
        raise FewstepError(
            "features",
            f"{features} dimensions of {name!r}",
            f"{reference}, those of the reference",
            "Give the features that it was made with",
        )


class FrechetDistance(Metric):
    """FID of all images given to `update` against a reference; sums over the processes of torch.distributed.

    features: uint8 images [B, 3, H, W] -> features [B, D].
    reference: the moments of the real images in the same features.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    count: Tensor
    sum: Tensor
    outer: Tensor

    def __init__(self, features: ImageFeatures, reference: Moments, *, sync_on_compute: bool = True) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        self.features, self.reference = features, reference
        d = len(reference.mean)
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("sum", torch.zeros(d, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("outer", torch.zeros(d, d, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, images: Tensor) -> None:
        """uint8 images [B, 3, H, W], or their features [B, D] where they are known.

        Raises ValueError for features of another width than the reference's, or that are not finite.
        """
        features = (self.features(images) if images.dtype == torch.uint8 else images).double()
        check_width(self.features.name, features.shape[1], len(self.reference.mean))
        if not features.isfinite().all():
            raise FewstepError(
                "features",
                "values that are not finite",
                "finite features",
                "Check the images and the feature extractor's weights",
            )
        # Sums about the reference's mean: the same covariance, and far less cancellation than about zero.
        centred = features - self.reference.mean.to(features.device)
        self.count += len(centred)
        self.sum += centred.sum(0)
        self.outer += centred.T @ centred

    def moments(self) -> Moments:
        """Moments of this process's images so far; ValueError for fewer than two."""
        if self.count < 2:
            raise FewstepError("images", int(self.count), "at least 2, for a covariance", "Raise --num-images")
        mean = (self.sum / self.count).cpu()
        scatter = self.outer.cpu() - self.count.cpu() * mean.outer(mean)
        return Moments(mean + self.reference.mean, scatter / (self.count.cpu() - 1), int(self.count))

    def compute(self) -> Tensor:
        return torch.tensor(frechet_distance(self.moments(), self.reference), dtype=torch.float64)
