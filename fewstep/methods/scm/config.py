"""Settings of continuous-time consistency models."""

from typing import Annotated, Literal

from annotated_types import Ge, Gt
from pydantic import NonNegativeInt, PositiveFloat, model_validator

from fewstep.config import MethodConfig, OptimConfig
from fewstep.methods.guidance_settings import SingleGuidanceSettings


class ScmConfig(MethodConfig):
    name: Literal["scm"] = "scm"
    """The method."""
    optim: OptimConfig
    """Optimizer of the student, and of the weight of noise levels."""
    steps: Annotated[int, Ge(1)] = 2
    """Largest number of network evaluations at inference."""
    velocity: Literal["teacher", "data"] = "teacher"
    """Direction in which a state moves: the teacher's (distillation, sCD), or that of its own image and noise (training, sCT)."""
    lognormal: tuple[float, Annotated[float, Gt(0)]] = (-1.0, 1.4)
    """Mean and deviation of the log of the noise level sigma / alpha (P_mean, P_std)."""
    warmup_iterations: NonNegativeInt = 10000
    """Iterations over which the part of the tangent with the network's derivative rises to its weight; 0 = at once."""
    tangent: Literal["normalise", "clip"] = "normalise"
    """Against large tangents g: g / (|g| + tangent_c) for each sample, or its elements cut to [-1, 1]."""
    tangent_c: PositiveFloat = 0.1
    """c of the normalisation."""
    adaptive_weight: bool = True
    """Whether a learnt function of the noise level weights the loss, beside 1 / tan tau."""
    guidance: SingleGuidanceSettings | None = None
    """Guidance of the teacher; null = none."""

    @property
    def embedded(self) -> bool:
        """Whether the student has a guidance embedding."""
        return self.guidance is not None and self.guidance.embed

    @model_validator(mode="after")
    def _possible(self) -> "ScmConfig":
        if self.guidance is not None and self.velocity == "data":
            raise ValueError(
                "guidance: found a range with velocity data; expected null, for there is no teacher to guide"
            )
        return self
