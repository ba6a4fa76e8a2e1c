"""Base of the methods with phases: points that end where the sampler's steps do, and sampling by jumps or re-noising."""

from typing import TYPE_CHECKING

from fewstep.diffusion.grids import phase_grid
from fewstep.errors import FewstepError
from fewstep.methods.consistency.loss import Consistency
from fewstep.methods.consistency.method_settings import MlcmSettings, PcmSettings
from fewstep.methods.consistency.points import FixedPoints

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


class Phased(Consistency):
    """Consistency within phases, each from one of the sampler's timesteps to the next."""

    config: PcmSettings | MlcmSettings
    last_phases: int
    """Phases of the last stage."""

    @property
    def jumps(self) -> bool:
        """Whether the student is sampled by the ODE's jumps; otherwise by re-noising."""
        return self.config.sampling == "jump"

    def points(self, phases: int, points: int) -> FixedPoints:
        """Even points within the sampler's phases. Raises ValueError where they do not fit between its timesteps."""
        samplers = self.teacher.samplers
        try:
            return FixedPoints(phase_grid(samplers.grid(samplers.jump(phases), phases), points))
        except FewstepError as e:
            raise FewstepError("method.points", e.found, e.expected) from None

    def scheduler(self) -> "SchedulerMixin":
        return self.teacher.samplers.jump(self.config.steps) if self.jumps else super().scheduler()

    def allowed_steps(self) -> tuple[int, ...]:
        """With re-noising every grid timestep is valid; with deterministic steps only the phase boundaries are."""
        return tuple(range(self.last_phases, self.config.steps + 1)) if self.jumps else super().allowed_steps()
