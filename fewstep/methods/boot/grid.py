"""BOOT's grid: the sub-times of every segment, and what the loss looks up for each target on it."""

import torch
from torch import Tensor

from fewstep.diffusion.grids import segment_grid
from fewstep.diffusion.schedule import Schedule
from fewstep.diffusion.signal_ode import shares
from fewstep.methods.boot.config import BootConfig


def sub_times(config: BootConfig, jumps: Tensor, num_train_timesteps: int) -> Tensor:
    """Timesteps of every segment, descending: [steps, n_sub + 1]; whole numbers where `jumps` are.

    jumps: where the sampler's steps begin, and where the last one ends, [steps + 1]. Raises ValueError, naming the key,
    where the sub-steps do not fit between them.
    """
    last = num_train_timesteps - 1
    ends = torch.full_like(jumps[1:], -1) if config.start == "renoise" else jumps[1:]
    pairs = list(zip(jumps[:-1].tolist(), ends.tolist(), strict=True))
    if config.form == "paper":
        if config.paper.t_max * last > last - 1:
            raise ValueError(f"method.paper.t_max: {config.paper.t_max} leaves no timestep above it for lambda'")
        pairs = [(config.paper.t_max * last, config.paper.t_min * last)]
    whole = not jumps.is_floating_point()
    try:
        grid = torch.stack([segment_grid(a, b, config.n_sub, whole) for a, b in pairs])
    except ValueError as error:
        raise ValueError(f"method.n_sub: {error}") from None
    return grid if whole else grid.float()


def target_tables(config: BootConfig, schedule: Schedule, grid: Tensor) -> tuple[Tensor, Tensor]:
    """For every target its weight, of mean 1, and the factor from x0 to the space of the loss.

    Each [steps, n_sub / m_teacher]. With the state z at the segment's start fixed, a difference of x0 is one of velocity
    times sigma there, and one of the states reached by the factor of `ode_step`.
    """
    chain = grid[:, :: config.m_teacher]
    a, t, s = (v.reshape(-1) for v in torch.broadcast_tensors(chain[:, :1], chain[:, :-1], chain[:, 1:]))
    power = {"none": 0, "inv1": -1, "inv2": -2}[config.weighting]
    weights = (1 - shares(schedule, a, t, s)[0]) ** power
    (alpha_a, sigma_a), (alpha_s, sigma_s) = schedule(a), schedule(s)
    factors = 1 / sigma_a if config.loss_space == "velocity" else alpha_s - alpha_a * sigma_s / sigma_a
    return tuple(v.float().view(len(grid), -1) for v in (weights / weights.mean(), factors))  # type: ignore[return-value]
