"""Where images, prompts and labels come from, and in which order a run sees them.

A source answers indices with images [B, 3, H, W] in [-1, 1] and conditions; a stream is its endless shuffled order, cut
among the ranks, that resumes exactly.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from fewstep.config import DataConfig
from fewstep.data import fashion
from fewstep.data.hub import dataset_files, is_dataset
from fewstep.data.images import check_whole, class_labels, decode, find_metadata, read_metadata, scaled, square

Conditions = Literal["prompt", "label", "none"]
NO_IMAGES = "data.source has no images"
SHOWN_FROM = 10_000
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class Raw(NamedTuple):
    """What a source holds at B indices."""

    images: Tensor | None
    """float32 [B, 3, H, W] in [-1, 1]; None for sources without images."""
    conditions: list[Any]
    """B prompts, labels or Nones."""
    indices: list[int]


class Source(ABC):
    """A finite, indexed collection of samples; index i is always the same sample.

    Attributes:
        has_images: whether `get` gives images.
        conditions: what the conditions are: "prompt" (str), "label" (int) or "none" (None).
    """

    has_images: bool
    conditions: Conditions

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def get(self, indices: Sequence[int]) -> Raw:
        """The samples at `indices`. Raises ValueError, naming the file, for an image that cannot be read."""

    @abstractmethod
    def conditions_at(self, indices: Sequence[int]) -> list[Any]:
        """The conditions at `indices`, as `get` has them, without opening an image."""

    @abstractmethod
    def image_key(self, index: int) -> str:
        """What the image at `index` is called in every run of this source, however it is shortened; it is not opened.

        Raises ValueError for sources without images.
        """

    def broken(self, indices: Sequence[int], thorough: bool = False, quiet: bool = False) -> dict[int, str]:
        """Of these indices, those whose image is none or is cut short, with what is wrong, as far as `check_whole` finds it.

        thorough: also where that costs the reading of all images.
        """
        return {}


class Fashion(Source):
    """Fashion-MNIST: the 60,000 training images where Debian's package is installed, else the 2,000 embedded ones.

    The caption's template is a function of the index. num_labels turns captions into labels.
    """

    has_images = True

    def __init__(self, image_size: int, num_labels: int | None = None) -> None:
        self.labels = fashion.load_train_labels()
        self.image_size, self.num_labels = image_size, num_labels
        self.conditions = "prompt" if num_labels is None else "label"
        if num_labels is not None and num_labels != len(fashion.CLASSES):
            raise ValueError(
                f"data.num_labels: found {num_labels}; source 'fashion' has {len(fashion.CLASSES)} classes"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def get(self, indices: Sequence[int]) -> Raw:
        indices = list(indices)
        pixels = self.images[indices]
        if pixels.shape[-1] != self.image_size:
            pixels = np.stack([square(Image.fromarray(x.transpose(1, 2, 0)), self.image_size) for x in pixels])
        return Raw(scaled(pixels), self.conditions_at(indices), indices)

    @cached_property
    def images(self) -> NDArray[np.uint8]:
        """uint8 [N, 3, 32, 32]; a run that needs conditions only never loads them."""
        whole = fashion.DEBIAN_FOLDER.exists()
        return (fashion.load_idx("train") if whole else fashion.load_embedded())[0]

    def conditions_at(self, indices: Sequence[int]) -> list[Any]:
        indices = list(indices)
        return [self._condition(i, c) for i, c in zip(indices, self.labels[indices].tolist(), strict=True)]

    def image_key(self, index: int) -> str:
        return f"fashion {index} of {len(self)}"

    def _condition(self, index: int, label: int) -> str | int:
        return label if self.num_labels is not None else fashion.caption(label, index % len(fashion.TEMPLATES))


class Folder(Source):
    """A folder of images in the layout of Hugging Face's imagefolder.

    metadata.jsonl, lines of {"file_name": ..., "text": ...}, or metadata.csv, columns file_name and text, says which
    images there are and their captions. Without them, every image below the folder counts, captioned by the name of the
    folder it lies in, or "" at the top. With num_labels, these names in sorted order are the labels instead.
    """

    has_images = True

    def __init__(self, path: Path, image_size: int, num_labels: int | None = None) -> None:
        path, _ = _here(path)
        if not path.is_dir():
            raise ValueError(f"data.path: found {str(path)!r}, which is not a folder")
        self.path, self.image_size = path, image_size
        self.values: list[Any]
        metadata = find_metadata(path) if num_labels is None else None
        if metadata:
            self.files, self.values = read_metadata(metadata)
        else:
            self.files = sorted(f for f in path.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)
            names = ["" if f.parent == path else f.parent.name for f in self.files]
            self.values = (
                [n.replace("_", " ") for n in names] if num_labels is None else class_labels(names, num_labels, path)
            )
        if not self.files:
            raise ValueError(f"data.path: no image in {metadata or path} (looked for {', '.join(IMAGE_SUFFIXES)})")
        self.conditions = "prompt" if num_labels is None else "label"

    def __len__(self) -> int:
        return len(self.files)

    def get(self, indices: Sequence[int]) -> Raw:
        pixels = [decode(self.files[i], str(self.files[i]), self.image_size) for i in indices]
        return Raw(scaled(np.stack(pixels)), self.conditions_at(indices), list(indices))

    def conditions_at(self, indices: Sequence[int]) -> list[Any]:
        return [self.values[i] for i in indices]

    def broken(self, indices: Sequence[int], thorough: bool = False, quiet: bool = False) -> dict[int, str]:
        with ThreadPoolExecutor(32) as pool:
            found = pool.map(lambda i: _problem(self.files[i], str(self.files[i])), indices)
            return {
                i: problem for i, problem in zip(indices, _shown(found, len(indices), quiet), strict=True) if problem
            }

    def image_key(self, index: int) -> str:
        """Path below the folder and size in bytes: neither moving the folder nor adding files changes it."""
        file = self.files[index]
        return f"{os.path.relpath(file, self.path)} {file.stat().st_size}"


class Parquet(Source):
    """One parquet file, or all in a folder; of their images, still compressed, at most HELD_BYTES are in memory.

    Columns: image (encoded bytes, or Hugging Face's struct of bytes and path), text, label, each optional. With
    num_labels the conditions are the labels; else the texts; else the labels; else none.
    """

    HELD_BYTES: ClassVar[int] = 2**31

    def __init__(self, path: Path, image_size: int, num_labels: int | None = None) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        from fewstep.data.parquet import LazyColumn

        path, shards = _here(path)
        files = shards or (sorted(path.rglob("*.parquet")) if path.is_dir() else [path])
        if not files or not files[0].exists():
            raise ValueError(f"data.path: no parquet file at {path}")
        known = ("image", "text", "label")
        try:
            names = pq.read_schema(files[0]).names
            self.size = sum(pq.read_metadata(f).num_rows for f in files)
            if not self.size or not set(known) & set(names):
                found = f"{self.size} rows, columns {', '.join(names)}"
                raise ValueError(f"data.path: {path} has {found}; wanted are rows and any of {', '.join(known)}")
            if num_labels is not None and "label" not in names:
                raise ValueError(f"data.num_labels: {path} has no column label; columns: {', '.join(names)}")
            texts = "text" in names and num_labels is None
            column = "text" if texts else "label" if "label" in names else None
            self.images = LazyColumn(files, "image", self.HELD_BYTES) if "image" in names else None
            self.values = (
                pa.concat_tables(pq.read_table(f, columns=[column]) for f in files)[column] if column else None
            )
        except (OSError, pa.ArrowException) as e:
            raise ValueError(f"data.path: {path} cannot be read as parquet: {e}") from None
        self.path, self.image_size, self.has_images = path, image_size, self.images is not None
        kinds: dict[str | None, Conditions] = {"text": "prompt", "label": "label", None: "none"}
        self.conditions = kinds[column]
        if self.values is not None and self.conditions == "label":
            _check_labels(self.values.to_pylist(), num_labels, path)

    def __len__(self) -> int:
        return self.size

    def get(self, indices: Sequence[int]) -> Raw:
        images = None if self.images is None else scaled(np.stack([self._image(i) for i in indices]))
        return Raw(images, self.conditions_at(indices), list(indices))

    def conditions_at(self, indices: Sequence[int]) -> list[Any]:
        values = [None if self.values is None else self.values[i].as_py() for i in indices]
        return ["" if v is None else v for v in values] if self.conditions == "prompt" else values

    def broken(self, indices: Sequence[int], thorough: bool = False, quiet: bool = False) -> dict[int, str]:
        """Where the images are more than HELD_BYTES, only if `thorough`: the training would read them once more."""
        if self.images is None or (self.images.compressed_bytes > self.HELD_BYTES and not thorough):
            return {}
        found = (_problem(*self._content(i)) for i in indices)
        return {i: problem for i, problem in zip(indices, _shown(found, len(indices), quiet), strict=True) if problem}

    def image_key(self, index: int) -> str:
        """Path below the folder and size in bytes of the file, and row in it."""
        if self.images is None:
            raise ValueError(NO_IMAGES)
        file, row = self.images.place(index)
        name = os.path.relpath(file, self.path) if self.path.is_dir() else file.name
        return f"{name} {file.stat().st_size} {row}"

    def _image(self, index: int) -> NDArray[np.uint8]:
        return decode(*self._content(index), self.image_size)

    def _content(self, index: int) -> tuple[Path | bytes | None, str]:
        """An image, still encoded, and where it lies."""
        assert self.images is not None  # its callers ask only then
        where, cell = f"{self.path}, row {index}", self.images[index]
        if isinstance(cell, dict):
            if cell.get("bytes") is None and cell.get("path"):
                folder = self.path if self.path.is_dir() else self.path.parent
                return folder / cell["path"], f"{where}, {cell['path']}"
            cell = cell.get("bytes")
        return cell, where


class Listed(Source):
    """Conditions without images: prompts, labels, or one None."""

    has_images = False

    def __init__(self, values: Sequence[Any], conditions: Conditions) -> None:
        self.values, self.conditions = values, conditions

    def __len__(self) -> int:
        return len(self.values)

    def get(self, indices: Sequence[int]) -> Raw:
        return Raw(None, self.conditions_at(indices), list(indices))

    def conditions_at(self, indices: Sequence[int]) -> list[Any]:
        return [self.values[i] for i in indices]

    def image_key(self, index: int) -> str:
        raise ValueError(NO_IMAGES)


class Selected(Source):
    """The samples of another source at the indices `kept`."""

    def __init__(self, source: Source, kept: list[int]) -> None:
        self.source, self.has_images, self.conditions = source, source.has_images, source.conditions
        self.kept = kept

    def __len__(self) -> int:
        return len(self.kept)

    def get(self, indices: Sequence[int]) -> Raw:
        return self.source.get([self.kept[i] for i in indices])._replace(indices=list(indices))

    def conditions_at(self, indices: Sequence[int]) -> list[Any]:
        return self.source.conditions_at([self.kept[i] for i in indices])

    def image_key(self, index: int) -> str:
        return self.source.image_key(self.kept[index])

    def broken(self, indices: Sequence[int], thorough: bool = False, quiet: bool = False) -> dict[int, str]:
        outer = {self.kept[i]: i for i in indices}
        found = self.source.broken(list(outer), thorough, quiet)
        return {outer[i]: problem for i, problem in found.items()}


def _here(path: Path) -> tuple[Path, list[Path]]:
    """A path as it is; of a data set of the hub, its folder on this machine and the parquet files of its split."""
    return dataset_files(str(path), "data.path") if is_dataset(str(path)) else (path, [])


LIMIT_SEED = 0
"""One for every run: runs with other seeds must learn from the same samples."""


def limited(source: Source, size: int) -> Selected:
    """`size` samples of a source, drawn without replacement and always the same; all if it has no more."""
    kept: list[int] = np.random.default_rng(LIMIT_SEED).permutation(len(source))[:size].tolist()
    return Selected(source, kept)


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not blank. Raises ValueError where there are none."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"data.path: {path} cannot be read as a text file of prompts: {e}") from None
    prompts = [line for line in lines if line]
    if not prompts:
        raise ValueError(f"data.path: {path} holds no prompt; one per line is wanted")
    return prompts


def load_source(config: DataConfig, image_size: int) -> Source:
    """The configured source, its images centre-cropped and resized to image_size pixels a side.

    Raises ValueError, naming the config key, for paths and labels that do not fit.
    """
    source = _load(config, image_size)
    if config.cache_latents and not source.has_images:
        raise ValueError(f"data.cache_latents needs images, and {config.path} has none")
    return source if config.limit is None else limited(source, config.limit)


def _load(config: DataConfig, image_size: int) -> Source:
    match config.source:
        case "fashion":
            return Fashion(image_size, config.num_labels)
        case "labels" if config.num_labels is not None:
            return Listed(range(config.num_labels), "label")
        case "none":
            return Listed([None], "none")
    if config.path is None:  # excluded by DataConfig, unless it was built without validation
        raise ValueError(f"source {config.source!r} needs data.path")
    match config.source:
        case "folder":
            return Folder(config.path, image_size, config.num_labels)
        case "parquet":
            return Parquet(config.path, image_size, config.num_labels)
        case "prompts":
            return Listed(read_prompts(config.path), "prompt")
    raise ValueError(f"unknown data.source {config.source!r}")


class Stream(Iterator[Raw]):
    """Micro-batches of one rank, from a global order that depends on seed and source alone.

    Every epoch is a permutation of the source drawn from (seed, epoch); epochs follow each other without a gap. A
    micro-batch of rank r is the r-th run of batch_size samples from `position`, which moves on by batch_size * world.
    """

    def __init__(self, source: Source, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not one of {world} processes")
        self.source, self.batch_size, self.seed, self.rank, self.world = source, batch_size, seed, rank, world
        self.position = 0
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def __next__(self) -> Raw:
        raw = self.source.get(self._indices())
        # Last, so that a sample that cannot be read does not move the stream.
        self.position += self.batch_size * self.world
        return raw

    def next_indices(self) -> list[int]:
        """The indices of the next micro-batch, for a caller that needs no images or holds them already; moves the stream on."""
        indices = self._indices()
        self.position += self.batch_size * self.world
        return indices

    def _indices(self) -> list[int]:
        start = self.position + self.rank * self.batch_size
        return [self._index(i) for i in range(start, start + self.batch_size)]

    def state_dict(self) -> dict[str, int]:
        """Plain numbers, the same on every rank."""
        return {"position": self.position, "seed": self.seed, "length": len(self.source)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Raises ValueError for another seed or another number of samples, where the order would not go on."""
        for name, value in (("seed", self.seed), ("length", len(self.source))):
            if state[name] != value:
                raise ValueError(f"the data cannot be resumed: {name} was {state[name]} and is {value}")
        self.position = state["position"]

    def _index(self, global_position: int) -> int:
        epoch, offset = divmod(global_position, len(self.source))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.source))
        return int(self._order[offset])


def _problem(content: Path | bytes | None, where: str) -> str | None:
    try:
        check_whole(content, where)
    except ValueError as e:
        return str(e)
    return None


def _shown(found: Iterable[str | None], total: int, quiet: bool) -> Iterable[str | None]:
    """With a progress bar, if it will take a while."""
    return tqdm(found, "checking images", total, disable=quiet or total < SHOWN_FROM, dynamic_ncols=True)


def _check_labels(labels: list[Any], num_labels: int | None, path: Path) -> None:
    top = num_labels if num_labels is not None else float("inf")
    for row, label in enumerate(labels):
        if not isinstance(label, int) or not 0 <= label < top:
            limit = "0 or more" if num_labels is None else f"0 to {num_labels - 1}, by data.num_labels"
            raise ValueError(f"data.path: {path}, row {row} has the label {label!r}; allowed: {limit}")
