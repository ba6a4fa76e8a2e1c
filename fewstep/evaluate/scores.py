"""All scores of a protocol, updated batch by batch with measured values of the images."""

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from fewstep.evaluate.comparators import ComparisonScores, load_comparators
from fewstep.evaluate.conditions import Conditions
from fewstep.evaluate.metrics.accumulate import Mean
from fewstep.evaluate.models.clip import ClipModule, ClipScore, load_scoring
from fewstep.evaluate.protocol import PathOverrides, Protocol
from fewstep.evaluate.rewards.load import Reward, load_reward, reward_weights


class ScoringModels:
    """The networks and reference statistics of a protocol, loaded once for all rows.

    dtype: float32, or float64, in which the batch size moves scores by no more than its rounding.
    """

    def __init__(
        self,
        name: str,
        protocol: Protocol,
        overrides: PathOverrides,
        resolution: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.protocol, self.dtype = protocol, dtype
        for reward in protocol.rewards:  # missing weights are reported before any network loads
            reward_weights(reward)
        self.comparators = load_comparators(name, protocol, overrides, resolution, device, dtype)
        self.clip: ClipModule | None = None if protocol.clip is None else load_scoring(protocol.clip).to(device, dtype)
        self.rewards: dict[str, Reward] = {name: load_reward(name).to(device, dtype) for name in protocol.rewards}

    def measure(self, images: Tensor, prompts: Sequence[str] | None) -> dict[str, Tensor]:
        """The values that the scores need of uint8 images [B, 3, H, W], on the networks' device: [B, ...] each."""
        values: dict[str, Tensor] = {}
        for comparator in self.comparators:
            if comparator.measures:
                values |= comparator.measure(images)
        if self.clip is not None and prompts is not None:
            values["cosine"] = ClipScore(self.clip, self.protocol.clip).cosines(images, prompts)
        for name, reward in self.rewards.items():
            with torch.no_grad():
                values[f"reward.{name}"] = reward(images.to(self.dtype) / 255, prompts)
        return values


class Scores:
    """The scores of one row. `sync`: their sums run over the processes of torch.distributed.

    example: `ScoringModels.measure` of any image. From its shapes every process, even one without a batch, makes the same
    metrics, and what does not fit is reported before anything is sampled.
    """

    def __init__(
        self,
        models: ScoringModels,
        conditions: Conditions,
        example: Mapping[str, Tensor],
        *,
        sync: bool,
        device: torch.device,
    ) -> None:
        self.device = device
        count, groups = models.protocol.images, _groups(conditions)
        self.comparisons = [ComparisonScores(c, count, groups, example, sync) for c in models.comparators]
        for comparison in self.comparisons:
            comparison.to(device)
        self.clip: ClipScore | None = None
        if models.clip is not None and "cosine" in example:
            self.clip = ClipScore(models.clip, models.protocol.clip, sync_on_compute=sync).to(device)
        self.rewards = {name: Mean(sync_on_compute=sync).to(device) for name in models.rewards}

    def update(self, indices: Sequence[int], values: Mapping[str, Tensor]) -> None:
        """Add the measured values, [B, ...] each, of the images with these indices."""
        values = {key: value.to(self.device) for key, value in values.items()}
        for comparison in self.comparisons:
            comparison.update(indices, values)
        if self.clip is not None:
            self.clip.update(values["cosine"])
        for name, mean in self.rewards.items():
            mean.update(values[f"reward.{name}"])

    def compute(self) -> dict[str, float | None]:
        """Every score by its name; fid and clip_score always, None where the protocol has none."""
        scores: dict[str, float | None] = {"fid": None, "clip_score": None}
        for comparison in self.comparisons:
            scores |= comparison.compute()
        if self.clip is not None:
            scores["clip_score"] = float(self.clip.compute())
        return scores | {name: float(mean.compute()) for name, mean in self.rewards.items()}


def _groups(conditions: Conditions) -> list[int]:
    """A number for each image; images of one condition have the same."""
    number: dict[Hashable, int] = {}
    return [number.setdefault(condition, len(number)) for condition in conditions.conditions]
