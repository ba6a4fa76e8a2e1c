"""Real images: of folders, parquet files, data sets of the hub, ADM's .npz, and the package's own."""

import io
import sys
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.assets import ASSETS
from fewstep.data.fashion import load_embedded
from fewstep.data.hub import dataset_files, is_dataset
from fewstep.data.images import IMAGE_SUFFIXES, UNREADABLE, image_files, unreadable
from fewstep.errors import FewstepError, MissingError
from fewstep.evaluate.statistics import load_statistics


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _read(file: Path | bytes, where: str) -> Tensor:
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            return _pixels(image)
    except UNREADABLE as e:
        raise unreadable(where, e) from None


def _files(source: str) -> tuple[list[Path], list[Path]]:
    """Files of images, and parquet files that hold them, of a path or of a data set of the hub; at most one is not empty."""
    path = Path(source)
    if is_dataset(source):
        path, shards = dataset_files(source, "images")
        if shards:  # beside which an image is an illustration
            return [], shards
    if not path.is_dir():
        return [], [path] if path.suffix == ".parquet" else []
    images = image_files(path)
    return images, [] if images else sorted(path.rglob("*.parquet"))


def _parquet(files: Sequence[Path], numbers: Container[int]) -> Iterator[Tensor]:
    import pyarrow.parquet as pq

    number = 0
    for file in files:
        parquet = pq.ParquetFile(file)
        if "image" not in parquet.schema_arrow.names:
            raise FewstepError("images", f"columns {', '.join(parquet.schema_arrow.names)} in {file}", "image")
        for batch in parquet.iter_batches(256, columns=["image"]):
            for cell in batch.column(0).to_pylist():
                if number in numbers:
                    yield _read(cell["bytes"] if isinstance(cell, dict) else cell, f"{file}, row {number}")
                number += 1


EVERY = range(sys.maxsize)


def count_images(source: str) -> int:
    """Number of images of `real_images`. Few are read."""
    images, shards = ([], []) if source in ASSETS else _files(source)
    if shards and shards[0].exists():
        import pyarrow.parquet as pq

        return sum(pq.read_metadata(file).num_rows for file in shards)
    return len(images) or sum(1 for _ in real_images(source))


def real_images(source: str, numbers: Container[int] = EVERY) -> Iterator[Tensor]:
    """uint8 [3, H, W] of every image of a folder, of parquet files, of ADM's .npz, or of the 2,000 of `fashion`, in order.

    source: a path, or owner/name[:split] of a data set of the hub that is on this machine (`fewstep.hub`).
    numbers: numbers of images, of which others are not decoded.
    Raises ValueError for a source without images, and for an image that cannot be read.
    """
    if source in ASSETS:
        yield from (image for i, image in enumerate(torch.from_numpy(load_embedded()[0])) if i in numbers)
        return
    path = Path(source)
    if not path.exists() and not is_dataset(source):
        raise MissingError(
            "images", repr(source), f"{', '.join(ASSETS)}, a path of images, or owner/name of a data set"
        )
    if path.suffix == ".npz":
        arrays = load_statistics(path).images
        if arrays is None:
            raise FewstepError("images", f"no arr_0 in {path}", "images")
        yield from (torch.from_numpy(image).permute(2, 0, 1) for i, image in enumerate(arrays) if i in numbers)
        return
    images, shards = _files(source)
    if images:
        yield from (_read(file, str(file)) for i, file in enumerate(images) if i in numbers)
    elif shards:
        yield from _parquet(shards, numbers)
    else:
        expected = f"images ({', '.join(IMAGE_SUFFIXES)}, .parquet, .npz with arr_0)"
        raise FewstepError("images", f"none in {path}", expected)


def stacks(images: Iterable[Tensor], size: int = 64) -> Iterator[Tensor]:
    """Runs of images of one shape as [B, 3, H, W], so that no image is resized to another's size."""
    stack: list[Tensor] = []
    for image in images:
        if stack and (len(stack) == size or image.shape != stack[0].shape):
            yield torch.stack(stack)
            stack = []
        stack.append(image)
    if stack:
        yield torch.stack(stack)
