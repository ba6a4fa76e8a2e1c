"""What a role learns: its own tensors, their optimizer, and how its networks run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.config import OptimConfig, RunConfig
from fewstep.teachers.denoiser import Denoiser, own_tensors


@dataclass(frozen=True)
class Own:
    """The tensors of a network that are not another's: all of them, or its adapters and what else it learns."""

    parameters: list[nn.Parameter]
    buffers: list[Tensor]

    @classmethod
    def of(cls, net: nn.Module) -> "Own":
        parts = own_tensors(net).values()
        learnt = [part for part in parts if isinstance(part, nn.Parameter)]
        return cls(learnt, [part for part in parts if not isinstance(part, nn.Parameter)])

    def requires_grad_(self, on: bool) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(on)

    @torch.no_grad()
    def follow(self, leader: "Own", decay: float) -> None:
        """Move to the leader, as its exponential moving average."""
        followers: list[Tensor] = [*self.parameters]
        torch._foreach_lerp_(followers, [*leader.parameters], 1 - decay)
        for a, b in zip(self.buffers, leader.buffers, strict=True):
            a.copy_(b)


def set_up(net: nn.Module, config: RunConfig[Any], compiled: bool) -> None:
    """Let the denoisers in `net` run as the config says: checkpointed; and compiled, if asked."""
    for part in net.modules():
        if isinstance(part, Denoiser):
            own: Any = part.net
            if config.memory.gradient_checkpointing:
                own.enable_gradient_checkpointing()
            if compiled:
                part.compile_net()


def new_optimizer(parameters: Sequence[nn.Parameter], o: OptimConfig) -> torch.optim.Optimizer:
    """Raises ValueError where bitsandbytes is asked for and not installed."""
    settings: Any = {"lr": o.lr, "betas": o.betas, "eps": o.eps, "weight_decay": o.weight_decay}
    if o.optimizer == "adamw":
        # Fused: one pass over each tensor and no copies of them; on two CPU cores a fifth of the default's time.
        return torch.optim.AdamW(parameters, **settings, fused=True)
    if o.optimizer == "radam":
        return torch.optim.RAdam(parameters, **settings, decoupled_weight_decay=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ValueError(
            "method.optim.optimizer: adamw8bit needs bitsandbytes, which is not installed: pip install 'fewstep[8bit]'"
        ) from None
    return AdamW8bit(parameters, **settings)  # type: ignore[no-any-return]
