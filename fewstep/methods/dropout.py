"""Dropout that a student is trained with; the same masks once more for its target, or none."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fewstep.teachers.denoiser import DenoiserLike


def set_dropout(network: nn.Module, share: float) -> None:
    """Let every dropout layer of the network drop this share in training."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = share


def random_state(device: torch.device) -> Tensor:
    """The state of the generator from which networks on the device draw their masks."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def replayed(state: Tensor | None, device: torch.device) -> Iterator[None]:
    """Random numbers begin at `state` again within the block, and after it go on as if it had not been; None = as ever."""
    if state is None:
        yield
        return
    cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if cuda else []):
        torch.cuda.set_rng_state(state, device) if cuda else torch.set_rng_state(state)
        yield


@contextmanager
def without_dropout(network: DenoiserLike) -> Iterator[None]:
    """Nothing is dropped within the block, as in sampling; all else of the network stays in the mode that it is in."""
    dropping = [module for module in network.modules() if isinstance(module, nn.Dropout) and module.training]
    for module in dropping:
        module.training = False
    try:
        yield
    finally:
        for module in dropping:
            module.training = True
