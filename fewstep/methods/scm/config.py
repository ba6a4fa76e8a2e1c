"""Settings of continuous-time consistency models."""

from typing import Annotated, Literal

from annotated_types import Ge, Gt
from pydantic import NonNegativeInt, PositiveFloat, model_validator

from fewstep.config import MethodConfig, OptimConfig


class ScmConfig(MethodConfig):
    name: Literal["scm"] = "scm"
    """The method."""
    optim: OptimConfig
    """Optimizer of the student, and of the weight of noise levels."""
    steps: Annotated[int, Ge(1)] = 2
    """Largest number of network evaluations at inference."""
    velocity: Literal["teacher", "data"] = "teacher"
    """Where a state moves: as the teacher says (distillation, sCD), or between its own image and noise (training, sCT)."""
    lognormal: tuple[float, Annotated[float, Gt(0)]] = (-1.0, 1.4)
    """Mean and deviation of the log of the noise level sigma / alpha (P_mean, P_std)."""
    warmup_iterations: NonNegativeInt = 10000
    """Iterations over which the part of the tangent that has the network's derivative comes in; 0 = at once."""
    tangent: Literal["normalise", "clip"] = "normalise"
    """Against large tangents g: g / (|g| + tangent_c) for each sample, or its elements cut to [-1, 1]."""
    tangent_c: PositiveFloat = 0.1
    """c of the normalisation."""
    adaptive_weight: bool = True
    """Whether a learnt function of the noise level evens the loss out beside 1 / tan tau."""
    guidance_range: tuple[float, float] | None = None
    """Guidance scales (1 = none) of the teacher, drawn uniformly and embedded in the student; null = no guidance."""
    embed_guidance: bool = True
    """Whether the student is told the guidance scale; if not, it learns the mean over guidance_range."""
    export_guidance_scale: float | None = None
    """Guidance scale folded into the exported student; null leaves it to the caller's guidance_scale."""

    @property
    def embedded(self) -> bool:
        """Whether the student has a guidance embedding."""
        return self.guidance_range is not None and self.embed_guidance

    @model_validator(mode="after")
    def _possible(self) -> "ScmConfig":
        scale, span = self.export_guidance_scale, self.guidance_range
        if span is not None and not 1 <= span[0] <= span[1]:
            raise ValueError(f"guidance_range: {list(span)} is not an interval of scales >= 1")
        if span is not None and self.velocity == "data":
            raise ValueError("guidance_range: velocity data has no teacher to guide; set it to null")
        if scale is not None and (span is None or not self.embed_guidance or not span[0] <= scale <= span[1]):
            raise ValueError(f"export_guidance_scale: {scale} needs an embedded guidance_range that holds it")
        return self
