"""Settings of regression onto the ends of the teacher's trajectories; imports no torch."""

from typing import Annotated, Literal

from annotated_types import Ge, Lt
from pydantic import PositiveInt, model_validator

from fewstep.config import MethodConfig, OptimConfig
from fewstep.methods.consistency import settings as parts
from fewstep.methods.guidance_settings import GuidanceSettings


class TrajectorySettings(MethodConfig):
    name: Literal["trajectory"] = "trajectory"
    """Regression onto the ends of the teacher's trajectories."""
    optim: OptimConfig
    """Optimizer of the student."""
    steps: PositiveInt = 8
    """Largest number of network evaluations at inference; must divide `points`."""
    points: parts.GridSize = 8
    """Points of an even grid at which states are kept; must divide the teacher's training timesteps."""
    trajectories: parts.StoredTrajectories
    """The trajectories that the teacher draws before training."""
    guidance: GuidanceSettings | None = None
    """Guidance of the teacher's trajectories, one scale each; null = none."""
    endpoint: parts.Endpoint = parts.Boundary()
    """The function that is compared with the end."""
    distance: parts.Distance = parts.PseudoHuber()
    """Distance between student and end."""
    dropout: Annotated[float, Ge(0), Lt(1)] | None = None
    """Dropout of the student in training; null = as the teacher has it."""

    @model_validator(mode="after")
    def _fits(self) -> "TrajectorySettings":
        if self.points % self.steps:
            raise ValueError(f"steps: found {self.steps}; expected a divisor of points ({self.points})")
        scales = () if self.guidance is None else self.guidance.export_scales
        if len(scales) > 1 and len(scales) != self.steps:
            raise ValueError(
                f"guidance.export_scale: found {len(scales)} scales; expected one number or {self.steps}, one for each of steps"
            )
        return self
