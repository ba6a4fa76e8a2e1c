"""Rows of tensors under keys, in the safetensors files of a folder that only grows.

A file names the keys of its rows in its own header; every file is whole. `index.json` says where each key is; it is
written when all files are, and readers read only what it lists.
"""

import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fewstep import io


class TensorStore:
    """A folder of rows: written once, read in any order."""

    OPEN_FILES: ClassVar[int] = 128

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places: dict[str, tuple[str, int]] = {}
        """Key -> file and row in it, of `read_index`."""
        self._open: OrderedDict[str, safe_open] = OrderedDict()

    # Writing ----------------------------------------------------------------------------------------------------------

    def written(self) -> dict[str, list[str]]:
        """File -> keys of its rows, of every whole file, indexed or not."""
        found = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                found[path.name] = json.loads(file.metadata()["keys"])
        return found

    def write(self, keys: Sequence[str], rows: Mapping[str, Tensor]) -> None:
        """One file with rows of each name [len(keys), ...]. It is named after its keys, so that no two writers collide."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = io.blake2b(" ".join(keys), 8).hex()
        tensors = {k: v.detach().contiguous().cpu() for k, v in rows.items()}
        with io.atomic(self.folder / f"{name}.safetensors") as partial:
            save_file(tensors, partial, {"keys": json.dumps(list(keys))})

    def clean(self) -> None:
        """Delete what interrupted writes left; not while another process writes."""
        io.prune(self.folder)

    def write_index(self, about: Mapping[str, object]) -> None:
        """Write `index.json`: a description of the rows, and the keys of every file."""
        io.write_json({"about": dict(about), "files": self.written()}, self.folder / "index.json", indent=None)

    # Reading ----------------------------------------------------------------------------------------------------------

    def read_index(self) -> None:
        """Read which rows are indexed; none where there is no index."""
        path = self.folder / "index.json"
        files = io.read_json(path)["files"] if path.exists() else {}
        self.places = {key: (file, row) for file, keys in files.items() for row, key in enumerate(keys)}

    def missing(self, keys: Iterable[str]) -> list[str]:
        return [key for key in keys if key not in self.places]

    def read(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """Name -> rows [len(keys), ...] on the CPU, of at least one key. Raises KeyError for a key that is not indexed."""
        rows = []
        for key in keys:
            name, row = self.places[key]
            file = self._file(name)
            rows.append({k: file.get_slice(k)[row : row + 1] for k in file.keys()})  # noqa: SIM118  # it is no mapping
        return {k: torch.cat([row[k] for row in rows]) for k in rows[0]}

    def _file(self, name: str) -> safe_open:
        if name not in self._open:
            self._open[name] = safe_open(self.folder / name, "pt")
            if len(self._open) > self.OPEN_FILES:
                self._open.popitem(last=False)
        self._open.move_to_end(name)
        return self._open[name]
