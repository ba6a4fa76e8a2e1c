"""Where the consistency loss looks: points of the solver's grid, the next cleaner one, and the end that both map to."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.diffusion.schedule import Schedule, noise_level
from fewstep.diffusion.signal_ode import segment_grid

SIGMA_DATA = 0.5


class Grid(NamedTuple):
    """Timesteps [N] each, ascending in t: of the state, of the teacher's step from it, and of the end of its phase.

    -1 stands for clean data, as everywhere.
    """

    t: Tensor
    s: Tensor
    end: Tensor

    def to(self, device: torch.device) -> "Grid":
        return Grid(*(v.to(device) for v in self))

    def at(self, index: Tensor) -> "Grid":
        """Those at the positions `index` [B]."""
        return Grid(*(v[index] for v in self))


def boundary_scalings(t: Tensor, timestep_scaling: float) -> tuple[Tensor, Tensor]:
    """c_skip and c_out at t [B] (Luo et al. 2023, appendix): 1 and 0 at t = 0, so that the student is the identity there.

    c_out multiplies a prediction of x0 and so has no factor sigma_data, unlike Song et al.'s eq. 5.
    """
    q = timestep_scaling * t.double()
    c_skip = SIGMA_DATA**2 / (q**2 + SIGMA_DATA**2)
    c_out = q / (q**2 + SIGMA_DATA**2).sqrt()
    return c_skip, c_out


def solver_grid(solver_steps: int, num_train_timesteps: int) -> tuple[Tensor, Tensor]:
    """Timesteps of the teacher's grid [N], ascending, and for each the next cleaner one (t = 0 below the first)."""
    k = num_train_timesteps // solver_steps
    t = torch.arange(1, solver_steps + 1) * k - 1
    return t, (t - k).clamp_min(0)


def whole_grid(solver_steps: int, num_train_timesteps: int) -> Grid:
    """The grid of one phase down to t = 0: LCM's."""
    t, s = solver_grid(solver_steps, num_train_timesteps)
    return Grid(t, s, torch.zeros_like(t))


def karras_levels(low: float, high: float, n: int, rho: float = 7.0) -> Tensor:
    """n noise levels from `high` down to `low`, even in their rho-th root (Karras et al. 2022, eq. 5), in float64."""
    roots = torch.linspace(high ** (1 / rho), low ** (1 / rho), n, dtype=torch.float64)
    return roots**rho


def karras_grid(schedule: Schedule, solver_steps: int, num_train_timesteps: int, met: Tensor, rho: float = 7.0) -> Grid:
    """The grid of Consistency Models (Song et al. 2023): sigma / alpha at solver_steps Karras levels between timestep 0,
    where both sides of the lowest pair end, and the noisiest.

    A discrete network is valid at whole timesteps: each level becomes the nearest in log sigma / alpha, and levels that fall
    on one timestep are one. The points next to `met`, timesteps at which the sampler runs, are moved there.

    Raises ValueError for schedules that end in pure noise, whose sigma / alpha is infinite.
    """
    every = torch.arange(num_train_timesteps)
    if float(schedule(every[-1:])[0]) < 1e-4:
        raise ValueError("karras levels need an end to sigma / alpha, and the teacher's schedule ends in pure noise")
    levels = noise_level(schedule, every).log()
    wanted = karras_levels(float(levels[0].exp()), float(levels[-1].exp()), solver_steps, rho).log()
    times = torch.unique((levels[:, None] - wanted).abs().argmin(0))
    for u in met.tolist():
        if not bool((times == u).any()):
            inner = times[1:-1]
            inner[(levels[inner] - levels[u]).abs().argmin()] = u
    times = torch.unique(times)
    return Grid(times[1:], times[:-1], torch.zeros_like(times[1:]))


def phase_grid(jumps: Tensor, solver_steps: int) -> Grid:
    """The grid whose phases are the sampler's jumps, each in as many even steps; whole numbers where `jumps` are.

    So that whatever the stock scheduler makes of a step count, the student is trained for it. Where the phases divide
    solver_steps and these the training timesteps, it is PCM's (Wang et al. 2024): edges every solver_steps / phases.

    jumps: timesteps at which the sampler's steps begin, and where the last one ends, [phases + 1], descending.
    """
    phases = len(jumps) - 1
    n, whole = solver_steps // phases, not jumps.is_floating_point()
    # The steps are even down to clean data, also where the sampler's last one stops short of it, at timestep 0.
    cuts = [*jumps[:-1].tolist(), -1]
    parts = [segment_grid(a, b, n, whole) for a, b in pairwise(cuts)]
    t, s = torch.cat([part[:-1] for part in parts]), torch.cat([part[1:] for part in parts])
    s[-1] = jumps[-1]
    grid = Grid(t, s, jumps[1:].repeat_interleave(n).to(t.dtype))
    return Grid(*(v.flip(0) if whole else v.flip(0).float() for v in grid))
