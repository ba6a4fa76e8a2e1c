"""A denoiser: a network, how its family calls it, and how its output is read."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fewstep.diffusion.prediction import Prediction, PredictionType, read
from fewstep.diffusion.schedule import Schedule
from fewstep.diffusion.shapes import FeatureMap, Latents, PerSample, Samples, Scales, Times

Cond = dict[str, Tensor]
"""Keyword arguments of the network beside sample and timestep, each batched: [B, ...]."""
Scale = float | Mapping[int, float]
"""A guidance scale (1 = none); or one for each timestep at which a student is evaluated."""


class Inputs(NamedTuple):
    """Inputs of a network.

    Attributes:
        x_t: noisy latents.
        t: timesteps.
        cond: conditions, each [B, ...].
        guidance_scale: 1 is none; for networks that embed it and no others.
        progress: the target time within its segment in [0, 1], for networks that embed it and no others.
    """

    x_t: Samples
    t: Times
    cond: Cond
    guidance_scale: Scales | None = None
    progress: PerSample | None = None


Call = Callable[[nn.Module, Inputs], Samples]
"""A family's calling convention: network and inputs to its raw output."""


@dataclass(frozen=True)
class Features:
    """Default modules of discriminator features.

    Attributes:
        module: a network to the module in its middle.
        as_map: the output of any of its blocks to a map.
    """

    module: Callable[[nn.Module], nn.Module]
    as_map: Callable[[object], FeatureMap]


def first_output(output: object) -> FeatureMap:
    """The feature map of a UNet's block."""
    found = output[0] if isinstance(output, tuple) else output
    assert isinstance(found, Tensor)
    return found


UNET_FEATURES = Features(lambda net: net.get_submodule("mid_block"), first_output)


class Posterior(NamedTuple):
    """Posterior of an image in the teacher's latent space: x0 = mean + std * noise; std is 0 for pixels."""

    mean: Latents
    std: Latents

    def sample(self, noise: Latents) -> Latents:
        return self.mean + self.std * noise


class DenoiserLike(Protocol):
    """A denoiser as methods call it: itself, or wrapped for distributed training."""

    def __call__(
        self,
        x_t: Samples,
        t: Times,
        cond: Cond,
        guidance_scale: Scales | None = None,
        progress: PerSample | None = None,
        /,
    ) -> Prediction: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


class Denoiser(nn.Module):
    """A network of the teacher's kind: (x_t, t, cond) -> Prediction in float32.

    `guidance_scale` (1 = none) goes to networks that embed it, `progress` of the target time in its segment, in
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
        features: Features = UNET_FEATURES,
    ) -> None:
        super().__init__()
        self.net, self.call, self.schedule, self.prediction_type = net, call, schedule, prediction_type
        self.features = features

    def compile_net(self) -> None:
        """Let the network run compiled from its next call on."""
        # nn.Module.compile works in place: the network's class, names and copies stay plain.
        self.net.compile()
        self.compiled = True

    def eagerly(self) -> AbstractContextManager[object]:
        """A context in which the network runs as written, so that hooks on its modules are called."""
        return torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()

    def with_net(self, net: nn.Module) -> "Denoiser":
        """Another network, called and read in the same way."""
        return Denoiser(net, self.call, self.schedule, self.prediction_type, self.features)

    def feature_module(self) -> nn.Module:
        """The module in the middle of the network whose output, by `feature_map`, a discriminator sees."""
        return self.features.module(self.net)

    def feature_map(self, output: object) -> FeatureMap:
        """The output of a block of the network as a map."""
        return self.features.as_map(output)

    def forward(
        self,
        x_t: Samples,
        t: Times,
        cond: Cond,
        guidance_scale: Scales | None = None,
        progress: PerSample | None = None,
    ) -> Prediction:
        output = self.call(self.net, Inputs(x_t, t, cond, guidance_scale, progress))
        return read(self.schedule, self.prediction_type, output, x_t, t)

    def clone(self) -> "Denoiser":
        """A trainable copy; `call`, `schedule` and the tensors that are `shared` stay shared, weights do not."""
        copied = self.with_net(copy.deepcopy(self.net, {id(tensor): tensor for tensor in self.shared}))
        copied.shared = self.shared
        return copied.learnable()

    def learnable(self) -> "Denoiser":
        """Itself in training mode; what is its own is in float32 and takes gradients, what it shares is unchanged."""
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
