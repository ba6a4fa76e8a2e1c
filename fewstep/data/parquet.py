"""A column of parquet files that need not fit into memory."""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


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
                raise ValueError(
                    f"{file} has no column {name}, which other files beside it have; its: {', '.join(names)}"
                )
        self.groups = [(f, g) for f, m in enumerate(self.metadata) for g in range(m.num_row_groups)]
        self.starts = [0, *accumulate(self.metadata[f].row_group(g).num_rows for f, g in self.groups)]
        column = [
            m.row_group(g).column(c) for m in self.metadata for g in range(m.num_row_groups) for c in _columns(m, name)
        ]
        self.compressed_bytes = sum(c.total_compressed_size for c in column)
        self.file_starts = [0, *accumulate(m.num_rows for m in self.metadata)]
        self.held: OrderedDict[int, Any] = OrderedDict()

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, row: int) -> Any:
        """The cell as Python's own types. Raises ValueError for a row group that cannot be read."""
        group = bisect_right(self.starts, row) - 1
        return self._group(group)[row - self.starts[group]].as_py()

    def place(self, row: int) -> tuple[Path, int]:
        """The file that holds a row, and the row's number in it."""
        file = bisect_right(self.file_starts, row) - 1
        return self.files[file], row - self.file_starts[file]

    def _group(self, group: int) -> Any:
        if group not in self.held:
            file, index = self.groups[group]
            try:
                with pq.ParquetFile(self.files[file], metadata=self.metadata[file]) as parquet:
                    self.held[group] = parquet.read_row_group(index, columns=[self.name])[self.name]
            except (OSError, pa.ArrowException) as e:
                raise ValueError(f"{self.files[file]} cannot be read as parquet: {e}") from None
            while len(self.held) > 1 and sum(column.nbytes for column in self.held.values()) > self.held_bytes:
                self.held.popitem(last=False)
        self.held.move_to_end(group)
        return self.held[group]


def _columns(metadata: Any, name: str) -> list[int]:
    """Numbers of the leaves of a column, which is several for a struct."""
    return [c for c in range(metadata.num_columns) if metadata.schema.column(c).path.split(".")[0] == name]
