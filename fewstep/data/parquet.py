"""Parquet files of images, texts and labels that need not fit into memory."""

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fewstep.data.base import Condition, ConditionKind, Raw, Source, no_images
from fewstep.data.hub import local_files
from fewstep.data.images import decode, problem_of, scaled, with_progress
from fewstep.errors import FewstepError, MissingError


class LazyColumn:
    """column[i] is row i, counted through all files; the row groups read last are held, up to `held_bytes` of them.

    A data set smaller than that is read once. Of a larger one in shuffled order, nearly every row costs the reading of
    its row group: a hundred rows where Hugging Face's tools wrote the images, the whole file where others did.
    """

    def __init__(self, files: Sequence[Path], name: str, held_bytes: int) -> None:
        """Raises ValueError for a file without the column."""
        self.files, self.name, self.held_bytes = files, name, held_bytes
        self.metadata = [pq.read_metadata(f) for f in files]
        for file, metadata in zip(files, self.metadata, strict=True):
            if name not in (names := metadata.schema.to_arrow_schema().names):
                raise FewstepError(
                    "data.path", f"columns {', '.join(names)} in {file}", f"{name}, as in the other files of the folder"
                )
        self.groups = [(f, g) for f, m in enumerate(self.metadata) for g in range(m.num_row_groups)]
        self.starts = [0, *accumulate(self.metadata[f].row_group(g).num_rows for f, g in self.groups)]
        column = [
            m.row_group(g).column(c) for m in self.metadata for g in range(m.num_row_groups) for c in _columns(m, name)
        ]
        self.compressed_bytes = sum(c.total_compressed_size for c in column)
        self.file_starts = [0, *accumulate(m.num_rows for m in self.metadata)]
        self.held: OrderedDict[int, pa.ChunkedArray] = OrderedDict()

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, row: int) -> object:
        """The cell as Python's own types. Raises ValueError for a row group that cannot be read."""
        group = bisect_right(self.starts, row) - 1
        return self._group(group)[row - self.starts[group]].as_py()

    def place(self, row: int) -> tuple[Path, int]:
        """The file that holds a row, and the row's number in it."""
        file = bisect_right(self.file_starts, row) - 1
        return self.files[file], row - self.file_starts[file]

    def _group(self, group: int) -> "pa.ChunkedArray":
        if group not in self.held:
            file, index = self.groups[group]
            try:
                with pq.ParquetFile(self.files[file], metadata=self.metadata[file]) as parquet:
                    self.held[group] = parquet.read_row_group(index, columns=[self.name])[self.name]
            except (OSError, pa.ArrowException) as e:
                raise FewstepError("data.path", f"{self.files[file]}, which cannot be read ({e})", "parquet") from None
            while len(self.held) > 1 and sum(column.nbytes for column in self.held.values()) > self.held_bytes:
                self.held.popitem(last=False)
        self.held.move_to_end(group)
        return self.held[group]


def _columns(metadata: pq.FileMetaData, name: str) -> list[int]:
    """Numbers of the leaves of a column, which is several for a struct."""
    return [c for c in range(metadata.num_columns) if metadata.schema.column(c).path.split(".")[0] == name]


class Parquet(Source):
    """One parquet file, or all in a folder; of their images, still compressed, at most HELD_BYTES are in memory.

    Columns: image (encoded bytes, or Hugging Face's struct of bytes and path), text, label, each optional. With
    num_labels the conditions are the labels; otherwise the texts, the labels, or nothing.
    """

    HELD_BYTES: ClassVar[int] = 2**31

    def __init__(self, path: Path, image_size: int, num_labels: int | None = None) -> None:
        path, shards = local_files(path)
        files = shards or (sorted(path.rglob("*.parquet")) if path.is_dir() else [path])
        if not files or not files[0].exists():
            raise MissingError("data.path", repr(str(path)), "a parquet file or a folder of them")
        known = ("image", "text", "label")
        try:
            names = pq.read_schema(files[0]).names
            self.size = sum(pq.read_metadata(f).num_rows for f in files)
            if not self.size or not set(known) & set(names):
                found = f"{self.size} rows, columns {', '.join(names)}"
                raise FewstepError(
                    "data.path", f"{found} in {path}", f"rows, and any of the columns {', '.join(known)}"
                )
            if num_labels is not None and "label" not in names:
                raise FewstepError("data.num_labels", f"columns {', '.join(names)} in {path}", "a column label")
            texts = "text" in names and num_labels is None
            column = "text" if texts else "label" if "label" in names else None
            self.images = LazyColumn(files, "image", self.HELD_BYTES) if "image" in names else None
            self.values = (
                pa.concat_tables(pq.read_table(f, columns=[column]) for f in files)[column] if column else None
            )
        except (OSError, pa.ArrowException) as e:
            raise FewstepError("data.path", f"{path}, which cannot be read ({e})", "parquet") from None
        self.path, self.image_size, self.has_images = path, image_size, self.images is not None
        kinds: dict[str | None, ConditionKind] = {"text": "prompt", "label": "label", None: "none"}
        self.conditions = kinds[column]
        if self.values is not None and self.conditions == "label":
            _check_labels(self.values.to_pylist(), num_labels, path)

    def __len__(self) -> int:
        return self.size

    def get(self, indices: Sequence[int]) -> Raw:
        images = None if self.images is None else scaled(np.stack([self._image(i) for i in indices]))
        return Raw(images, self.conditions_at(indices), list(indices))

    def conditions_at(self, indices: Sequence[int]) -> list[Condition]:
        values = [None if self.values is None else self.values[i].as_py() for i in indices]
        return ["" if v is None else v for v in values] if self.conditions == "prompt" else values

    def broken(self, indices: Sequence[int], thorough: bool = False, quiet: bool = False) -> dict[int, str]:
        """The broken images; those of more than HELD_BYTES are read only if `thorough`, for training reads them again."""
        if self.images is None or (self.images.compressed_bytes > self.HELD_BYTES and not thorough):
            return {}
        found = (problem_of(*self._content(i)) for i in indices)
        return {
            i: problem for i, problem in zip(indices, with_progress(found, len(indices), quiet), strict=True) if problem
        }

    def image_key(self, index: int) -> str:
        """Path below the folder and size in bytes of the file, and row in it."""
        if self.images is None:
            raise no_images(self.conditions)
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
        assert cell is None or isinstance(cell, bytes)
        return cell, where


def _check_labels(labels: Sequence[object], num_labels: int | None, path: Path) -> None:
    top = num_labels if num_labels is not None else float("inf")
    for row, label in enumerate(labels):
        if not isinstance(label, int) or not 0 <= label < top:
            limit = "0 or more" if num_labels is None else f"0 to {num_labels - 1}, by data.num_labels"
            raise FewstepError("data.path", f"label {label!r} in row {row} of {path}", limit)
