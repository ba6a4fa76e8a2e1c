"""Solvers of the probability-flow ODE: a step's rule, and its application from time to time.

A rule gives the *prediction whose `ode_step` is the solver's step*: so any rule can be used wherever one prediction can.
Denoisers are `(x, t) -> Prediction`, guided or not. Times descend; -1 is clean data, where no denoiser is called.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Literal

import torch

from fewstep.diffusion.prediction import Denoise, Prediction, ode_step
from fewstep.diffusion.schedule import Schedule, like
from fewstep.diffusion.shapes import GridTimes, Samples, Times, TimesOfSteps

Rule = Callable[[Denoise, Schedule, Samples, Times, Times, Prediction | None], Prediction]
"""(denoise, schedule, x, t, s, first) -> prediction whose `ode_step` to s is the step from x at t.

first: denoise(x, t), where it is known already.
"""
Mean = Callable[[Schedule, Prediction, Prediction, Samples, Times], Prediction]
"""(schedule, first, second, x, t) -> the mean prediction over a step from x at t, with predictions at both its ends."""


def ddim(
    denoise: Denoise, schedule: Schedule, x: Samples, t: Times, s: Times, first: Prediction | None = None
) -> Prediction:
    """DDIM (Song et al. 2021, eq. 12, eta = 0); Euler for rectified flow."""
    return denoise(x, t.clamp_min(0)) if first is None else first


def mean_in_noise(schedule: Schedule, first: Prediction, second: Prediction, x: Samples, t: Times) -> Prediction:
    """Trapezoidal rule in sigma / alpha (Karras et al. 2022, algorithm 1; Song et al. 2023, eq. 6).

    In x / alpha the ODE is dx / dk = eps with k = sigma / alpha, so a step takes the mean of eps; where alpha is 0, at pure
    noise, that of x0, by the same rule in x / sigma and 1 / k.
    """
    alpha, sigma = (like(v, first.x0) for v in schedule(t))
    x, x0, eps = x.to(first.x0.dtype), (first.x0 + second.x0) / 2, (first.eps + second.eps) / 2
    pure = alpha < 1e-4
    return Prediction(
        torch.where(pure, x0, (x - sigma * eps) / torch.where(pure, 1, alpha)),
        torch.where(pure, (x - alpha * x0) / sigma.clamp_min(1e-4), eps),
    )


def mean_in_signal(schedule: Schedule, first: Prediction, second: Prediction, x: Samples, t: Times) -> Prediction:
    """Trapezoidal rule in alpha / sigma: the mean of x0, finite at pure noise. t must not be clean data."""
    alpha, sigma = (like(v, x) for v in schedule(t))
    x0 = (first.x0 + second.x0) / 2
    return Prediction(x0, (x.to(x0.dtype) - alpha * x0) / sigma)


def heun(
    denoise: Denoise,
    schedule: Schedule,
    x: Samples,
    t: Times,
    s: Times,
    first: Prediction | None = None,
    mean: Mean = mean_in_noise,
) -> Prediction:
    """Heun's step, of two evaluations; a step to clean data is DDIM's, as there is no denoiser."""
    first = ddim(denoise, schedule, x, t, s, first)
    second = denoise(ode_step(schedule, first, s), s.clamp_min(0))
    clean = like(s < 0, first.x0).bool()
    averaged = mean(schedule, first, second, x, t)
    return Prediction(*(torch.where(clean, a, b) for a, b in zip(first, averaged, strict=True)))


heun_in_signal: Rule = partial(heun, mean=mean_in_signal)

RULES: dict[Literal["ddim", "heun"], Rule] = {"ddim": ddim, "heun": heun}


def path(
    denoise: Denoise,
    schedule: Schedule,
    x: Samples,
    times: TimesOfSteps,
    rule: Rule = ddim,
    first: Prediction | None = None,
) -> Iterator[Samples]:
    """The states that the rule's steps from x reach, at the second of `times` and all later ones."""
    for t, s in pairwise(times):
        x = ode_step(schedule, rule(denoise, schedule, x, t, s, first), s)
        first = None
        yield x


def solve(
    denoise: Denoise,
    schedule: Schedule,
    x: Samples,
    times: TimesOfSteps,
    rule: Rule = ddim,
    first: Prediction | None = None,
) -> Samples:
    """The state at the last of `times`, from x at the first; first: denoise(x, times[0]), where it is known."""
    end = x
    for end in path(denoise, schedule, x, times, rule, first):  # noqa: B007  # the last state is the solution
        pass
    return end


def dpmpp_2m(denoise: Denoise, schedule: Schedule, x: Samples, times: TimesOfSteps) -> Iterator[Samples]:
    """A `path` by DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2); all samples share a row of `times`."""
    before = None
    for i, (t, s) in enumerate(pairwise(times)):
        now = denoise(x, t)
        step = now if before is None else second_order(schedule, x, now, before, times[i - 1 : i + 2, 0])
        x, before = ode_step(schedule, step, s), now
        yield x


def second_order(schedule: Schedule, x: Samples, now: Prediction, before: Prediction, times: GridTimes) -> Prediction:
    """The prediction whose `ode_step` is a step of DPM-Solver++(2M).

    Args:
        x: the state at the second of `times`.
        now, before: the predictions there and at the first of them.
        times: [3], descending: of the last step's start, of this one's start and of its end. At pure noise (the first) and
            clean data (the end) log(alpha / sigma) is infinite, and the step is DDIM's.
    """
    alpha, sigma = (v.double() for v in schedule(times))
    level = (alpha / sigma).log()
    over = ((level[2] - level[1]) / (level[1] - level[0]) / 2).nan_to_num(posinf=0.0).to(now.x0.dtype)
    x0 = now.x0 + over * (now.x0 - before.x0)
    return Prediction(x0, (x - like(alpha[1:2], x) * x0) / like(sigma[1:2], x))


PATHS: dict[Literal["ddim", "dpm"], Callable[[Denoise, Schedule, Samples, TimesOfSteps], Iterator[Samples]]] = {
    "ddim": path,
    "dpm": dpmpp_2m,
}
