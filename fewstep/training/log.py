"""The log of a run: means over a window of iterations, lines of log.jsonl, warnings, an experiment tracker."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fewstep.methods.base import Losses, StepOutput
from fewstep.training.callbacks import Callback

if TYPE_CHECKING:
    from accelerate import Accelerator

Record = dict[str, object]


@dataclass(frozen=True)
class UpdateResult:
    """An optimizer update.

    Attributes:
        losses: means over its micro-batches, and the norm of the gradient as "<role>_grad_norm".
        outputs: what the loss returned for each micro-batch, without gradient.
    """

    losses: Losses
    outputs: list[StepOutput]


class Window:
    """Means since the last line of the log, kept on the device until it is written."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.histograms: dict[str, Tensor] = {}
        self.iterations, self.start = 0, time.perf_counter()

    def add_iteration(self, results: Sequence[UpdateResult]) -> None:
        for result in results:
            self.add(result.losses)
        for output in (output for result in results for output in result.outputs):
            self.add(output.logs)
            for key, value in output.histograms.items():
                self.histograms[key] = self.histograms[key] + value if key in self.histograms else value
        self.iterations += 1

    def add(self, logs: Mapping[str, Tensor]) -> None:
        for key, value in logs.items():
            self.sums[key] = self.sums[key] + value if key in self.sums else value
            self.counts[key] = self.counts.get(key, 0) + 1

    def means(self) -> dict[str, float]:
        return {key: float(value / self.counts[key]) for key, value in self.sums.items()}

    def seconds(self) -> float:
        return time.perf_counter() - self.start


def histogram_means(histogram: Tensor) -> dict[str, float]:
    """Place -> mean, of sums and counts [2, n]; places with a count of 0 are left out."""
    return {str(i): total / count for i, (total, count) in enumerate(histogram.T.tolist()) if count}


class Log:
    """log.jsonl in a run's folder, the tracker, and callbacks; only the main process writes.

    Args:
        tracked: whether an experiment tracker gets the lines, too.
    """

    def __init__(
        self, folder: Path, accelerator: "Accelerator", tracked: bool, callbacks: Sequence[Callback] = ()
    ) -> None:
        self.file, self.accelerator, self.tracked, self.callbacks = (
            folder / "log.jsonl",
            accelerator,
            tracked,
            callbacks,
        )

    def window(self, window: Window, iteration: int, images: int) -> tuple[Record, dict[str, float]]:
        """Write the means of a window of so many images an iteration; the line, and the means alone."""
        means = window.means()
        places = {k: histogram_means(self.accelerator.reduce(v, "sum")) for k, v in window.histograms.items()}
        record: Record = {"iteration": iteration, **means, **places}
        record["images_per_second"] = round(window.iterations * images / window.seconds(), 2)
        if self.accelerator.device.type == "cuda":
            record["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.accelerator.device) / 2**30
        self.write(record)
        return record, means

    def write(self, record: Record) -> None:
        if self.accelerator.is_main_process:
            with self.file.open("a") as f:
                f.write(json.dumps(record) + "\n")
            for callback in self.callbacks:
                callback.on_log(record)
        if self.tracked:
            values = {k: v for k, v in record.items() if k != "iteration"}
            self.accelerator.log(values, step=record["iteration"])

    def warn(self, iteration: int, warning: str) -> None:
        self.write({"iteration": iteration, "warning": warning})
        if self.accelerator.is_main_process:
            tqdm.write(f"warning at iteration {iteration}: {warning}")
