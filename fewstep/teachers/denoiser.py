"""A denoiser: a network, how its family calls it, and how its output is read."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fewstep.diffusion.prediction import Prediction, PredictionType, read
from fewstep.diffusion.schedule import Schedule

Cond = dict[str, Tensor]
"""Keyword arguments of the network beside sample and timestep, each batched: [B, ...]."""
Scale = float | Mapping[int, float]
"""A guidance scale (1 = none); or one for each timestep at which a student is evaluated."""


class Call(Protocol):
    """A family's calling convention: (net, x_t, t, cond, guidance_scale, progress) -> raw network output, shaped as x_t."""

    def __call__(
        self,
        net: nn.Module,
        x_t: Tensor,
        t: Tensor,
        cond: Cond,
        guidance_scale: Tensor | None,
        progress: Tensor | None = None,
    ) -> Tensor: ...


FeatureMap = Callable[[Any], Tensor]
"""What a block of the network returns, as a map [B, C, h, w]."""


def first_output(output: Any) -> Tensor:
    """The feature map of a UNet's block."""
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


def tokens_as_map(tokens: Tensor) -> Tensor:
    """Tokens [B, h h, C] of a square image, row by row, as a map [B, C, h, h]."""
    side = round(tokens.shape[1] ** 0.5)
    return tokens.transpose(1, 2).unflatten(2, (side, side))


class Posterior(NamedTuple):
    """What an image is in the teacher's latent space: x0 = mean + std * noise, each [B, C, h, w]; std is 0 for pixels."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        return self.mean + self.std * noise


class DenoiserLike(Protocol):
    """A denoiser as methods call it: itself, or wrapped for distributed training."""

    def __call__(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Cond,
        guidance_scale: Tensor | None = None,
        progress: Tensor | None = None,
        /,
    ) -> Prediction: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


class Denoiser(nn.Module):
    """A network of the teacher's kind: (x_t [B, ...], t [B], cond) -> Prediction in float32.

    `guidance_scale` [B] (1 = none) goes to networks that embed it, `progress` [B] of the target time in its segment, in
    [0, 1], to those that embed that; the others must be given None.

    Attributes:
        shared: the tensors that `net` has in common with another network, which owns them; usually none.
        compiled: whether `net` runs compiled.
    """

    shared: tuple[Tensor, ...] = ()
    compiled: bool = False

    def __init__(
        self,
        net: nn.Module,
        call: Call,
        schedule: Schedule,
        prediction_type: PredictionType,
        feature_map: FeatureMap = first_output,
    ) -> None:
        super().__init__()
        self.net, self.call, self.schedule, self.prediction_type = net, call, schedule, prediction_type
        self.feature_map = feature_map

    def compile_net(self) -> None:
        """Let the network run compiled from its next call on."""
        # nn.Module.compile works in place: the network's class, names and copies stay plain.
        self.net.compile()
        self.compiled = True

    def eagerly(self) -> AbstractContextManager[Any]:
        """Where the network runs as written, so that hooks on its modules are called."""
        return torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()

    def with_net(self, net: nn.Module) -> "Denoiser":
        """The same reading of another network."""
        return Denoiser(net, self.call, self.schedule, self.prediction_type, self.feature_map)

    def forward(
        self, x_t: Tensor, t: Tensor, cond: Cond, guidance_scale: Tensor | None = None, progress: Tensor | None = None
    ) -> Prediction:
        output = self.call(self.net, x_t, t, cond, guidance_scale, progress)
        return read(self.schedule, self.prediction_type, output, x_t, t)

    def clone(self) -> "Denoiser":
        """A trainable copy; `call`, `schedule` and the tensors that are `shared` stay shared, weights do not."""
        copied = self.with_net(copy.deepcopy(self.net, {id(tensor): tensor for tensor in self.shared}))
        copied.shared = self.shared
        return copied.learnable()

    def learnable(self) -> "Denoiser":
        """Itself in training mode; what is its own is in float32 and takes gradients, what it shares is left as it is."""
        shared = {id(tensor) for tensor in self.shared}
        for parameter in self.parameters():
            if id(parameter) not in shared:
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        return self.train()


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, but for those that the denoisers in `module` share with another network."""
    shared = {id(tensor) for part in module.modules() if isinstance(part, Denoiser) for tensor in part.shared}
    return {name: v for name, v in module.state_dict(keep_vars=True).items() if id(v) not in shared}
