"""Paragraphs of the cards on guidance: whether it is part of the weights, and what a caller may pass."""

from collections.abc import Mapping

from fewstep.teachers.denoiser import Denoiser, Scale

LIVE_GUIDANCE = (
    "Guidance: none is part of the weights. `guidance_scale` and `negative_prompt` do what they do in the teacher's pipeline, "
    "with two evaluations of the network a step; `guidance_scale=1.0` is none."
)


def pipeline_guidance(student: Denoiser, guidance_scale: Scale | None, kind: str, passes_scale: bool) -> str:
    """The paragraph of a pipeline's card. kind: its class. passes_scale: whether the call has to pass guidance_scale=1."""
    if passes_scale:
        scale = "the scale that its teacher was given" if guidance_scale is None else scale_text(guidance_scale)
        return (
            f"Guidance: {scale} is part of the weights. Pass `guidance_scale=1.0`, as above: without it a {kind} "
            "guides by default, which takes twice the time and spoils the images, and no file in this folder can tell it "
            "not to. A `negative_prompt` then has no effect."
        )
    config: Mapping[str, object] = student.net.config  # type: ignore[assignment]  # of diffusers' ConfigMixin
    if config.get("time_cond_proj_dim") is None:
        return (
            "Guidance: the student needs none, for the scale that its teacher was given is part of the weights; a "
            "`guidance_scale` or `negative_prompt` given to the call has no effect."
        )
    if guidance_scale is None:
        return (
            "Guidance: the network embeds `guidance_scale` (1 = none, as everywhere in diffusers) and needs no second "
            "evaluation for it; give one from the range it was trained on. A `negative_prompt` has no effect."
        )
    return (
        f"Guidance: {scale_text(guidance_scale)} (1 = none) is part of the weights; a `guidance_scale` or "
        "`negative_prompt` given to the call has no effect."
    )


def scale_text(guidance_scale: Scale) -> str:
    """A folded guidance scale in words: the subject of a sentence in the singular."""
    if not isinstance(guidance_scale, Mapping):
        return f"a scale of {guidance_scale:g}"
    return "a scale of " + ", ".join(f"{scale:g} at timestep {t}" for t, scale in guidance_scale.items())


def adapter_guidance(guidance_scale: Scale | None) -> str:
    """The paragraph of the card of adapters."""
    scale = "" if guidance_scale is None else f" {scale_text(guidance_scale).capitalize()} is part of the adapters."
    return f"Guidance: the student needs none.{scale}"
