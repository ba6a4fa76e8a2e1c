"""SIGTERM, by which a scheduler of jobs ends a training: it stops after the current iteration, with a checkpoint."""

import signal
from types import TracebackType

import torch
from accelerate import Accelerator


class Termination:
    """Notes a SIGTERM while its context is open, instead of ending the process; the earlier handler then returns."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator, self.noted = accelerator, False

    def __enter__(self) -> "Termination":
        self.previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        signal.signal(signal.SIGTERM, self.previous)

    def _note(self, *_: object) -> None:
        self.noted = True

    def requested(self) -> bool:
        """Whether any process has had one. All processes call it together."""
        if self.accelerator.num_processes == 1:
            return self.noted
        flag = torch.tensor(float(self.noted), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)
