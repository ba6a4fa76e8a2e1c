"""Samples that a caller holds: in memory, in a `datasets.Dataset`, or in any sized collection of items."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fewstep import io
from fewstep.data.base import Condition, Raw, Source, no_images
from fewstep.data.images import decode, scaled, square
from fewstep.errors import FewstepError


class Items(Protocol):
    """A sized collection of mappings, as `torch.utils.data.Dataset` and lists are."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, object]: ...


@runtime_checkable
class Table(Protocol):
    """A collection that also gives whole columns, as `datasets.Dataset` does: captions are read without opening an image."""

    @property
    def column_names(self) -> Sequence[str]: ...

    def __getitem__(self, column: str, /) -> Sequence[object]: ...


class InMemory(Source):
    """Items {"image": PIL image, path or encoded bytes, "text": str, "label": int}, optional, the same in all items.

    With num_labels the conditions are the labels; otherwise the texts; otherwise the labels; otherwise nothing.
    """

    def __init__(self, items: Items, image_size: int, num_labels: int | None = None) -> None:
        """Raises FewstepError for items without any of the keys, and for labels out of range."""
        self.items, self.image_size, self.num_labels = items, image_size, num_labels
        first = items[0]
        if not isinstance(first, Mapping) or not {"image", "text", "label"} & first.keys():
            found = ", ".join(map(str, first)) if isinstance(first, Mapping) else type(first).__name__
            raise FewstepError("data", f"items of {found or 'nothing'}", "mappings with any of image, text, label")
        if num_labels is not None and "label" not in first:
            raise FewstepError("data.num_labels", num_labels, "null, for the items have no label")
        self.has_images = "image" in first
        self.column = "text" if "text" in first and num_labels is None else "label" if "label" in first else None
        self.conditions = "none" if self.column is None else "prompt" if self.column == "text" else "label"
        columns = items if isinstance(items, Table) else None
        self.values = list(columns[self.column]) if columns is not None and self.column is not None else None

    def __len__(self) -> int:
        return len(self.items)

    def get(self, indices: Sequence[int]) -> Raw:
        items = [self.items[i] for i in indices]
        images = None
        if self.has_images:
            images = scaled(np.stack([self._pixels(i, item["image"]) for i, item in zip(indices, items, strict=True)]))
        return Raw(images, [self._condition(i, item) for i, item in zip(indices, items, strict=True)], list(indices))

    def conditions_at(self, indices: Sequence[int]) -> list[Condition]:
        if self.column is None:
            return [None] * len(indices)
        return [self._condition(i, {} if self.values is not None else self.items[i]) for i in indices]

    def image_key(self, index: int) -> str:
        """Path and size in bytes of a file; digest of the content of an image in memory."""
        if not self.has_images:
            raise no_images(self.conditions)
        image = self.items[index]["image"]
        if isinstance(image, str | os.PathLike):
            return f"{image} {Path(image).stat().st_size}"
        if isinstance(image, bytes):
            return f"bytes {io.blake2b(image, 16).hex()}"
        picture = _picture(image, index)
        return f"{picture.mode} {picture.size} {io.blake2b(picture.tobytes(), 16).hex()}"

    def _pixels(self, index: int, image: object) -> NDArray[np.uint8]:
        if isinstance(image, str | os.PathLike):
            return decode(Path(image), f"{image}, item {index}", self.image_size)
        if isinstance(image, bytes):
            return decode(image, f"of item {index}", self.image_size)
        return square(_picture(image, index), self.image_size)

    def _condition(self, index: int, item: Mapping[str, object]) -> Condition:
        if self.column is None:
            return None
        value = self.values[index] if self.values is not None else item[self.column]
        if self.column == "text":
            return "" if value is None else str(value)
        top = float("inf") if self.num_labels is None else self.num_labels
        if not isinstance(value, int) or not 0 <= value < top:
            raise FewstepError("data", f"label {value!r} in item {index}", f"a whole number from 0 on, below {top}")
        return value


def _picture(image: object, index: int) -> Image.Image:
    if not isinstance(image, Image.Image):
        raise FewstepError("data", f"a {type(image).__name__} as image of item {index}", "a PIL image, a path or bytes")
    return image
