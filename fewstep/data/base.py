"""Sources of samples: images and conditions under indices; an index is always the same sample."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor

from fewstep.errors import FewstepError

Condition = str | int | None
"""A prompt, a label, or nothing."""
ConditionKind = Literal["prompt", "label", "none"]


def no_images(conditions: ConditionKind, key: str = "data.source") -> FewstepError:
    """The error of a setting that needs images, about a source without them."""
    found = "no images" if conditions == "none" else f"{conditions}s without images"
    return FewstepError(key, found, "a source with images: fashion, folder or parquet")


class Raw(NamedTuple):
    """Samples of a source at B indices."""

    images: Tensor | None
    """float32 [B, 3, H, W] in [-1, 1]; None for sources without images."""
    conditions: list[Condition]
    """B prompts, labels or Nones."""
    indices: list[int]


class Source(ABC):
    """A finite, indexed collection of samples; index i is always the same sample.

    Attributes:
        has_images: whether `get` gives images.
        conditions: what the conditions are: "prompt" (str), "label" (int) or "none" (None).
    """

    has_images: bool
    conditions: ConditionKind

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def get(self, indices: Sequence[int]) -> Raw:
        """The samples at `indices`. Raises ValueError, naming the file, for an image that cannot be read."""

    @abstractmethod
    def conditions_at(self, indices: Sequence[int]) -> list[Condition]:
        """The conditions at `indices`, as `get` has them, without opening an image."""

    @abstractmethod
    def image_key(self, index: int) -> str:
        """The name of the image at `index`, the same in every run of this source, however it is shortened; opens no image.

        Raises FewstepError for sources without images.
        """

    def broken(self, indices: Sequence[int], thorough: bool = False, quiet: bool = False) -> dict[int, str]:
        """The indices whose image cannot be read or is cut short, with the reason, as far as `check_whole` finds it.

        thorough: also where that costs the reading of all images.
        """
        return {}


class Listed(Source):
    """Conditions without images: prompts, labels, or one None."""

    has_images = False

    def __init__(self, values: Sequence[Condition], conditions: ConditionKind) -> None:
        self.values, self.conditions = values, conditions

    def __len__(self) -> int:
        return len(self.values)

    def get(self, indices: Sequence[int]) -> Raw:
        return Raw(None, self.conditions_at(indices), list(indices))

    def conditions_at(self, indices: Sequence[int]) -> list[Condition]:
        return [self.values[i] for i in indices]

    def image_key(self, index: int) -> str:
        raise no_images(self.conditions)


class Selected(Source):
    """The samples of another source at the indices `kept`."""

    def __init__(self, source: Source, kept: list[int]) -> None:
        self.source, self.has_images, self.conditions = source, source.has_images, source.conditions
        self.kept = kept

    def __len__(self) -> int:
        return len(self.kept)

    def get(self, indices: Sequence[int]) -> Raw:
        return self.source.get([self.kept[i] for i in indices])._replace(indices=list(indices))

    def conditions_at(self, indices: Sequence[int]) -> list[Condition]:
        return self.source.conditions_at([self.kept[i] for i in indices])

    def image_key(self, index: int) -> str:
        return self.source.image_key(self.kept[index])

    def broken(self, indices: Sequence[int], thorough: bool = False, quiet: bool = False) -> dict[int, str]:
        outer = {self.kept[i]: i for i in indices}
        found = self.source.broken(list(outer), thorough, quiet)
        return {outer[i]: problem for i, problem in found.items()}
