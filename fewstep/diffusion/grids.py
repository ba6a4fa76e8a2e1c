"""Grids of timesteps: the teacher's solver's, the student's and those of log-normal noise levels."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from fewstep.diffusion.schedule import Schedule, noise_level
from fewstep.diffusion.shapes import Counts, GridTimes, Levels, SamplerTimes, Scales, Time, Times, TimesOfSteps
from fewstep.errors import FewstepError


class Grid(NamedTuple):
    """Timesteps, ascending in t: of the state, of the teacher's step from it, and of the end of its phase.

    -1 is clean data, as everywhere.
    """

    t: GridTimes
    s: GridTimes
    end: GridTimes

    def to(self, device: torch.device) -> "Grid":
        return Grid(*(v.to(device) for v in self))

    def at(self, index: Counts) -> "Grid":
        """Those at the positions `index`."""
        return Grid(*(v[index] for v in self))


def even_grid(points: int, num_train_timesteps: int) -> Grid:
    """Even timesteps, for each the next cleaner one (t = 0 below the first), and one phase down to t = 0: LCM's."""
    k = num_train_timesteps // points
    t = torch.arange(1, points + 1) * k - 1
    return Grid(t, (t - k).clamp_min(0), torch.zeros_like(t))


def karras_levels(low: float, high: float, n: int, rho: float = 7.0) -> Levels:
    """n noise levels from `high` down to `low`, even in their rho-th root (Karras et al. 2022, eq. 5), in float64."""
    roots = torch.linspace(high ** (1 / rho), low ** (1 / rho), n, dtype=torch.float64)
    return roots**rho


def karras_grid(
    schedule: Schedule, points: int, num_train_timesteps: int, sampled: SamplerTimes, rho: float = 7.0
) -> Grid:
    """The grid of Consistency Models (Song et al. 2023): sigma / alpha at `points` Karras levels between timestep 0, where
    both sides of the lowest pair end, and the noisiest.

    A discrete network is valid at whole timesteps: each level becomes the nearest in log sigma / alpha, and levels that fall
    on one timestep are one. The points next to `sampled`, timesteps at which the sampler runs, are moved there.

    Raises ValueError for schedules that end in pure noise, whose sigma / alpha is infinite.
    """
    every = torch.arange(num_train_timesteps)
    if float(schedule(every[-1:])[0]) < 1e-4:
        raise FewstepError(
            "karras", "a schedule that ends in pure noise", "a largest sigma / alpha", "Set grid.kind to even"
        )
    levels = noise_level(schedule, every).log()
    karras = karras_levels(float(levels[0].exp()), float(levels[-1].exp()), points, rho).log()
    times = torch.unique((levels[:, None] - karras).abs().argmin(0))
    for u in sampled.tolist():
        if not bool((times == u).any()):
            inner = times[1:-1]
            inner[(levels[inner] - levels[u]).abs().argmin()] = u
    times = torch.unique(times)
    return Grid(times[1:], times[:-1], torch.zeros_like(times[1:]))


def phase_grid(jumps: SamplerTimes, points: int) -> Grid:
    """The grid whose phases are the sampler's jumps, each in as many even steps; whole numbers where `jumps` are.

    So that whatever the stock scheduler makes of a step count, the student is trained for it. Where the phases divide
    `points` and these the training timesteps, it is PCM's (Wang et al. 2024): edges every points / phases.

    jumps: timesteps at which the sampler's steps begin, and where the last one ends, [phases + 1], descending.
    """
    phases = len(jumps) - 1
    n, whole = points // phases, not jumps.is_floating_point()
    # The steps are even down to clean data, also where the sampler's last one stops short of it, at timestep 0.
    cuts = [*jumps[:-1].tolist(), -1]
    parts = [segment_grid(a, b, n, whole) for a, b in pairwise(cuts)]
    t, s = torch.cat([part[:-1] for part in parts]), torch.cat([part[1:] for part in parts])
    s[-1] = jumps[-1]
    grid = Grid(t, s, jumps[1:].repeat_interleave(n).to(t.dtype))
    return Grid(*(v.flip(0) if whole else v.flip(0).float() for v in grid))


def segment_grid(start: float, end: float, n: int, whole: bool) -> GridTimes:
    """n + 1 even timesteps from `start` down to `end`, whole numbers if asked: those at which a discrete network is valid.

    Raises ValueError where whole numbers between the two do not suffice.
    """
    if not whole:
        return torch.linspace(start, end, n + 1, dtype=torch.float64)
    if start - end < n:
        raise FewstepError(
            "sub-steps", f"{n} between timesteps {start:g} and {end:g}", f"at most {max(0, int(start - end))}"
        )
    return torch.linspace(start, end, n + 1, dtype=torch.float64).round().long()


def between(start: Time | Times, end: Times, share: Scales | float) -> Times:
    """The timesteps at `share` of the way from start to end; whole numbers where end's are."""
    times = start + (end - start) * share
    return times if end.is_floating_point() else times.round().long()


def even_steps(t: Times, s: Times, n: int) -> TimesOfSteps:
    """t, n - 1 even timesteps between, and s, for each sample: n + 1 rows."""
    return torch.stack([t, *(between(t, s, i / n) for i in range(1, n)), s])


def trailing_timesteps(steps: int, num_train_timesteps: int) -> tuple[int, ...]:
    """`steps` timesteps down from the noisiest, as even as whole numbers are ("trailing"), clean data being the next."""
    return tuple((torch.linspace(num_train_timesteps, 0, steps + 1).round().long() - 1)[:-1].tolist())


def milestone_timesteps(milestones: Sequence[int], substeps: int, num_train_timesteps: int) -> tuple[int, ...]:
    """Timesteps of a solver through `milestones` [K], descending: `substeps` even ones from each to the next.

    Below the last each is half the one before, while the noise is not lost: even steps to clean data leave out details
    (benchmarks/RESULTS.md). Raises ValueError where whole numbers between milestones do not suffice.
    """
    steps = []
    for t, s in pairwise(milestones):
        if t - s < substeps:
            raise FewstepError("sub-steps", f"{substeps} between timesteps {t} and {s}", f"at most {t - s}")
        steps += torch.linspace(t, s, substeps + 1, dtype=torch.float64).round().long()[:-1].tolist()
    last = milestones[-1] + 1
    while last >= max(2, num_train_timesteps / 200):
        steps.append(last - 1)
        last //= 2
    return tuple(steps)


def log_levels(schedule: Schedule, num_train_timesteps: int) -> Levels:
    """log sigma / alpha at the timesteps 0 ... T - 1, ascending, in float64."""
    return noise_level(schedule, torch.arange(num_train_timesteps)).log()


def lognormal_index(levels: Levels, size: int, mean: float, std: float) -> Counts:
    """`size` positions in ascending logarithms of noise levels, nearest to draws from N(mean, std^2)."""
    drawn = mean + std * torch.randn(size, dtype=levels.dtype, device=levels.device)
    return torch.bucketize(drawn, (levels[1:] + levels[:-1]) / 2)
