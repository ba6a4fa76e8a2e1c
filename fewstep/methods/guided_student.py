"""A student with distilled guidance: whether its teacher allows it, its network, and the scale that export folds in."""

from collections.abc import Callable

from fewstep.diffusion.shapes import GridTimes
from fewstep.errors import FewstepError
from fewstep.methods.base import require_guidable
from fewstep.methods.dropout import set_dropout
from fewstep.methods.guidance_settings import GuidanceSettings
from fewstep.teachers.base import Teacher
from fewstep.teachers.denoiser import Denoiser, Scale


def embeds(guidance: GuidanceSettings | None) -> bool:
    """Whether the student receives the guidance scale."""
    return guidance is not None and guidance.embed


def drawn_range(guidance: GuidanceSettings | None) -> tuple[float, float] | None:
    """The range of scales that the teacher is guided by; None = no guidance."""
    return None if guidance is None else guidance.range


def check_guidance(teacher: Teacher, guidance: GuidanceSettings | None) -> None:
    """ValueError, with what to set, where the teacher cannot be guided or its stock pipeline has no way to pass a scale."""
    if guidance is None:
        return
    require_guidable(teacher, "guidance", "null")
    if guidance.embed and not guidance.export_scales and not teacher.guidance.live:
        raise FewstepError(
            "method.guidance.export_scale",
            "null",
            "a scale, for the stock pipeline of this teacher's family passes none to its network",
            "Set the one that becomes part of the student's weights",
        )
    if len(guidance.export_scales) > 1 and not teacher.guidance.live:
        raise FewstepError(
            "method.guidance.export_scale",
            "a scale for each step",
            "one number for this teacher",
            "Only the UNets of Stable Diffusion and SDXL embed the scale by timestep",
        )


def folded_scale(guidance: GuidanceSettings | None, times: Callable[[], GridTimes]) -> Scale | None:
    """The guidance scale that export folds in; times: of the sampler's steps [steps], where each has its own."""
    scales = () if guidance is None else guidance.export_scales
    if len(scales) <= 1:
        return scales[0] if scales else None
    return dict(zip(times().tolist(), scales, strict=True))


def guided_student(teacher: Teacher, guidance: GuidanceSettings | None, dropout: float | None) -> Denoiser:
    """A new student, with a guidance embedding where it receives the scale."""
    student = teacher.students.new(guidance_embedding=embeds(guidance))
    if dropout is not None:
        set_dropout(student, dropout)
    return student
