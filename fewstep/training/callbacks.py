"""Functions of one's own that a run calls; they get values and cannot change the training."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fewstep.training.run import Run


class Callback:
    """Override what you need. Called on the main process only; an exception ends the run."""

    def on_log(self, record: Mapping[str, object]) -> None:
        """A line was written to log.jsonl: means of losses, a score, or a warning, each with "iteration"."""

    def on_checkpoint(self, folder: Path, iteration: int) -> None:
        """A checkpoint was written."""

    def on_end(self, run: "Run") -> None:
        """The run is over: exported and scored, or stopped."""
