"""What can be set for consistency distillation; read, and answered, before torch is loaded."""

from typing import Literal

from pydantic import Field, model_validator

from fewstep.config import OptimConfig, Strict


class ConsistencyConfig(Strict):
    optim: OptimConfig
    """Optimizer of the student."""
    solver_steps: int = Field(50, ge=2)
    """Points N of the teacher's ODE grid; must divide the teacher's training timesteps."""
    steps: int = Field(10, ge=1)
    """Largest number of network evaluations at inference; must divide solver_steps, so that every step count lies on the grid."""
    guidance_range: tuple[float, float] | None = (3.0, 15.0)
    """Guidance scales (1 = none), drawn uniformly for the teacher's step and embedded in the student; null = no guidance."""
    export_guidance_scale: float | None = None
    """Guidance scale folded into the exported student; null leaves it to the caller's guidance_scale."""
    target_decay: float | None = Field(0.95, ge=0, lt=1)
    """Decay per update of the moving average that gives the targets; null = the student itself, without gradient."""
    distance: Literal["l2", "pseudo_huber"] = "l2"
    """Distance between student and target."""
    huber_c: float = Field(1e-3, gt=0)
    """c of the pseudo-Huber distance."""
    timestep_scaling: float = Field(10.0, gt=0)
    """Factor on t in c_skip and c_out; also saved in the exported scheduler."""

    @model_validator(mode="after")
    def _possible(self) -> "ConsistencyConfig":
        if self.solver_steps % self.steps:
            raise ValueError(f"steps: {self.steps} does not divide solver_steps ({self.solver_steps})")
        scale, span = self.export_guidance_scale, self.guidance_range
        if span is not None and not 1 <= span[0] <= span[1]:
            raise ValueError(f"guidance_range: {list(span)} is not an interval of scales >= 1")
        if scale is not None and (span is None or not span[0] <= scale <= span[1]):
            raise ValueError(
                f"export_guidance_scale: {scale} lies outside guidance_range, where the student is not trained"
            )
        return self
