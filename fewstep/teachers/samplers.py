"""Stock schedulers for a teacher's students, and the timesteps that they run."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fewstep.diffusion.schedule import ShiftedFlow
from fewstep.diffusion.shapes import GridTimes
from fewstep.errors import FewstepError
from fewstep.teachers.schedulers import jump_grid, renoise_scheduler

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


class Samplers(ABC):
    """The stock schedulers with which a family's pipelines run few steps."""

    @abstractmethod
    def renoise(self, steps: int, timestep_scaling: float = 10.0, spacing: int | None = None) -> "SchedulerMixin":
        """The stock scheduler that predicts x0 and re-noises it, on an even grid of `steps` timesteps.

        spacing: distance of the timesteps, also of the last one from clean data; None spreads them over all of the
            teacher's, which steps has to divide.

        Asked for one of `counts`, it runs so many of those timesteps; asked for more, it raises if it can.
        """

    @abstractmethod
    def counts(self, steps: int) -> tuple[int, ...]:
        """The counts 1 ... steps for which the pipeline with `renoise(steps)` runs timesteps of that grid only."""

    @abstractmethod
    def jump(self, steps: int) -> "SchedulerMixin":
        """The stock scheduler that takes `steps` deterministic steps of the ODE (DDIM, Euler), each to the next timestep."""

    @abstractmethod
    def grid(self, scheduler: "SchedulerMixin", steps: int) -> GridTimes:
        """The timesteps at which `scheduler`, of either kind, evaluates the network in `steps` steps, and where its last
        step ends: [steps + 1], whole numbers unless the pipeline's are not.

        -1 is clean data, as everywhere.
        """


class DiscreteSamplers(Samplers):
    """LCMScheduler and DDIM's steps on the schedule of a discrete variance-preserving scheduler.

    scheduler: the teacher's. deterministic: makes the scheduler of `jump` from it and the count of steps.
    """

    def __init__(
        self, scheduler: "SchedulerMixin", deterministic: "Callable[[SchedulerMixin, int], SchedulerMixin]"
    ) -> None:
        self.scheduler, self.deterministic = scheduler, deterministic

    def renoise(self, steps: int, timestep_scaling: float = 10.0, spacing: int | None = None) -> "SchedulerMixin":
        return renoise_scheduler(self.scheduler, steps, timestep_scaling, spacing)

    def counts(self, steps: int) -> tuple[int, ...]:
        return tuple(range(1, steps + 1))

    def jump(self, steps: int) -> "SchedulerMixin":
        return self.deterministic(self.scheduler, steps)

    def grid(self, scheduler: "SchedulerMixin", steps: int) -> GridTimes:
        return jump_grid(scheduler, steps)


class FlowSamplers(Samplers):
    """FlowMatchEulerDiscreteScheduler on the even grid before the shift of a rectified flow."""

    def __init__(self, schedule: ShiftedFlow) -> None:
        self.schedule = schedule

    @abstractmethod
    def scheduler(self, steps: int, stochastic: bool) -> "SchedulerMixin":
        """The scheduler with which the pipeline, called with `steps`, runs the even grid of so many timesteps."""

    @abstractmethod
    def set_timesteps(self, scheduler: "SchedulerMixin", steps: int) -> None:
        """Set the scheduler's timesteps as the pipeline's call does."""

    def renoise(self, steps: int, timestep_scaling: float = 10.0, spacing: int | None = None) -> "SchedulerMixin":
        """FlowMatchEulerDiscreteScheduler with stochastic_sampling, which re-noises x0.

        It has no c_skip and c_out (Luo et al. 2023), which must be 0 and 1 at its timesteps up to 1e-4; and it starts at pure
        noise. Raises ValueError where that does not hold. It runs any count: it cannot refuse one.
        """
        total = self.schedule.num_train_timesteps
        if spacing is not None and spacing != total // steps:
            raise FewstepError(
                "steps",
                f"a grid from timestep {steps * spacing - 1}",
                f"one from {total - 1}, for a flow starts at pure noise",
            )
        if timestep_scaling * (total / steps - 1) < 50:
            raise FewstepError(
                "timestep_scaling",
                f"{timestep_scaling} with {steps} steps",
                "a larger one, for the stock scheduler has no c_skip",
            )
        return self.scheduler(steps, stochastic=True)

    def jump(self, steps: int) -> "SchedulerMixin":
        """FlowMatchEulerDiscreteScheduler. It runs any count: it cannot refuse one."""
        return self.scheduler(steps, stochastic=False)

    def grid(self, scheduler: "SchedulerMixin", steps: int) -> GridTimes:
        self.set_timesteps(scheduler, steps)
        sigmas: Tensor = scheduler.sigmas[:-1]
        found = self.schedule.timestep(sigmas.double())
        even = self.schedule.num_train_timesteps * torch.arange(steps, 0, -1).double() / steps - 1
        if not torch.allclose(found, even, atol=1e-2):
            raise FewstepError("scheduler", f"timesteps {found.tolist()}", f"{steps} even ones")
        grid = torch.cat([even, even.new_tensor([-1])])
        return grid.long() if bool((grid == grid.round()).all()) else grid.float()
