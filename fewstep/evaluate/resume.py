"""What an interrupted evaluation has done: the features of finished batches, by which it goes on without drawing them again."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep import io

COSTS = ("seconds", "evaluations")


@dataclass(frozen=True)
class Measured:
    """One batch: whose images, what was measured of them ([B, ...] each), and what drawing them cost."""

    indices: list[int]
    values: dict[str, Tensor]
    seconds: float
    evaluations: int


class Keeper:
    """The finished batches of one row, each in a file that is whole or absent.

    Batches belong to no process: another number of processes, or another batch size, goes on from them as well.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Raises ValueError for a folder that holds the batches of other settings."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "settings.json"
        if not file.exists():
            io.write_json(dict(settings), file)
        found = io.read_json(file)
        other = [key for key in settings if found.get(key) != settings[key]]
        if other:
            raise ValueError(
                f"{folder} keeps images of another evaluation ({', '.join(f'{k}: {found.get(k)}' for k in other)}): "
                "name another folder, or remove it"
            )

    def files(self) -> list[Path]:
        """The finished batches, in order; the same on every process, if asked before any of them goes on."""
        return sorted(self.folder.glob("batch_*.safetensors"))

    def save(self, batch: Measured) -> None:
        tensors = {key: value.cpu().contiguous() for key, value in batch.values.items()}
        tensors["indices"] = torch.tensor(batch.indices)
        tensors |= {
            "seconds": torch.tensor(batch.seconds).double(),
            "evaluations": torch.tensor(batch.evaluations),
        }
        # By the clock of indices, not of processes: two processes never write one name.
        name = f"batch_{batch.indices[0]:08d}_{batch.indices[-1]:08d}.safetensors"
        with io.atomic(self.folder / name) as partial:
            save_file(tensors, partial)

    @staticmethod
    def indices(file: Path) -> list[int]:
        from safetensors import safe_open

        try:
            with safe_open(file, "pt") as f:
                found: list[int] = f.get_tensor("indices").tolist()
                return found
        except (SafetensorError, OSError) as e:
            raise ValueError(f"{file} is broken ({e}); remove it, and its images are drawn again") from None

    @staticmethod
    def load(file: Path) -> Measured:
        tensors = load_file(file)
        indices: list[int] = tensors.pop("indices").tolist()
        seconds, evaluations = (tensors.pop(key).item() for key in COSTS)
        return Measured(indices, tensors, float(seconds), int(evaluations))
