"""Parts of distribution matching: noised samples, backward simulation, and the critic with its heads on features."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fewstep.diffusion.prediction import Denoise, Prediction, add_noise
from fewstep.diffusion.rollout import renoise_as, rollout
from fewstep.diffusion.schedule import Schedule
from fewstep.methods.distribution_matching.config import Range
from fewstep.teachers.base import Teacher
from fewstep.teachers.denoiser import Cond, Denoiser

CHANNELS_PER_GROUP = 16
"""Fewest channels that a head normalises together: on a 1x1 map, groups of one or two would keep nothing but signs."""


class Noised(NamedTuple):
    """What a denoiser is asked about: x_t [B, ...], t [B] and the conditions."""

    x_t: Tensor
    t: Tensor
    cond: Cond


class _Heard(Exception):
    """All features are there; the rest of the network need not run."""


def noised(
    teacher: Teacher, x0: Tensor, span: Range, cond: Cond, t: Tensor | None = None, noise: Tensor | None = None
) -> Noised:
    """x0 [B, ...] with noise at timesteps t [B], drawn uniformly from a range (fractions of the teacher's) if None."""
    if t is None:
        total = teacher.num_train_timesteps
        low, high = (round(fraction * total) for fraction in span)
        t = torch.randint(min(low, total - 1), min(high + 1, total), (len(x0),), device=x0.device)
    noise = torch.randn_like(x0) if noise is None else noise
    return Noised(add_noise(teacher.schedule, x0, noise, t), t, cond)


def simulated_input(denoise: Denoise, schedule: Schedule, timesteps: Tensor, stop: int, noise: Tensor) -> Tensor:
    """What a student sees at timesteps[stop] when it samples: backward simulation, without gradient (DMD2).

    Args:
        denoise: the student with its conditions.
        timesteps: those of its sampler, [N].
        noise: that of the result, [B, ...]; all of it where stop is 0.
    """
    if stop == 0:
        return noise
    with torch.no_grad():
        x_t = rollout(denoise, schedule, torch.randn_like(noise), timesteps[:stop], renoise_as(noise))
        before, t = (u.expand(len(noise)) for u in timesteps[stop - 1 : stop + 1])
        x_t = add_noise(schedule, denoise(x_t, before).x0, noise, t)
    # Older releases of torch would give the next, differentiated call the weights that autocast has cast in here.
    torch.clear_autocast_cache()
    return x_t


def features(denoiser: Denoiser, names: Sequence[str], at: Noised) -> list[Tensor]:
    """Outputs [B, C, h, w] of the denoiser's modules of these names, in float32; what follows the last does not run."""
    with _listening(denoiser, names, leave=True) as heard, suppress(_Heard):
        denoiser(*at)
    return heard


def denoised(denoiser: Denoiser, names: Sequence[str], at: Noised) -> tuple[Prediction, list[Tensor]]:
    """The denoiser's prediction, and the same features on its way."""
    with _listening(denoiser, names) as heard:
        prediction = denoiser(*at)
    return prediction, heard


@contextmanager
def _listening(denoiser: Denoiser, names: Sequence[str], leave: bool = False) -> Iterator[list[Tensor]]:
    """A list that has the modules' outputs, in the order of the names, after the block; `leave`: _Heard once all are there."""
    heard: dict[int, Tensor] = {}
    found: list[Tensor] = []

    def listen(index: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            heard[index] = denoiser.feature_map(output)
            if leave and len(heard) == len(names):
                raise _Heard

        return hook

    with ExitStack() as stack, denoiser.eagerly():
        for index, name in enumerate(names):
            stack.callback(denoiser.get_submodule(name).register_forward_hook(listen(index)).remove)
        yield found
    found += [heard[index].float() for index in range(len(names))]


def named_layers(teacher: Teacher, chosen: Sequence[str] | None) -> tuple[str, ...]:
    """Names, within a Denoiser, of the modules on which a discriminator listens: those chosen, or the family's own.

    Raises ValueError for a module that the network does not have.
    """
    modules = dict(teacher.denoiser.named_modules())
    if chosen is None:
        middle = teacher.feature_module(teacher.denoiser)
        return tuple(name for name, module in modules.items() if module is middle)
    for name in chosen:
        if f"net.{name}" not in modules:
            top = ", ".join(name for name, _ in teacher.denoiser.net.named_children())
            raise ValueError(f"method.gan_layers: the network has no module {name!r}; its uppermost are {top}")
    return tuple(f"net.{name}" for name in chosen)


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
        layers: names of the denoiser's modules whose outputs the heads see, unless features are given.
    """

    def __init__(self, denoiser: Denoiser, heads: Sequence[Head] = (), layers: Sequence[str] = ()) -> None:
        super().__init__()
        self.denoiser, self.heads, self.layers = denoiser, nn.ModuleList(heads), tuple(layers)

    def forward(
        self,
        denoise: Noised | None = None,
        judge: Noised | None = None,
        given: list[Tensor] | None = None,
        alike: bool = False,
    ) -> tuple[Prediction | None, Tensor | None]:
        """Both halves of a turn in one call, as distributed training wants it: prediction, and logits [B, heads].

        alike: what is denoised is judged as well, by the features on its way; its logits come after the others.
        """
        prediction, own = None, None
        if denoise is not None and alike:
            prediction, own = denoised(self.denoiser, self.layers, denoise)
        elif denoise is not None:
            prediction = self.denoiser(*denoise)
        if judge is not None:
            given = features(self.denoiser, self.layers, judge)
        if own is not None:
            given = own if given is None else [torch.cat(pair) for pair in zip(given, own, strict=True)]
        if given is None:
            return prediction, None
        # Autocast would round the logits; the heads cost next to nothing.
        with torch.autocast(given[0].device.type, enabled=False):
            return prediction, torch.cat([head(f) for head, f in zip(self.heads, given, strict=True)], dim=1)


def new_critic(teacher: Teacher, layers: Sequence[str]) -> Critic:
    """A critic that starts as the teacher, with a fresh head for each layer, of the size that a probe finds there."""
    if not layers:
        return Critic(teacher.students.trainable())
    device = teacher.placement.device
    x, t = torch.zeros(1, *teacher.latent_shape, device=device), torch.zeros(1, dtype=torch.long, device=device)
    with torch.no_grad():
        found = features(teacher.denoiser, layers, Noised(x, t, teacher.null_condition(1)))
    return Critic(teacher.students.trainable(), [Head(*f.shape[1:]).to(device) for f in found], layers)
