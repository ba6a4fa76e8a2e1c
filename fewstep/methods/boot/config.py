"""Settings of BOOT; imports no torch."""

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from fewstep.config import MethodConfig, OptimConfig, Strict

Share = Annotated[float, Ge(0), Lt(1)]


class BootGuidanceConfig(Strict):
    """Guidance of the teacher, part of the student's weights or embedded in it."""

    scale: Annotated[float, Ge(1)] | tuple[float, float] = 1.0
    """Guidance scale, 1 = none; or a range, drawn uniformly and embedded in the student."""
    export_scale: float | None = None
    """With a range: the scale folded into the exported student; null leaves it to the caller's guidance_scale."""
    negative_prompt: str = ""
    """Prompt that guidance leads away from."""

    @property
    def range(self) -> tuple[float, float] | None:
        """The scales that are drawn from; None for no guidance."""
        return self.scale if isinstance(self.scale, tuple) else None if self.scale == 1 else (self.scale, self.scale)

    @property
    def embedded(self) -> bool:
        """Whether the student has a guidance embedding."""
        return isinstance(self.scale, tuple)

    @model_validator(mode="after")
    def _inside(self) -> "BootGuidanceConfig":
        span = self.scale if isinstance(self.scale, tuple) else None
        if span is not None and not 1 <= span[0] < span[1]:
            raise ValueError(f"scale: found {list(span)}; expected two ascending scales >= 1")
        if self.export_scale is not None and (span is None or not span[0] <= self.export_scale <= span[1]):
            raise ValueError(f"export_scale: found {self.export_scale} for scale {self.scale}; expected one in a range")
        if self.negative_prompt and self.scale == 1:
            raise ValueError(
                f"negative_prompt: found {self.negative_prompt!r} without guidance; expected a scale above 1"
            )
        return self


class StaticThresholdConfig(Strict):
    """The guided teacher's x0 is clamped to [-1, 1]; for pixels."""

    kind: Literal["static"]
    """Clamp."""


class DynamicThresholdConfig(Strict):
    """The guided teacher's x0 is scaled into [-1, 1] (Saharia et al. 2022); for pixels."""

    kind: Literal["dynamic"]
    """Scale by a quantile."""
    quantile: Annotated[float, Gt(0), Le(1)] = 0.995
    """Quantile of |x0| in a sample that is scaled to 1, where it is larger."""


class WarmStartConfig(Strict):
    """Starts from a pool of the teacher's states that are replaced by the student's."""

    iterations: PositiveInt
    """Iterations over which the share of pool starts falls from 1 to 0."""
    pool_size: PositiveInt = 1024
    """States of the pool, per process."""


class OnPolicyStartConfig(Strict):
    """Segments begin at states that the averaged student reaches."""

    kind: Literal["onpolicy"] = "onpolicy"
    """The student's states."""
    warm_start: WarmStartConfig | None = None
    """Starts from a pool at first; null = none."""


class TeacherStartConfig(Strict):
    """Segments begin at states that the teacher reaches."""

    kind: Literal["teacher"]
    """The teacher's states."""


class PoolStartConfig(Strict):
    """Segments begin at states of a pool of the teacher's, a few of which move on in each iteration."""

    kind: Literal["pool"]
    """A pool of the teacher's states."""
    size: PositiveInt = 1024
    """States of the pool, per process; each iteration moves batch_size / n_sub of them one segment on."""


class RenoiseStartConfig(Strict):
    """Segments begin at re-noised samples, and all end at clean data."""

    kind: Literal["renoise"]
    """Re-noised samples of the student."""


class AnchoredConfig(Strict):
    """The exact target of a step of the teacher's solver."""

    kind: Literal["anchored"] = "anchored"
    """The exact target."""
    loss_space: Literal["velocity", "state"] = "velocity"
    """Quantity that is compared: x0 over sigma at the segment's start, which is velocity; or the states that are reached."""
    weighting: Literal["none", "inv1", "inv2"] = "none"
    """Weight of a target: 1, or its part that is new, to the power -1 or -2 (2 is the paper's 1 / delta^2), with mean 1."""


class PaperConfig(Strict):
    """The paper's finite difference with its boundary loss; for one step, solver ddim and m_teacher 1."""

    kind: Literal["paper"]
    """The paper's form."""
    t_max: Annotated[float, Gt(0), Lt(1)] = 0.99
    """Noisiest time of the paper's range, as a share of the teacher's timesteps: lambda' is unbounded at pure noise."""
    t_min: Annotated[float, Ge(0), Lt(1)] = 0.01
    """Cleanest time of the paper's range; the student's answer there is the sample."""
    boundary_weight: NonNegativeFloat = 1.0
    """Weight beta of the boundary loss at t_max."""

    @model_validator(mode="after")
    def _ordered(self) -> "PaperConfig":
        if self.t_min >= self.t_max:
            raise ValueError(f"t_min: found {self.t_min}; expected less than t_max, which is {self.t_max}")
        return self


Threshold = Annotated[StaticThresholdConfig | DynamicThresholdConfig, Field(discriminator="kind")]
Start = Annotated[
    OnPolicyStartConfig | TeacherStartConfig | PoolStartConfig | RenoiseStartConfig, Field(discriminator="kind")
]
Form = Annotated[AnchoredConfig | PaperConfig, Field(discriminator="kind")]


class BootConfig(MethodConfig):
    name: Literal["boot"] = "boot"
    """The method."""
    optim: OptimConfig
    """Optimizer of the student."""
    steps: Annotated[int, Ge(1), Le(8)] = 1
    """Network evaluations at inference, and segments of the trajectory; 1 is BOOT, 2 to 8 are fewstep's extension."""
    n_sub: PositiveInt = Field(32, ge=2)
    """Sub-steps of each segment: the grid on which the teacher's ODE is solved."""
    m_teacher: PositiveInt = 1
    """Sub-steps of the teacher per target; must divide n_sub. More make the chain of targets shorter and costlier."""
    solver: Literal["ddim", "heun"] = "ddim"
    """Solver of the teacher's ODE: ddim is one evaluation a sub-step, heun two."""
    boundary_frac: Share = 0.1
    """Share of samples that are kept for the first target of a segment, which is the teacher's own output."""
    guidance: BootGuidanceConfig = BootGuidanceConfig()
    """Guidance of the teacher."""
    thresholding: Threshold | None = None
    """Bound on the guided teacher's x0: {kind: static} or {kind: dynamic, ...}; null = none."""
    start: Start = OnPolicyStartConfig()
    """Starts of the segments after the first: {kind: onpolicy | teacher | pool | renoise, ...}."""
    distance: Literal["l2", "pseudo_huber"] = "l2"
    """Distance between student and target."""
    huber_c: PositiveFloat = 1e-3
    """c of the pseudo-Huber distance."""
    form: Form = AnchoredConfig()
    """Target: {kind: anchored, ...}, or {kind: paper, ...}."""

    @property
    def negative_prompts(self) -> tuple[str, ...]:
        return (self.guidance.negative_prompt,)

    @property
    def renoises(self) -> bool:
        """Whether the student is sampled with fresh noise between its steps."""
        return self.start.kind == "renoise"

    @property
    def warm_start(self) -> int:
        """Iterations with starts from a pool; 0 = none."""
        on_policy = isinstance(self.start, OnPolicyStartConfig) and self.start.warm_start
        return on_policy.iterations if on_policy else 0

    @property
    def pool_size(self) -> int:
        """States of the pool, per process; unused without one."""
        if isinstance(self.start, OnPolicyStartConfig) and self.start.warm_start:
            return self.start.warm_start.pool_size
        return self.start.size if isinstance(self.start, PoolStartConfig) else 1

    @model_validator(mode="after")
    def _possible(self) -> "BootConfig":
        if self.n_sub % self.m_teacher:
            raise ValueError(f"m_teacher: found {self.m_teacher}; expected a divisor of n_sub, which is {self.n_sub}")
        if self.steps == 1 and (self.start.kind != "onpolicy" or self.warm_start):
            found = "warm_start" if self.warm_start else self.start.kind
            raise ValueError(
                f"start: found {found} with steps 1; expected steps of 2 or more, for one step starts from noise"
            )
        if self.form.kind == "paper" and (self.steps > 1 or self.solver != "ddim" or self.m_teacher > 1):
            raise ValueError(
                f"form: found paper with steps {self.steps}, solver {self.solver}, m_teacher {self.m_teacher}; expected steps 1, "
                "solver ddim and m_teacher 1"
            )
        return self
