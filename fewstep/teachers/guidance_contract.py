"""Guidance of a family: whether it can be guided, and how its students' stock pipelines are called."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GuidanceContract:
    """Handling of a guidance scale (1 = none) by the stock pipelines of a family.

    Attributes:
        guidable: whether the network has an unconditional answer, away from which to guide.
        live: whether a student's pipeline passes its caller's guidance scale on to a network that embeds it. If not, the
            scale has to be folded into the weights at export.
        scale_to_pass: the `guidance_scale` that a caller of a student's pipeline has to pass, where its class guides by
            default and nothing in the folder can stop it; None where nothing has to be passed.
        scale_to_pass_with_adapters: the same for the teacher's own pipeline with a student's adapters and scheduler in it.
    """

    guidable: bool = True
    live: bool = False
    scale_to_pass: float | None = None
    scale_to_pass_with_adapters: float | None = None


GUIDED_BY_DEFAULT = GuidanceContract(scale_to_pass=1.0, scale_to_pass_with_adapters=1.0)
"""Pipelines that guide unless their caller passes 1, with students as with the teacher."""
