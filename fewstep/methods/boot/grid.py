"""BOOT's grid: the sub-times of every segment, and tables of weights and factors for each target."""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from fewstep.diffusion.grids import segment_grid
from fewstep.diffusion.schedule import Schedule
from fewstep.diffusion.shapes import SamplerTimes
from fewstep.diffusion.signal_ode import shares
from fewstep.errors import FewstepError
from fewstep.methods.boot.config import AnchoredConfig, BootConfig, PaperConfig

SegmentTimes = Shaped[Tensor, "segments points"]
"""n_sub + 1 timesteps of each segment."""
Table = Float[Tensor, "segments targets"]
"""A number for each of the n_sub / m_teacher targets of each segment."""


def sub_times(config: BootConfig, jumps: SamplerTimes, num_train_timesteps: int) -> SegmentTimes:
    """Timesteps of every segment, descending; whole numbers where `jumps` are.

    jumps: where the sampler's steps begin, and where the last one ends. Raises ValueError, naming the key,
    where the sub-steps do not fit between them.
    """
    last = num_train_timesteps - 1
    ends = torch.full_like(jumps[1:], -1) if config.renoises else jumps[1:]
    pairs = list(zip(jumps[:-1].tolist(), ends.tolist(), strict=True))
    if isinstance(config.form, PaperConfig):
        t_max, t_min = config.form.t_max, config.form.t_min
        if t_max * last > last - 1:
            raise FewstepError("method.form.t_max", t_max, "a timestep above it for lambda'", "Set a lower one")
        pairs = [(t_max * last, t_min * last)]
    whole = not jumps.is_floating_point()
    try:
        grid = torch.stack([segment_grid(a, b, config.n_sub, whole) for a, b in pairs])
    except FewstepError as e:
        raise FewstepError("method.n_sub", e.found, e.expected) from None
    return grid if whole else grid.float()


def target_tables(config: BootConfig, schedule: Schedule, grid: SegmentTimes) -> tuple[Table, Table]:
    """For every target its weight, of mean 1, and the factor from x0 to the space of the loss.

    With the state z at the segment's start fixed, a difference of x0 is one of velocity
    times sigma there, and one of the states reached by the factor of `ode_step`.
    """
    chain = grid[:, :: config.m_teacher]
    a, t, s = (v.reshape(-1) for v in torch.broadcast_tensors(chain[:, :1], chain[:, :-1], chain[:, 1:]))
    form = config.form if isinstance(config.form, AnchoredConfig) else AnchoredConfig()
    power = {"none": 0, "inv1": -1, "inv2": -2}[form.weighting]
    weights = (1 - shares(schedule, a, t, s)[0]) ** power
    (alpha_a, sigma_a), (alpha_s, sigma_s) = schedule(a), schedule(s)
    factors = 1 / sigma_a if form.loss_space == "velocity" else alpha_s - alpha_a * sigma_s / sigma_a
    mean_one = weights / weights.mean()
    return mean_one.float().view(len(grid), -1), factors.float().view(len(grid), -1)
