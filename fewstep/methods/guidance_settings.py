"""Settings of guidance that is distilled into a student, for every method; imports no torch."""

from typing import Annotated

from annotated_types import MinLen
from pydantic import model_validator

from fewstep.config import Strict


class GuidanceSettings(Strict):
    """Guidance of the teacher, and how the student has it."""

    range: tuple[float, float]
    """Guidance scales (1 = none) of the teacher, drawn uniformly."""
    embed: bool = True
    """Whether the student receives the guidance scale as an input; if not, it learns the mean over `range`."""
    export_scale: float | Annotated[tuple[float, ...], MinLen(2)] | None = None
    """Scale folded into the exported student, or one for each of the sampler's `steps` timesteps, from the noisiest; null
    leaves it to the caller's guidance_scale. Without `embed`: null."""

    @property
    def export_scales(self) -> tuple[float, ...]:
        """The scales that are folded in: none, one, or one a step."""
        if isinstance(self.export_scale, tuple):
            return self.export_scale
        return () if self.export_scale is None else (self.export_scale,)

    @model_validator(mode="after")
    def _inside(self) -> "GuidanceSettings":
        low, high = self.range
        if not 1 <= low <= high:
            raise ValueError(f"range: found {list(self.range)}; expected two ascending scales >= 1")
        if self.export_scales and not self.embed:
            raise ValueError(
                "export_scale: found a scale with embed false; expected null, for the student receives none. Leave it out"
            )
        for scale in self.export_scales:
            if not low <= scale <= high:
                raise ValueError(
                    f"export_scale: found {scale}; expected a scale in the trained range {list(self.range)}"
                )
        return self


class SingleGuidanceSettings(GuidanceSettings):
    """Guidance whose exported scale is the same in all steps."""

    export_scale: float | None = None
    """Scale folded into the exported student; null leaves it to the caller's guidance_scale. Without `embed`: null."""
