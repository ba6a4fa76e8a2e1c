"""Parts of a pipeline that leave memory while nothing calls them, and return."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Reload = Callable[[Sequence[str]], Mapping[str, nn.Module]]
"""Loads parts of a pipeline anew, by name, in float32 on the CPU."""


class Parts:
    """Which networks of a pipeline are away. One that is away is None in the pipeline: a stray use fails, and is not slow.

    Attributes:
        reload: where parts come from again, which then leave main memory too; None = they wait there.
        away: name -> the part that waits in main memory, or None for one that will be loaded anew.
    """

    def __init__(self, pipeline: "DiffusionPipeline") -> None:
        self.pipeline = pipeline
        self.reload: Reload | None = None
        self.away: dict[str, nn.Module | None] = {}

    def release(self, names: Sequence[str]) -> None:
        """Send these parts away; those that the pipeline has not, or not any more, are none to send."""
        for name in names:
            part = self.pipeline.components.get(name)
            if part is not None:
                self.away[name] = None if self.reload is not None else part.to("cpu")
                self.pipeline.register_modules(**{name: None})

    def recall(self, names: Sequence[str], device: torch.device, dtype: torch.dtype) -> None:
        """Bring back those of these parts that are away, frozen."""
        wanted = [name for name in names if name in self.away]
        gone = [name for name in wanted if self.away[name] is None]
        back: dict[str, nn.Module | None] = {name: self.away[name] for name in wanted}
        if gone and self.reload is not None:
            back |= self.reload(gone)
        for name, part in back.items():
            assert part is not None  # parts leave main memory only where they can be loaded anew
            part.requires_grad_(False).eval().to(device=device, dtype=dtype)
            self.pipeline.register_modules(**{name: part})
            del self.away[name]
