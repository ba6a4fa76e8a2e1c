"""States of trajectories that the teacher has drawn before training, each with the next one or with the sample it ends in.

Every state is used again and again, as the teacher is frozen; so its solver may be as exact as one likes, and an iteration
costs no evaluation of the teacher.
"""

from fewstep.diffusion.grids import Grid, milestone_timesteps
from fewstep.methods.consistency.config import StoredConfig
from fewstep.methods.consistency.states import State
from fewstep.methods.trajectories import Trajectories, TrajectorySettings
from fewstep.teachers.base import Teacher


def stored_settings(
    c: StoredConfig, grid: Grid, num_train_timesteps: int, scales: tuple[float, float]
) -> TrajectorySettings:
    """Trajectories through the points of an even grid. Raises ValueError where the sub-steps do not fit between them."""
    points = tuple(grid.t.flip(0).tolist())
    try:
        times = milestone_timesteps(points, c.substeps, num_train_timesteps)
    except ValueError as error:
        raise ValueError(f"method.stored.substeps: {error}") from None
    return TrajectorySettings(c.count, c.batch_size, times, points, c.solver, scales)


def remembered(stored: Trajectories, teacher: Teacher, fresh: State, to_end: bool) -> State:
    """States of trajectories drawn at random, at `fresh`'s positions, with their ends or, if not `to_end`, their next ones."""
    rows, cond = stored.pick(len(fresh.index), teacher)
    last, device = stored.x.shape[1] - 1, fresh.x.device
    place = last - 1 - fresh.index.cpu()  # kept from the noisiest down, the sample last
    x, x_s = stored.x[rows, place], stored.x[rows, last if to_end else place + 1]
    scale = None if fresh.scale is None else stored.scale[rows].to(device)
    return State(x.to(device), fresh.index, cond, scale, x_s.to(device))
