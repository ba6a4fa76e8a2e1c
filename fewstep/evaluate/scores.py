"""All scores of a protocol, fed batch by batch with what was measured of the images."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.evaluate.metrics.accumulate import Diversity, InceptionScore, Kept, Mean
from fewstep.evaluate.metrics.distances import cmmd, density_coverage, kernel_distance, precision_recall
from fewstep.evaluate.metrics.frechet import FrechetDistance, check_width, frechet_infinity, warn_few
from fewstep.evaluate.models.clip import ClipModule, ClipScore, load_scoring
from fewstep.evaluate.models.features import ImageFeatures, load_features
from fewstep.evaluate.models.view import look
from fewstep.evaluate.protocol import NEED_FEATURES, Comparison, Protocol
from fewstep.evaluate.references import Given, Subjects, load_reference, reference_path
from fewstep.evaluate.rewards.load import Reward, load_reward, reward_weights
from fewstep.evaluate.statistics import Statistics


class Instruments:
    """The networks and reference statistics of a protocol, loaded once for all rows.

    dtype: float32, or float64, in which the batch size moves scores by no more than its rounding.
    """

    def __init__(
        self,
        name: str,
        protocol: Protocol,
        given: Given,
        resolution: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.protocol, self.dtype = protocol, dtype
        self.networks: list[ImageFeatures] = []
        self.lenses: list[int] = []
        """Of each comparison, the number of the first that has its features and view: what they share is computed once."""
        self.statistics: list[Statistics | None] = []
        paths = [reference_path(name, c, given) for c in protocol.comparisons]  # what is missing is told before loading
        for reward in protocol.rewards:
            reward_weights(reward)
        for i, (c, path) in enumerate(zip(protocol.comparisons, paths, strict=True)):
            same = [j for j in range(i) if (protocol.comparisons[j].features, protocol.comparisons[j].view) == _lens(c)]
            loaded = next((n for n in self.networks if n.name == c.features), None)
            self.networks.append(loaded or load_features(c.features).to(device, dtype))
            self.lenses.append(same[0] if same else i)
            self.statistics.append(None if path is None else load_reference(path, c, self.networks[i], resolution))
            m = None if self.statistics[i] is None else self.statistics[i].moments  # type: ignore[union-attr]
            if {"fid", "fid_infinity"} & set(c.metrics) and m is not None:
                for count in (protocol.images, m.count):  # before anything is drawn
                    warn_few(count, len(m.mean))
        self.clip: ClipModule | None = None if protocol.clip is None else load_scoring(protocol.clip).to(device, dtype)
        self.rewards: dict[str, Reward] = {name: load_reward(name).to(device, dtype) for name in protocol.rewards}

    def measure(self, images: Tensor, prompts: Sequence[str] | None) -> dict[str, Tensor]:
        """What the scores need of uint8 images [B, 3, H, W], on the networks' device: [B, ...] each."""
        values: dict[str, Tensor] = {}
        for i, c in enumerate(self.protocol.comparisons):
            if self.lenses[i] == i:
                measured = self.networks[i].measure(look(images, c.view))
                wanted = (
                    {"features", "logits"} if any("inception_score" in d.metrics for d in self._of(i)) else {"features"}
                )
                values |= {f"{i}.{key}": value for key, value in measured.items() if key in wanted}
        if self.clip is not None and prompts is not None:
            values["cosine"] = ClipScore(self.clip, self.protocol.clip).cosines(images, prompts)
        for name, reward in self.rewards.items():
            with torch.no_grad():
                values[f"reward.{name}"] = reward(images.to(self.dtype) / 255, prompts)
        return values

    def _of(self, lens: int) -> list[Comparison]:
        return [c for c, k in zip(self.protocol.comparisons, self.lenses, strict=True) if k == lens]


def _lens(c: Comparison) -> tuple[Any, Any]:
    return c.features, c.view


class Scores:
    """The scores of one row. `sync`: their sums run over the processes of torch.distributed.

    example: what `Instruments.measure` gives of any image. From its shapes every process, even one that is left without a batch,
    makes the same metrics, and what does not fit is told before anything is drawn.
    """

    def __init__(
        self, instruments: Instruments, what: Subjects, example: dict[str, Tensor], *, sync: bool, device: torch.device
    ) -> None:
        self.instruments, self.device = instruments, device
        self.metrics: dict[str, Any] = {}
        n, groups = instruments.protocol.images, _groups(what)
        for i, c in enumerate(instruments.protocol.comparisons):
            features = example[f"{instruments.lenses[i]}.features"]
            width = features.shape[1]
            statistics = instruments.statistics[i]
            if statistics is not None and statistics.moments is not None:
                check_width(instruments.networks[i].name, width, len(statistics.moments.mean))
                if "fid" in c.metrics:
                    fid = FrechetDistance(instruments.networks[i], statistics.moments, sync_on_compute=sync)
                    self.metrics[f"{i}.fid"] = fid
            if (NEED_FEATURES | {"fid_infinity"}) & set(c.metrics):
                self.metrics[f"{i}.kept"] = Kept(n, width, features.dtype, sync_on_compute=sync)
            if "diversity" in c.metrics:
                self.metrics[f"{i}.diversity"] = Diversity(groups, width, sync_on_compute=sync)
            if "inception_score" in c.metrics:
                logits = example.get(f"{instruments.lenses[i]}.logits")
                if logits is None:
                    raise ValueError(f"inception_score needs class logits, and features {c.features!r} have none")
                self.metrics[f"{i}.inception_score"] = InceptionScore(
                    n, logits.shape[1], c.splits, sync_on_compute=sync
                )
        if instruments.clip is not None and "cosine" in example:
            self.metrics["clip_score"] = ClipScore(instruments.clip, instruments.protocol.clip, sync_on_compute=sync)
        for name in instruments.rewards:
            self.metrics[f"reward.{name}"] = Mean(sync_on_compute=sync)
        self.metrics = {key: metric.to(device) for key, metric in self.metrics.items()}

    def update(self, indices: Sequence[int], values: dict[str, Tensor]) -> None:
        values = {key: value.to(self.device) for key, value in values.items()}
        for key, metric in self.metrics.items():
            if key == "clip_score":
                metric.update(values["cosine"])
                continue
            if key.startswith("reward."):
                metric.update(values[key])
                continue
            comparison, _, kind = key.partition(".")
            lens = self.instruments.lenses[int(comparison)]
            match kind:
                case "fid":
                    metric.update(values[f"{lens}.features"])
                case "inception_score":
                    metric.update(values[f"{lens}.logits"], indices)
                case _:
                    metric.update(values[f"{lens}.features"], indices)

    def compute(self) -> dict[str, float | None]:
        """Every score by its name; fid and clip_score always, None where the protocol has none."""
        scores: dict[str, float | None] = {"fid": None, "clip_score": None}
        for i, c in enumerate(self.instruments.protocol.comparisons):
            suffix = f"_{c.name}" if c.name else ""
            for metric in c.metrics:
                for key, value in self._compute(metric, c, i).items():
                    scores[f"{key}{suffix}"] = value
        if "clip_score" in self.metrics:
            scores["clip_score"] = float(self.metrics["clip_score"].compute())
        for name in self.instruments.rewards:
            scores[name] = float(self.metrics[f"reward.{name}"].compute())
        return scores

    def _compute(self, metric: str, c: Comparison, i: int) -> dict[str, float]:
        if metric == "fid_infinity":
            statistics = self.instruments.statistics[i]
            assert statistics is not None and statistics.moments is not None  # load_reference saw to it
            return {metric: frechet_infinity(self.metrics[f"{i}.kept"].compute().cpu(), statistics.moments)}
        if metric in NEED_FEATURES:
            generated = self.metrics[f"{i}.kept"].compute().cpu()
            statistics = self.instruments.statistics[i]
            assert statistics is not None and statistics.features is not None  # load_reference saw to it
            real = statistics.features
            match metric:
                case "kid":
                    return {"kid": kernel_distance(generated, real)}
                case "cmmd":
                    return {"cmmd": cmmd(generated, real)}
                case "precision_recall":
                    pair = precision_recall(generated, real, nearest_k=c.nearest_k)
                    return dict(zip(("precision", "recall"), pair, strict=True))
            pair = density_coverage(generated, real, nearest_k=c.nearest_k)
            return dict(zip(("density", "coverage"), pair, strict=True))
        value = self.metrics[f"{i}.{metric}"].compute()
        if metric == "inception_score":
            return {"inception_score": value[0], "inception_score_std": value[1]}
        return {metric: float(value)}


def _groups(what: Subjects) -> list[int]:
    """Images of one condition are one group."""
    number: dict[Any, int] = {}
    return [number.setdefault(condition, len(number)) for condition in what.conditions]
