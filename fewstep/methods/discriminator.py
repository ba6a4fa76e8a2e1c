"""Discriminators on features of a denoiser, and the critic of distribution matching, which is both."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TypedDict

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fewstep.diffusion.prediction import Denoise, Prediction, add_noise
from fewstep.diffusion.rollout import renoise_as, rollout
from fewstep.diffusion.schedule import Schedule
from fewstep.diffusion.shapes import FeatureMap, GridTimes, Logits, Samples, Times
from fewstep.errors import FewstepError
from fewstep.methods.noisy_batch import NoisyBatch
from fewstep.teachers.base import Teacher
from fewstep.teachers.denoiser import Cond, Denoiser

CHANNELS_PER_GROUP = 16
"""Fewest channels that a head normalises together: on a 1x1 map, groups of one or two would keep nothing but signs."""


class _StopForward(Exception):
    """All features are recorded; the rest of the network need not run."""


def noised(
    teacher: Teacher,
    x0: Samples,
    span: tuple[float, float],
    cond: Cond,
    t: Times | None = None,
    noise: Samples | None = None,
) -> NoisyBatch:
    """x0 with noise at timesteps t, drawn uniformly from a range (fractions of the teacher's) if None."""
    if t is None:
        total = teacher.num_train_timesteps
        low, high = (round(fraction * total) for fraction in span)
        t = torch.randint(min(low, total - 1), min(high + 1, total), (len(x0),), device=x0.device)
    noise = torch.randn_like(x0) if noise is None else noise
    return NoisyBatch(add_noise(teacher.schedule, x0, noise, t), t, cond)


def simulated_input(denoise: Denoise, schedule: Schedule, timesteps: GridTimes, stop: int, noise: Samples) -> Samples:
    """The student's input at timesteps[stop] when it samples: backward simulation, without gradient (DMD2).

    Args:
        denoise: the student with its conditions.
        timesteps: those of its sampler.
        noise: that of the result; all of it where stop is 0.
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


def features(denoiser: Denoiser, names: Sequence[str], noisy: NoisyBatch) -> list[FeatureMap]:
    """Outputs of the denoiser's modules of these names, in float32; what follows the last does not run."""
    with _record_features(denoiser, names, stop=True) as recorded, suppress(_StopForward):
        denoiser(noisy.x, noisy.t, noisy.cond)
    return recorded


def denoised(denoiser: Denoiser, names: Sequence[str], noisy: NoisyBatch) -> tuple[Prediction, list[FeatureMap]]:
    """The denoiser's prediction, and the same features from the same forward."""
    with _record_features(denoiser, names) as recorded:
        prediction = denoiser(noisy.x, noisy.t, noisy.cond)
    return prediction, recorded


@contextmanager
def _record_features(denoiser: Denoiser, names: Sequence[str], stop: bool = False) -> Iterator[list[FeatureMap]]:
    """A list that has the modules' outputs, in the order of the names, after the block.

    stop: raise _StopForward once all are recorded.
    """
    by_index: dict[int, FeatureMap] = {}
    found: list[FeatureMap] = []

    def recorder(index: int) -> Callable[[nn.Module, object, object], None]:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            by_index[index] = denoiser.feature_map(output)
            if stop and len(by_index) == len(names):
                raise _StopForward

        return hook

    with ExitStack() as stack, denoiser.eagerly():
        for index, name in enumerate(names):
            stack.callback(denoiser.get_submodule(name).register_forward_hook(recorder(index)).remove)
        yield found
    found += [by_index[index].float() for index in range(len(names))]


def named_layers(teacher: Teacher, chosen: Sequence[str] | None, key: str) -> tuple[str, ...]:
    """Names, within a Denoiser, of the modules whose outputs a discriminator sees: those chosen, or the family's own.

    Raises FewstepError with `key` for a module that the network does not have.
    """
    modules = dict(teacher.denoiser.named_modules())
    if chosen is None:
        middle = teacher.denoiser.feature_module()
        return tuple(name for name, module in modules.items() if module is middle)
    for name in chosen:
        if f"net.{name}" not in modules:
            top = ", ".join(name for name, _ in teacher.denoiser.net.named_children())
            raise FewstepError(key, f"{name!r}, which the network does not have", f"modules in one of {top}")
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


class HeadInput(TypedDict, total=False):
    """One of the two arguments of `Critic.forward` for the discriminator's heads."""

    discriminate: NoisyBatch
    given: list[FeatureMap]


class Critic(nn.Module):
    """Denoiser of the student's samples (the fake score), and discriminator heads on its features or on another network's.

    Args:
        denoiser: the network to learn.
        heads: one for each feature map; none where there is no adversarial loss.
        layers: names of the denoiser's modules whose outputs the heads see, unless they get features.
    """

    def __init__(self, denoiser: Denoiser, heads: Sequence[Head] = (), layers: Sequence[str] = ()) -> None:
        super().__init__()
        self.denoiser, self.heads, self.layers = denoiser, nn.ModuleList(heads), tuple(layers)

    def forward(
        self,
        denoise: NoisyBatch | None = None,
        discriminate: NoisyBatch | None = None,
        given: list[FeatureMap] | None = None,
        share_features: bool = False,
    ) -> tuple[Prediction | None, Float[Tensor, "all heads"] | None]:
        """Both tasks in one call, which distributed training needs: prediction, and logits.

        Args:
            denoise: input of the denoiser.
            discriminate: input whose features the heads see.
            given: features of another network for the heads, instead.
            share_features: the heads also see the features of `denoise`, from the same forward; these logits come last.
        """
        prediction, own = None, None
        if denoise is not None and share_features:
            prediction, own = denoised(self.denoiser, self.layers, denoise)
        elif denoise is not None:
            prediction = self.denoiser(denoise.x, denoise.t, denoise.cond)
        if discriminate is not None:
            given = features(self.denoiser, self.layers, discriminate)
        if own is not None:
            given = own if given is None else [torch.cat(pair) for pair in zip(given, own, strict=True)]
        return prediction, None if given is None else self.logits(given)

    def logits(self, maps: Sequence[FeatureMap]) -> Logits:
        """The heads' logits on one feature map each, in float32: autocast would round them."""
        with torch.autocast(maps[0].device.type, enabled=False):
            return torch.cat([head(f) for head, f in zip(self.heads, maps, strict=True)], dim=1)


def new_critic(teacher: Teacher, layers: Sequence[str]) -> Critic:
    """A critic that starts as the teacher, with a fresh head for each layer, of the size that a probe finds there."""
    if not layers:
        return Critic(teacher.students.trainable())
    device = teacher.placement.device
    x, t = torch.zeros(1, *teacher.latent_shape, device=device), torch.zeros(1, dtype=torch.long, device=device)
    with torch.no_grad():
        found = features(teacher.denoiser, layers, NoisyBatch(x, t, teacher.null_condition(1)))
    return Critic(teacher.students.trainable(), [Head(*f.shape[1:]).to(device) for f in found], layers)
