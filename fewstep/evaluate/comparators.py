"""One comparison of a protocol: its features, its real images, and the scores of generated images in them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric

from fewstep.errors import FewstepError
from fewstep.evaluate.metrics.accumulate import AllFeatures, Diversity, InceptionScore
from fewstep.evaluate.metrics.distances import cmmd, density_coverage, kernel_distance, precision_recall
from fewstep.evaluate.metrics.frechet import FrechetDistance, check_width, frechet_infinity, warn_few
from fewstep.evaluate.models.features import ImageFeatures, load_features
from fewstep.evaluate.models.view import apply_view
from fewstep.evaluate.protocol import NEED_FEATURES, Comparison, PathOverrides, Protocol
from fewstep.evaluate.references import load_reference, reference_path
from fewstep.evaluate.statistics import Moments, Statistics


@dataclass(frozen=True)
class Comparator:
    """The features and reference of one comparison, loaded once for all rows.

    Attributes:
        comparison: settings of the protocol.
        network: the features.
        statistics: of the real images; None for scores that need none.
        prefix: of the names of measured values; comparisons with the same features and view share it and are measured once.
        measures: whether this is the first comparison of its prefix, which measures for all.
        needs_logits: whether any comparison of its prefix needs class logits.
    """

    comparison: Comparison
    network: ImageFeatures
    statistics: Statistics | None
    prefix: str
    measures: bool
    needs_logits: bool

    def measure(self, images: Tensor) -> dict[str, Tensor]:
        """Features, and logits where they are needed, of uint8 images [B, 3, H, W]: [B, ...] each."""
        keys = {"features", "logits"} if self.needs_logits else {"features"}
        measured = self.network.measure(apply_view(images, self.comparison.view))
        return {f"{self.prefix}.{key}": value for key, value in measured.items() if key in keys}

    def features(self, values: Mapping[str, Tensor]) -> Tensor:
        return values[f"{self.prefix}.features"]

    def logits(self, values: Mapping[str, Tensor]) -> Tensor:
        """Class logits. Raises ValueError for features without them."""
        found = values.get(f"{self.prefix}.logits")
        if found is None:
            raise FewstepError(
                "features",
                f"{self.comparison.features!r} without class logits",
                "features with them, for inception_score",
            )
        return found

    @property
    def moments(self) -> Moments:
        assert self.statistics is not None and self.statistics.moments is not None  # load_reference saw to it
        return self.statistics.moments

    @property
    def real_features(self) -> Tensor:
        assert self.statistics is not None and self.statistics.features is not None  # load_reference saw to it
        return self.statistics.features


def load_comparators(
    name: str,
    protocol: Protocol,
    overrides: PathOverrides,
    resolution: int,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Comparator]:
    """Load the features and the statistics of all comparisons; equal features are one network.

    Raises ValueError for a missing or unfit reference, before any network is loaded.
    """
    comparisons = protocol.comparisons
    paths = [reference_path(name, c, overrides) for c in comparisons]
    found: list[Comparator] = []
    for i, (c, path) in enumerate(zip(comparisons, paths, strict=True)):
        same = [j for j, other in enumerate(comparisons) if (other.features, other.view) == (c.features, c.view)]
        loaded = next((other.network for other in found if other.network.name == c.features), None)
        network = loaded or load_features(c.features).to(device, dtype)
        statistics = None if path is None else load_reference(path, c, network, resolution)
        needs_logits = any("inception_score" in comparisons[j].metrics for j in same)
        found.append(Comparator(c, network, statistics, str(same[0]), same[0] == i, needs_logits))
        if {"fid", "fid_infinity"} & set(c.metrics) and statistics is not None and statistics.moments is not None:
            for count in (protocol.images, statistics.moments.count):  # before anything is sampled
                warn_few(count, len(statistics.moments.mean))
    return found


class ComparisonScores:
    """The scores of one comparison in one row."""

    def __init__(
        self, comparator: Comparator, num_images: int, groups: Sequence[int], example: Mapping[str, Tensor], sync: bool
    ) -> None:
        """example: measured values of any image, for their shapes. Raises ValueError for features that do not fit."""
        self.comparator = comparator
        metrics = set(comparator.comparison.metrics)
        features = comparator.features(example)
        width = features.shape[1]
        self.fid: FrechetDistance | None = None
        if comparator.statistics is not None and comparator.statistics.moments is not None:
            check_width(comparator.network.name, width, len(comparator.moments.mean))
            if "fid" in metrics:
                self.fid = FrechetDistance(comparator.network, comparator.moments, sync_on_compute=sync)
        self.all = self.diversity = self.inception_score = None
        if (NEED_FEATURES | {"fid_infinity"}) & metrics:
            self.all = AllFeatures(num_images, width, features.dtype, sync_on_compute=sync)
        if "diversity" in metrics:
            self.diversity = Diversity(groups, width, sync_on_compute=sync)
        if "inception_score" in metrics:
            classes, splits = comparator.logits(example).shape[1], comparator.comparison.splits
            self.inception_score = InceptionScore(num_images, classes, splits, sync_on_compute=sync)

    def to(self, device: torch.device) -> None:
        metrics: tuple[Metric | None, ...] = (self.fid, self.all, self.diversity, self.inception_score)
        for metric in metrics:
            if metric is not None:
                metric.to(device)

    def update(self, indices: Sequence[int], values: Mapping[str, Tensor]) -> None:
        """Add the measured values, [B, ...] each, of the images with these indices."""
        features = self.comparator.features(values)
        if self.fid is not None:
            self.fid.update(features)
        if self.all is not None:
            self.all.update(features, indices)
        if self.diversity is not None:
            self.diversity.update(features, indices)
        if self.inception_score is not None:
            self.inception_score.update(self.comparator.logits(values), indices)

    def compute(self) -> dict[str, float]:
        """Every score of the comparison, by its name in reports."""
        name = self.comparator.comparison.name
        suffix = f"_{name}" if name else ""
        return {
            f"{key}{suffix}": value
            for metric in self.comparator.comparison.metrics
            for key, value in self._compute(metric).items()
        }

    def _compute(self, metric: str) -> dict[str, float]:
        match metric:
            case "fid" if self.fid is not None:
                return {"fid": float(self.fid.compute())}
            case "diversity" if self.diversity is not None:
                return {"diversity": float(self.diversity.compute())}
            case "inception_score" if self.inception_score is not None:
                mean, deviation = self.inception_score.compute()
                return {"inception_score": mean, "inception_score_std": deviation}
        assert self.all is not None  # all others need it
        generated = self.all.compute().cpu()
        if metric == "fid_infinity":
            return {metric: frechet_infinity(generated, self.comparator.moments)}
        real, nearest = self.comparator.real_features, self.comparator.comparison.nearest_k
        match metric:
            case "kid":
                return {"kid": kernel_distance(generated, real)}
            case "cmmd":
                return {"cmmd": cmmd(generated, real)}
            case "precision_recall":
                pair = precision_recall(generated, real, nearest_k=nearest)
                return dict(zip(("precision", "recall"), pair, strict=True))
        pair = density_coverage(generated, real, nearest_k=nearest)
        return dict(zip(("density", "coverage"), pair, strict=True))
