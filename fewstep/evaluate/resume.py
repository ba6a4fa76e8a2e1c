"""Resume of an interrupted evaluation: the features of finished batches, which need not be sampled again."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep import io
from fewstep.errors import FewstepError

COSTS = ("seconds", "evaluations")


@dataclass(frozen=True)
class MeasuredBatch:
    """One batch: whose images, what was measured of them ([B, ...] each), and what drawing them cost."""

    indices: list[int]
    values: dict[str, Tensor]
    seconds: float
    evaluations: int


class BatchStore:
    """The finished batches of one row, each in a file that is whole or absent.

    Batches belong to no process: another number of processes, or another batch size, continues from them as well.
    """

    def __init__(self, folder: Path, settings: Mapping[str, object]) -> None:
        """Open or create the folder. Raises FewstepError for one with the batches of other settings."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "settings.json"
        if not file.exists():
            io.write_json(dict(settings), file)
        found = io.read_json(file)
        other = [key for key in settings if found.get(key) != settings[key]]
        if other:
            raise FewstepError(
                "keep",
                f"images of another evaluation ({', '.join(f'{k}: {found.get(k)}' for k in other)}) in {folder}",
                "those of this one",
                "Name another folder, or remove it",
            )

    def files(self) -> list[Path]:
        """The finished batches, in order; the same on every process, if read before any of them saves another."""
        return sorted(self.folder.glob("batch_*.safetensors"))

    def save(self, batch: MeasuredBatch) -> None:
        tensors = {key: value.cpu().contiguous() for key, value in batch.values.items()}
        tensors["indices"] = torch.tensor(batch.indices)
        tensors |= {
            "seconds": torch.tensor(batch.seconds).double(),
            "evaluations": torch.tensor(batch.evaluations),
        }
        # Named by image indices, so two ranks never write the same file.
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
            raise FewstepError(
                "keep", f"{file}, which is broken ({e})", "a finished batch", "Remove it to sample its images again"
            ) from None

    @staticmethod
    def load(file: Path) -> MeasuredBatch:
        tensors = load_file(file)
        indices: list[int] = tensors.pop("indices").tolist()
        seconds, evaluations = (tensors.pop(key).item() for key in COSTS)
        return MeasuredBatch(indices, tensors, float(seconds), int(evaluations))
