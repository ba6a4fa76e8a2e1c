"""Optimizer states of eight bits, without arithmetic."""

from collections.abc import Callable, Iterable
from itertools import chain

import torch
from torch import nn


class EightBitStates(torch.optim.Optimizer):
    """Keeps what bitsandbytes' AdamW8bit does, which itself needs values: two moments of one byte a value, and the scale of each
    block of them; those of small tensors in float32."""

    SMALL, BLOCK = 4096, 256

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for parameter in chain.from_iterable(group["params"] for group in self.param_groups):
            state, n = self.state[parameter], parameter.numel()
            if parameter.grad is None or state:
                continue
            for moment in ("1", "2"):
                small = n < self.SMALL
                state[f"state{moment}"] = torch.zeros_like(parameter, dtype=torch.float32 if small else torch.uint8)
                if not small:
                    state[f"absmax{moment}"] = torch.zeros(-(-n // self.BLOCK), device=parameter.device)
