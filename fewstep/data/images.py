"""Image files to square tensors."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from tqdm.auto import tqdm

from fewstep.errors import FewstepError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""Suffixes of image files in a folder, for training and for scoring."""
PROGRESS_FROM = 10_000
"""Number of images from which on a check of them shows its progress."""
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, IndexError, Image.DecompressionBombError)
"""Exceptions of PIL, which depend on the format and on what is broken."""


def unreadable(where: str, error: Exception) -> FewstepError:
    return FewstepError(f"image {where}", f"a file that cannot be read ({error})", "an image")


def image_files(folder: Path) -> list[Path]:
    """All images below a folder, in order of their paths."""
    return sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)


def scaled(pixels: NDArray[np.uint8]) -> Tensor:
    """uint8 0 ... 255 to float32 in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).float() / 127.5 - 1


def square(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """uint8 [3, size, size]: upright, centre-cropped, resized with PIL's antialiased bicubic filter."""
    image = ImageOps.exif_transpose(image).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    # Cropped first: resize(box=...) would let the filter reach beyond the box.
    image = image.crop((left, top, left + side, top + side))
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


def decode(content: Path | bytes | None, where: str, size: int) -> NDArray[np.uint8]:
    """A file or its bytes as `square` gives it. Raises FewstepError, with `where`, for what is not an image."""
    try:
        if content is None:
            raise ValueError("empty")
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            return square(image, size)
    except UNREADABLE as e:
        raise unreadable(where, e) from None


def check_whole(content: Path | bytes | None, where: str) -> None:
    """Check that an image is complete by its header and its end. Raises FewstepError, as `decode`, for any other content.

    Only decoding shows whether the bytes between are sound; it is done for formats without an end mark.
    """
    try:
        if content is None:
            raise ValueError("empty")
        with (
            io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file,
            Image.open(file) as image,
        ):
            if not _ends_well(file, str(image.format)):
                image.load()
    except UNREADABLE as e:
        raise unreadable(where, e) from None


def _ends_well(file: BinaryIO, kind: str) -> bool:
    """Whether the end of a file shows that nothing is missing; where not, some could still be whole, as with bytes behind."""
    size = file.seek(0, io.SEEK_END)
    if kind == "WEBP":  # RIFF: what the header says of the length
        file.seek(4)
        return size >= int.from_bytes(file.read(4), "little") + 8
    file.seek(max(0, size - 12))
    end = file.read()
    return (kind == "JPEG" and end.endswith(b"\xff\xd9")) or (kind == "PNG" and b"IEND" in end)


def problem_of(content: Path | bytes | None, where: str) -> str | None:
    """The message of `check_whole`, None for a whole image."""
    try:
        check_whole(content, where)
    except ValueError as e:
        return str(e)
    return None


def with_progress(found: Iterable[str | None], total: int, quiet: bool) -> Iterable[str | None]:
    """The same with a progress bar, for many images."""
    return tqdm(found, "checking images", total, disable=quiet or total < PROGRESS_FROM, dynamic_ncols=True)
