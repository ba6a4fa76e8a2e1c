"""Folders of images."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fewstep.data.base import Condition, Raw, Source
from fewstep.data.hub import local_files
from fewstep.data.images import IMAGE_SUFFIXES, decode, image_files, problem_of, scaled, with_progress
from fewstep.data.metadata import class_labels, find_metadata, read_metadata
from fewstep.errors import FewstepError, MissingError


class Folder(Source):
    """A folder of images in the layout of Hugging Face's imagefolder.

    metadata.jsonl, lines of {"file_name": ..., "text": ...}, or metadata.csv, columns file_name and text, says which
    images there are and their captions. Without them, every image below the folder counts, captioned by the name of the
    folder it lies in, or "" at the top. With num_labels, these names in sorted order are the labels instead.
    """

    has_images = True

    def __init__(self, path: Path, image_size: int, num_labels: int | None = None) -> None:
        path, _ = local_files(path)
        if not path.is_dir():
            raise MissingError("data.path", repr(str(path)), "a folder of images")
        self.path, self.image_size = path, image_size
        self.values: Sequence[Condition]
        metadata = find_metadata(path) if num_labels is None else None
        if metadata:
            self.files, self.values = read_metadata(metadata)
        else:
            self.files = image_files(path)
            names = ["" if f.parent == path else f.parent.name for f in self.files]
            self.values = (
                [n.replace("_", " ") for n in names] if num_labels is None else class_labels(names, num_labels, path)
            )
        if not self.files:
            raise FewstepError(
                "data.path", f"no image in {metadata or path}", f"files ending in {', '.join(IMAGE_SUFFIXES)}"
            )
        self.conditions = "prompt" if num_labels is None else "label"

    def __len__(self) -> int:
        return len(self.files)

    def get(self, indices: Sequence[int]) -> Raw:
        pixels = [decode(self.files[i], str(self.files[i]), self.image_size) for i in indices]
        return Raw(scaled(np.stack(pixels)), self.conditions_at(indices), list(indices))

    def conditions_at(self, indices: Sequence[int]) -> list[Condition]:
        return [self.values[i] for i in indices]

    def broken(self, indices: Sequence[int], thorough: bool = False, quiet: bool = False) -> dict[int, str]:
        with ThreadPoolExecutor(32) as pool:
            found = pool.map(lambda i: problem_of(self.files[i], str(self.files[i])), indices)
            return {
                i: problem
                for i, problem in zip(indices, with_progress(found, len(indices), quiet), strict=True)
                if problem
            }

    def image_key(self, index: int) -> str:
        """Path below the folder and size in bytes: neither moving the folder nor adding files changes it."""
        file = self.files[index]
        return f"{os.path.relpath(file, self.path)} {file.stat().st_size}"
