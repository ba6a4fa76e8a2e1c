"""Grids of the loss: timesteps of states, of their targets and of their ends, and the weight of a pair."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from fewstep.diffusion.grids import Grid, even_grid, karras_grid
from fewstep.diffusion.schedule import Schedule, noise_level
from fewstep.diffusion.shapes import Counts, GridTimes, Levels, PerSample, SamplerTimes, Times
from fewstep.errors import FewstepError
from fewstep.methods.consistency import settings
from fewstep.methods.consistency.endpoints import SIGMA_DATA
from fewstep.teachers.base import Teacher

Weight = Callable[[Times, Times], PerSample]
"""Timesteps t and s of pairs to the weights of their distances."""


class Points(Protocol):
    """The timesteps that states can have, t, and what belongs to each."""

    @property
    def t(self) -> GridTimes: ...

    def at(self, index: Counts, iteration: int) -> Grid:
        """Timesteps of state, target and end at positions `index`, on its device."""


@dataclass(frozen=True)
class FixedPoints:
    """The points of a grid, the same in all iterations."""

    grid: Grid

    @property
    def t(self) -> GridTimes:
        return self.grid.t

    def at(self, index: Counts, iteration: int) -> Grid:
        return self.grid.to(index.device).at(index)


@dataclass(frozen=True)
class ShrinkingGap:
    """All timesteps; the target's noise level comes nearer in stages (Geng et al. 2024, arXiv 2406.14548).

    It starts at a diffusion model, for which every gap ends at clean data, and halves the gap's share of the noise again
    and again. Noise levels are those of Karras et al., sigma / alpha.

    levels: log sigma / alpha of every timestep.
    """

    levels: Levels
    gap: settings.Gap

    @property
    def t(self) -> GridTimes:
        return torch.arange(len(self.levels))

    def at(self, index: Counts, iteration: int) -> Grid:
        s = tuned_timestep(self.levels.to(index.device), index, iteration, self.gap)
        return Grid(index, s, torch.full_like(index, -1))


def tuned_level(sigma: PerSample, stage: int, gap: settings.Gap) -> PerSample:
    """The target's noise level r(sigma) (Geng et al. 2024, eq. 12 and 13): at least 0, where the target is the data.

    r = sigma (1 - q^-(stage + 1) n(sigma)),  n = 1 + k sigmoid(-b sigma)
    """
    bracket = 1 + gap.k * torch.sigmoid(-gap.b * sigma)
    return (sigma * (1 - bracket * gap.q ** -(stage + 1))).clamp_min(0)


def tuned_timestep(levels: Levels, t: Counts, iteration: int, gap: settings.Gap) -> Counts:
    """The timestep s of the target for the whole timestep t: nearest in log noise, below t; -1 is clean data.

    levels: those of `log_levels`. Late stages end at a gap of one timestep.
    """
    level = tuned_level(levels[t].exp(), iteration // gap.double_iterations, gap)
    # Nearer to clean data than to timestep 0 is what lies below half of its noise.
    cuts = torch.cat([levels[:1] - 0.6931, (levels[1:] + levels[:-1]) / 2])
    return torch.minimum(torch.bucketize(level.log(), cuts) - 1, t - 1)


def even_points(points: int, teacher: Teacher, key: str, skip: int = 1) -> FixedPoints:
    """Even timesteps from the noisiest down, with targets `skip` points on. ValueError where they do not divide T."""
    total = teacher.num_train_timesteps
    if total % points:
        raise FewstepError(
            f"method.{key}",
            points,
            f"a divisor of the teacher's {total} timesteps",
            "Otherwise its noisiest timestep would never be trained",
        )
    grid = even_grid(points, total)
    return FixedPoints(grid._replace(s=(grid.t - total // points * skip).clamp_min(0)))


def karras_points(grid: settings.KarrasGrid, teacher: Teacher, sampled: SamplerTimes) -> FixedPoints:
    """Karras levels, through the timesteps `sampled`. ValueError for teachers that end in pure noise."""
    try:
        return FixedPoints(karras_grid(teacher.schedule, grid.points, teacher.num_train_timesteps, sampled, grid.rho))
    except FewstepError as e:
        raise FewstepError("method.grid", e.found, e.expected, e.hint) from None


def uniform(schedule: Schedule, t: Times, s: Times) -> PerSample:
    return torch.ones(len(t), dtype=torch.float64, device=t.device)


def inverse_gap(schedule: Schedule, t: Times, s: Times) -> PerSample:
    return 1 / (noise_level(schedule, t) - noise_level(schedule, s))


def edm(schedule: Schedule, t: Times, s: Times) -> PerSample:
    """1 / c_out^2 of Karras et al. 2022."""
    sigma = noise_level(schedule, t)
    return (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2


WEIGHTS: dict[Literal["none", "inverse_gap", "edm"], Callable[[Schedule, Times, Times], PerSample]] = {
    "none": uniform,
    "inverse_gap": inverse_gap,
    "edm": edm,
}
"""Weight of each sample's distance: 1; 1 / (sigma_t - sigma_s); or (sigma^2 + sd^2) / (sigma sd)^2 of t."""
