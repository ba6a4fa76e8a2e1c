"""Image files to square tensors; captions and labels of image folders."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, IndexError, Image.DecompressionBombError)
"""What PIL raises, according to the format and to what is broken."""


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
    """A file or its bytes as `square` gives it. Raises ValueError, with `where`, for what is not an image."""
    try:
        if content is None:
            raise ValueError("no image bytes")
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            return square(image, size)
    except UNREADABLE as e:
        raise ValueError(f"image {where} cannot be read: {e}") from None


def check_whole(content: Path | bytes | None, where: str) -> None:
    """Raises ValueError, as `decode`, for what is not an image or is cut short. Little is read: the header and the end.

    Whether what lies between is sound, only decoding would tell; it is done where a format has no end to look at.
    """
    try:
        if content is None:
            raise ValueError("no image bytes")
        with (
            io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file,
            Image.open(file) as image,
        ):
            if not _ends_well(file, str(image.format)):
                image.load()
    except UNREADABLE as e:
        raise ValueError(f"image {where} cannot be read: {e}") from None


def _ends_well(file: BinaryIO, kind: str) -> bool:
    """Whether the end of a file shows that nothing is missing; where not, some could still be whole, as with bytes behind."""
    size = file.seek(0, io.SEEK_END)
    if kind == "WEBP":  # RIFF: what the header says of the length
        file.seek(4)
        return size >= int.from_bytes(file.read(4), "little") + 8
    file.seek(max(0, size - 12))
    end = file.read()
    return (kind == "JPEG" and end.endswith(b"\xff\xd9")) or (kind == "PNG" and b"IEND" in end)


def class_labels(names: list[str], num_labels: int, path: Path) -> list[int]:
    """Each name's place among the sorted names. Raises ValueError unless there are num_labels of them."""
    classes = sorted(set(names))
    if len(classes) != num_labels:
        raise ValueError(f"data.num_labels: found {num_labels}; {path} has images in {len(classes)} folders")
    number = {name: i for i, name in enumerate(classes)}
    return [number[n] for n in names]


METADATA = ("metadata.jsonl", "metadata.csv")


def find_metadata(folder: Path) -> Path | None:
    """The captions of an image folder, if there are any.

    Raises ValueError for two such files, and for one that lies deeper: its captions would silently go unread.
    """
    here = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(here) > 1:
        raise ValueError(f"data.path: {folder} has both {' and '.join(METADATA)}; keep one of them")
    deeper = next((f for name in METADATA for f in sorted(folder.rglob(name))), None)
    if not here and deeper:
        raise ValueError(
            f"data.path: captions are looked for in {folder}, and {deeper} lies deeper: set data.path to {deeper.parent}"
        )
    return here[0] if here else None


def read_metadata(metadata: Path) -> tuple[list[Path], list[str]]:
    """Images and captions of a metadata.jsonl or metadata.csv: file_name and text, which is "" where it is missing."""
    files, captions, names = [], [], set[str]()
    for line, row in _csv(metadata) if metadata.suffix == ".csv" else _jsonl(metadata):
        where = f"{metadata}, line {line}"
        if not isinstance(row.get("file_name"), str) or not row["file_name"]:
            raise ValueError(f"{where}: no file_name; found {', '.join(row)}")
        file = metadata.parent / row["file_name"]
        if not file.is_file():
            raise ValueError(f"{where}: image {file} does not exist")
        files.append(file)
        captions.append(str(row.get("text") or ""))
        names |= row.keys()
    if others := sorted(names - {"file_name"}) if "text" not in names else []:
        raise ValueError(f"{metadata}: captions are read from text, and there is {', '.join(others)}: rename one")
    return files, captions


def _jsonl(metadata: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_text(metadata).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{metadata}, line {number}: not a JSON object with file_name and text: {line[:80]!r}")
        yield number, row


def _csv(metadata: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    rows = csv.DictReader(io.StringIO(_text(metadata), newline=""), strict=True)
    try:
        for row in rows:
            if None in row or None in row.values():
                raise csv.Error(f"not {len(rows.fieldnames or [])} columns (a text with a comma needs quotes)")
            yield rows.line_num, row
    except csv.Error as e:
        raise ValueError(f"{metadata}, line {rows.line_num}: {e}") from None


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"data.path: {path} cannot be read as text in UTF-8: {e}") from None
