"""Image files to square tensors; captions and labels of image folders."""

import io
import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor


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
    # PIL raises all of these, according to the format and to what is broken.
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, Image.DecompressionBombError) as e:
        raise ValueError(f"image {where} cannot be read: {e}") from None


def class_labels(names: list[str], num_labels: int, path: Path) -> list[int]:
    """Each name's place among the sorted names. Raises ValueError unless there are num_labels of them."""
    classes = sorted(set(names))
    if len(classes) != num_labels:
        raise ValueError(f"data.num_labels: found {num_labels}; {path} has images in {len(classes)} folders")
    number = {name: i for i, name in enumerate(classes)}
    return [number[n] for n in names]


def read_metadata(metadata: Path) -> tuple[list[Path], list[str]]:
    """Images and captions of a metadata.jsonl; a line without text has the caption ""."""
    files, captions = [], []
    for number, line in enumerate(metadata.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{metadata}, line {number}"
        try:
            row = json.loads(line)
            file, text = metadata.parent / row["file_name"], str(row.get("text") or "")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{where}: not a JSON object with file_name and text: {line[:80]!r}") from None
        if not file.is_file():
            raise ValueError(f"{where}: image {file} does not exist")
        files.append(file)
        captions.append(text)
    return files, captions
