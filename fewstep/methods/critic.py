"""The critic of distribution matching: a denoiser of the student's samples with a head that tells real from fake."""

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fewstep.process import Prediction
from fewstep.teachers.base import Cond, Denoiser

CHANNELS_PER_GROUP = 16
"""Fewest channels that a head normalises together: on a 1x1 map, groups of one or two would keep nothing but signs."""


class Noised(NamedTuple):
    """What a denoiser is asked about: x_t [B, ...], t [B] and the conditions."""

    x_t: Tensor
    t: Tensor
    cond: Cond


class _Heard(Exception):
    """All features are there; the rest of the network need not run."""


def features(denoiser: nn.Module, layers: Sequence[nn.Module], at: Noised) -> list[Tensor]:
    """The outputs [B, C, h, w] of `layers`, modules of `denoiser`, in float32; what comes after the last does not run."""
    heard: dict[int, Tensor] = {}

    def listen(index: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            heard[index] = output[0] if isinstance(output, tuple) else output
            if len(heard) == len(layers):
                raise _Heard

        return hook

    with ExitStack() as stack, suppress(_Heard):
        for index, layer in enumerate(layers):
            stack.callback(layer.register_forward_hook(listen(index)).remove)
        denoiser(*at)
    return [heard[index].float() for index in range(len(layers))]


class Head(nn.Sequential):
    """A feature map [B, C, h, w] to one logit [B, 1] (Yin et al. 2024, DMD2, released code).

    Convolutions of stride 2 down to 4 x 4, one over all of that, and a linear map; each but the last followed by
    GroupNorm and SiLU. For SDXL's 1280 x 32 x 32 these are the paper's five, with 32 groups.
    """

    def __init__(self, channels: int, height: int, width: int) -> None:
        parts: list[nn.Module] = []
        while min(height, width) >= 8:
            parts += [nn.Conv2d(channels, channels, 4, 2, 1), *_activated(channels)]
            height, width = height // 2, width // 2
        parts += [nn.Conv2d(channels, channels, (height, width)), *_activated(channels)]
        super().__init__(*parts, nn.Conv2d(channels, 1, 1), nn.Flatten())


def _activated(channels: int) -> tuple[nn.Module, nn.Module]:
    groups = max(n for n in range(1, 33) if channels % n == 0 and n * CHANNELS_PER_GROUP <= max(channels, 16))
    return nn.GroupNorm(groups, channels), nn.SiLU()


class Critic(nn.Module):
    """Denoiser of the student's samples, and heads on features: its own, or another network's that are given to it.

    Args:
        denoiser: the network to learn.
        heads: one for each feature map; none where there is no adversarial loss.
        layers: names of the denoiser's modules whose outputs the heads see; empty where features are given.
    """

    def __init__(self, denoiser: Denoiser, heads: Sequence[Head] = (), layers: Sequence[str] = ()) -> None:
        super().__init__()
        self.denoiser, self.heads, self.layers = denoiser, nn.ModuleList(heads), tuple(layers)

    def forward(
        self, denoise: Noised | None = None, judge: Noised | None = None, given: list[Tensor] | None = None
    ) -> tuple[Prediction | None, Tensor | None]:
        """Both halves of a turn in one call, as distributed training wants it: prediction, and logits [B, heads]."""
        prediction = None if denoise is None else self.denoiser(*denoise)
        if judge is not None:
            given = features(self.denoiser, [self.denoiser.get_submodule(name) for name in self.layers], judge)
        if given is None:
            return prediction, None
        # Autocast would round the logits; the heads cost next to nothing.
        with torch.autocast(given[0].device.type, enabled=False):
            return prediction, torch.cat([head(f) for head, f in zip(self.heads, given, strict=True)], dim=1)
