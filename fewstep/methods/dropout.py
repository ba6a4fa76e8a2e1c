"""Dropout of a student in training: its rate, the same masks again for its target, and a block without it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fewstep.teachers.denoiser import DenoiserLike


def set_dropout(network: nn.Module, share: float) -> None:
    """Set the rate of every dropout layer of the network."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = share


def random_state(device: torch.device) -> Tensor:
    """The state of the generator from which networks on the device draw their masks."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def replayed(state: Tensor | None, device: torch.device) -> Iterator[None]:
    """Draw random numbers from `state` on within the block; after it the generator is where it was before. None = no change."""
    if state is None:
        yield
        return
    cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if cuda else []):
        torch.cuda.set_rng_state(state, device) if cuda else torch.set_rng_state(state)
        yield


@contextmanager
def without_dropout(network: DenoiserLike) -> Iterator[None]:
    """Turn dropout off within the block, as in sampling; the rest of the network keeps its mode."""
    dropping = [module for module in network.modules() if isinstance(module, nn.Dropout) and module.training]
    for module in dropping:
        module.training = False
    try:
        yield
    finally:
        for module in dropping:
            module.training = True
