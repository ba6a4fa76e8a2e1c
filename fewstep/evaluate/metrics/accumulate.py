"""Scores of whole sets of images, as metrics whose states add up over batches and processes."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from fewstep.errors import FewstepError
from fewstep.evaluate.metrics.distances import diversity, inception_score


class AllFeatures(Metric):
    """All features, each in the row of its image: [num_images, D].

    States of torchmetrics that are lists would hang where processes have different numbers of batches, and could not tell
    a sample that came twice. These are sums over processes, to which every process contributes its own rows.
    """

    full_state_update = False
    is_differentiable = False
    features: Tensor
    seen: Tensor

    def __init__(
        self, num_images: int, dimensions: int, dtype: torch.dtype = torch.float32, *, sync_on_compute: bool = True
    ) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        self.add_state("features", torch.zeros(num_images, dimensions, dtype=dtype), dist_reduce_fx="sum")
        self.add_state("seen", torch.zeros(num_images, dtype=torch.int32), dist_reduce_fx="sum")

    def update(self, features: Tensor, indices: Sequence[int]) -> None:
        rows = torch.as_tensor(list(indices), device=self.features.device)
        self.features.index_add_(0, rows, features.to(self.features.dtype))
        self.seen.index_add_(0, rows, torch.ones_like(rows, dtype=torch.int32))

    def compute(self) -> Tensor:
        """All features. Raises RuntimeError unless every image came once."""
        if bool((self.seen != 1).any()):
            missing, twice = int((self.seen == 0).sum()), int((self.seen > 1).sum())
            raise RuntimeError(
                f"images: found {missing} missing and {twice} repeated; expected {len(self.seen)}, each once"
            )
        return self.features


class Mean(Metric):
    """Mean of one number an image."""

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    count: Tensor
    sum: Tensor

    def __init__(self, *, sync_on_compute: bool = True) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """[B]; ValueError for one that is not finite."""
        if not values.isfinite().all():
            raise FewstepError(
                "reward",
                "a value that is not finite",
                "finite numbers",
                "Check the images and the reward model's weights",
            )
        self.count += len(values)
        self.sum += values.double().sum()

    def compute(self) -> Tensor:
        return self.sum / self.count


class InceptionScore(Metric):
    """exp of the mean KL divergence of an image's class probabilities from those of all: mean and deviation over parts."""

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    count: Tensor
    entropy: Tensor
    mass: Tensor

    def __init__(self, num_images: int, classes: int, splits: int = 10, *, sync_on_compute: bool = True) -> None:
        """Part s has the images of index s N // splits to (s + 1) N // splits, in order and not shuffled."""
        super().__init__(sync_on_compute=sync_on_compute)
        if num_images < splits:
            raise FewstepError(
                "inception_score",
                f"{num_images} images",
                f"at least {splits}, one for each of its splits",
                "Raise --num-images",
            )
        starts = torch.tensor([s * num_images // splits for s in range(1, splits)])
        self.register_buffer("starts", starts, persistent=False)
        self.add_state("count", torch.zeros(splits, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("entropy", torch.zeros(splits, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("mass", torch.zeros(splits, classes, dtype=torch.float64), dist_reduce_fx="sum")

    starts: Tensor

    def update(self, logits: Tensor, indices: Sequence[int]) -> None:
        """logits [B, C] of the images with these indices."""
        log_p = logits.double().log_softmax(1)
        p = log_p.exp()
        part = torch.bucketize(torch.as_tensor(list(indices), device=logits.device), self.starts, right=True)
        self.count.index_add_(0, part, torch.ones_like(part, dtype=torch.float64))
        self.entropy.index_add_(0, part, (p * log_p).sum(1))
        self.mass.index_add_(0, part, p)

    def compute(self) -> tuple[float, float]:
        return inception_score(self.count, self.entropy, self.mass)


class Diversity(Metric):
    """Diversity of the images of one prompt: the mean over prompts of the mean 1 - cosine of its pairs of features."""

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    count: Tensor
    total: Tensor

    def __init__(self, groups: Sequence[int], dimensions: int, *, sync_on_compute: bool = True) -> None:
        """groups: the prompt's number of every image."""
        super().__init__(sync_on_compute=sync_on_compute)
        self.groups = list(groups)
        size = max(self.groups) + 1
        self.add_state("count", torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(size, dimensions, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Tensor, indices: Sequence[int]) -> None:
        group = torch.tensor([self.groups[i] for i in indices], device=features.device)
        self.count.index_add_(0, group, torch.ones_like(group, dtype=torch.float64))
        self.total.index_add_(0, group, F.normalize(features.double(), dim=1))

    def compute(self) -> float:
        return diversity(self.count, self.total)
