"""Settings of BOOT."""

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from fewstep.config import MethodConfig, OptimConfig, Strict

Share = Annotated[float, Ge(0), Lt(1)]


class PaperConfig(Strict):
    t_max: Annotated[float, Gt(0), Lt(1)] = 0.99
    """Noisiest time of the paper's range, as a share of the teacher's timesteps: lambda' is unbounded at pure noise."""
    t_min: Annotated[float, Ge(0), Lt(1)] = 0.01
    """Cleanest time of the paper's range; the student's answer there is the sample."""
    boundary_weight: NonNegativeFloat = 1.0
    """Weight beta of the boundary loss at t_max."""

    @model_validator(mode="after")
    def _ordered(self) -> "PaperConfig":
        if self.t_min >= self.t_max:
            raise ValueError(f"t_min: {self.t_min} is not below t_max ({self.t_max})")
        return self


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
    """Sub-steps of the teacher per target; must divide n_sub. More make the chain of targets shorter and dearer."""
    solver: Literal["ddim", "heun"] = "ddim"
    """Solver of the teacher's ODE: ddim is one evaluation a sub-step, heun two."""
    boundary_frac: Share = 0.1
    """Share of samples that are kept for the first target of a segment, which is the teacher's own output."""
    guidance_scale: Annotated[float, Ge(1)] | tuple[float, float] = 1.0
    """Guidance of the teacher (1 = none), part of the weights; or a range, drawn uniformly and embedded in the student."""
    export_guidance_scale: float | None = None
    """With a range: the scale folded into the exported student; null leaves it to the caller's guidance_scale."""
    negative_prompt: str = ""
    """What guidance leads away from."""
    thresholding: Literal["none", "static", "dynamic"] = "none"
    """Bound on the guided teacher's x0, for pixels: clamped to [-1, 1], or scaled into it by a quantile (Saharia et al. 2022)."""
    threshold_quantile: Annotated[float, Gt(0), Le(1)] = 0.995
    """Quantile of |x0| in a sample that dynamic thresholding brings to 1, where it is larger."""
    start: Literal["onpolicy", "teacher", "pool", "renoise"] = "onpolicy"
    """Where segments begin: at states of the averaged student, the teacher, a pool of the teacher's, or at noised samples."""
    pool_size: PositiveInt = 1024
    """States of the pool, per process; each iteration moves batch_size / n_sub of them one segment on."""
    warm_start: NonNegativeInt = 0
    """Iterations over which the share of pool starts falls from 1 to 0 before `start` rules alone; 0 = none."""
    distance: Literal["l2", "pseudo_huber"] = "l2"
    """Distance between student and target."""
    huber_c: PositiveFloat = 1e-3
    """c of the pseudo-Huber distance."""
    loss_space: Literal["velocity", "state"] = "velocity"
    """What is compared: x0 over sigma at the segment's start, which is velocity; or the states that the jumps reach."""
    weighting: Literal["none", "inv1", "inv2"] = "none"
    """Weight of a target: 1, or its part that is new, to the power -1 or -2 (2 is the paper's 1 / delta^2), with mean 1."""
    form: Literal["anchored", "paper"] = "anchored"
    """Target: the exact one of a DDIM step, or the paper's finite difference with its boundary loss (one step only)."""
    paper: PaperConfig = PaperConfig()
    """Settings of the paper's form."""

    @property
    def negative_prompts(self) -> tuple[str, ...]:
        return (self.negative_prompt,)

    @property
    def guidance_range(self) -> tuple[float, float] | None:
        """The range where guidance is embedded."""
        return self.guidance_scale if isinstance(self.guidance_scale, tuple) else None

    @model_validator(mode="after")
    def _possible(self) -> "BootConfig":
        span, scale = self.guidance_range, self.export_guidance_scale
        if self.n_sub % self.m_teacher:
            raise ValueError(f"m_teacher: {self.m_teacher} does not divide n_sub ({self.n_sub})")
        if span is not None and not 1 <= span[0] < span[1]:
            raise ValueError(f"guidance_scale: {list(span)} is not an interval of scales >= 1")
        if scale is not None and (span is None or not span[0] <= scale <= span[1]):
            raise ValueError(f"export_guidance_scale: {scale} needs a range guidance_scale that holds it")
        if self.negative_prompt and self.guidance_scale == 1:
            raise ValueError("negative_prompt: has no effect at guidance_scale 1")
        if self.start != "onpolicy" and self.steps == 1:
            raise ValueError(f"start: {self.start!r} needs steps of 2 or more; one step starts from noise")
        if self.warm_start and (self.steps == 1 or self.start != "onpolicy"):
            raise ValueError("warm_start: is for steps of 2 or more with start onpolicy")
        if self.form == "paper" and (self.steps > 1 or self.solver != "ddim" or self.m_teacher > 1):
            raise ValueError("form: 'paper' is for steps 1, solver ddim and m_teacher 1")
        if self.form == "paper" and self.weighting != "none":
            raise ValueError("form: 'paper' has its own 1 / delta^2; set weighting to none")
        if self.form == "paper" and self.loss_space != "velocity":
            raise ValueError(f"loss_space: {self.loss_space!r} is for form anchored; the paper's compares x0")
        return self
