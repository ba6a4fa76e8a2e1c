"""Data, encodings, trajectories and rewards of a run that is only planned: of the right kind and size, without content."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from fewstep.config import DataConfig
from fewstep.data import Condition, Raw, Source
from fewstep.data.validate import OnError
from fewstep.methods.base import Preparation, Reward
from fewstep.methods.trajectories import Trajectories, TrajectorySettings
from fewstep.plan.weightless import Within
from fewstep.teachers.base import Teacher
from fewstep.teachers.denoiser import Cond, Posterior

if TYPE_CHECKING:
    from fewstep.data import ConditionKind


class PlaceholderSource(Source):
    """Samples of the kind that the settings' source gives; images are made `within` a context, such as a fake tensor mode."""

    def __init__(self, teacher: Teacher, config: DataConfig, within: Within) -> None:
        self.image_size, self.within = teacher.image_size, within
        self.conditions = cast("ConditionKind", teacher.conditions)
        self.has_images = config.source in ("fashion", "folder", "parquet")

    def __len__(self) -> int:
        return 256

    def image_key(self, index: int) -> str:
        return str(index)

    def get(self, indices: Sequence[int]) -> Raw:
        with self.within():
            images = torch.zeros(len(indices), 3, self.image_size, self.image_size)
        return Raw(images, self.conditions_at(indices), list(indices))

    def conditions_at(self, indices: Sequence[int]) -> list[Condition]:
        same: dict[str, Condition] = {"label": 0, "none": None}
        return [same.get(self.conditions, str(i)) for i in indices]


class PlaceholderEncodings:
    """Encoded prompts and images as `data.cache` would hold them; the teacher's encoders run once."""

    def __init__(self, teacher: Teacher, within: Within) -> None:
        self.within, self.latent_shape = within, teacher.latent_shape
        self.row: Cond = {}
        if teacher.prompts is not None:
            self.row = teacher.condition([""])
            teacher.prompts.clear()

    def open(self, source: Source, needs_images: bool, on_error: OnError = "fail", quiet: bool = False) -> Source:
        return source

    def conditions(self, prompts: Sequence[str]) -> Cond:
        return {key: torch.cat([value] * len(prompts)) for key, value in self.row.items()}

    def latents(self, indices: Sequence[int]) -> Posterior:
        with self.within():
            return Posterior(*(torch.zeros(len(indices), *self.latent_shape) for _ in range(2)))


@dataclass(frozen=True)
class PlaceholderPreparation(Preparation):
    """Gives a method trajectories and rewards without drawing or loading any; memory of a reward's network is not counted."""

    def trajectories(self, teacher: Teacher, name: str, settings: TrajectorySettings) -> Trajectories:
        """One trajectory of zeros."""
        examples: dict[str, Condition] = {"prompt": "", "label": 0, "none": None}
        x = torch.zeros(1, len(settings.kept) + 1, *teacher.latent_shape)
        return Trajectories(x, torch.ones(1), [examples[teacher.conditions]])


def placeholder_reward(name: str) -> Reward:
    """The mean of an image's pixels."""

    def reward(images: Tensor, prompts: Sequence[str] | None) -> Tensor:
        return images.flatten(1).mean(1)

    return reward
