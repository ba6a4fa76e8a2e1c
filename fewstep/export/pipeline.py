"""A student to a pipeline folder for plain diffusers, verified before it counts as written."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from fewstep.assets import ASSETS
from fewstep.errors import FewstepError
from fewstep.export import card as model_card
from fewstep.export.card import Call, Card
from fewstep.export.guidance_text import LIVE_GUIDANCE, pipeline_guidance
from fewstep.export.verify import (
    TOLERANCES,
    Sampled,
    compare,
    run_isolated,
    sample_in_memory,
    timesteps_of,
    tolerance_of,
)
from fewstep.io import atomic, torch_dtype
from fewstep.teachers import Denoiser, Teacher, quiet
from fewstep.teachers.students import UNGUIDED, StudentGuidance

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin


@dataclass(frozen=True)
class Opened:
    """A student in a stock pipeline of its own, on the CPU, with its samples in memory.

    Attributes:
        call: what the samples were called with.
        refuses: whether the scheduler can refuse a step count.
    """

    pipeline: "DiffusionPipeline"
    call: Call
    refuses: bool
    sampled: Sampled

    @property
    def timesteps_text(self) -> str:
        return model_card.timesteps_text(self.pipeline.scheduler, timesteps_of(self.sampled, self.call.steps))

    def check(self, reloaded: Sampled, tolerance: float) -> None:
        """Compare with a reloaded student. Raises ExportError where it differs."""
        compare(self.sampled, reloaded, self.call.steps, tolerance, self.refuses)


def open_student(
    teacher: Teacher,
    student: Denoiser,
    scheduler: "SchedulerMixin",
    *,
    allowed_steps: Sequence[int],
    guidance: StudentGuidance,
    dtype: torch.dtype,
    card: Card,
) -> Opened:
    """Build the student's pipeline in `dtype`, without the teacher's networks, and sample from it.

    Raises ExportError for a step count that does not run, or that runs and should not.
    """
    pipeline = teacher.students.stock_pipeline(student, scheduler, guidance)
    separate(pipeline, dtype)
    arguments = [card.get("prompt", "a photo")] if teacher.conditions == "prompt" else []
    scale = None if guidance.by_caller else teacher.guidance.scale_to_pass
    call = Call(allowed_steps, arguments, call_options(teacher, scale))
    refuses = "original_inference_steps" in scheduler.config
    return Opened(pipeline, call, refuses, sample_in_memory(pipeline, call, refuses))


def export(
    teacher: Teacher,
    student: Denoiser,
    scheduler: "SchedulerMixin",
    path: Path,
    *,
    allowed_steps: Sequence[int],
    guidance: StudentGuidance = UNGUIDED,
    dtype: str = "fp32",
    card: Card,
) -> Path:
    """Write the student as a stock pipeline with a model card (safetensors only), and return `path`.

    The folder is loaded in a fresh process without fewstep, called with every count of `allowed_steps` and compared with
    the student in memory, timesteps and pixels; only then does it replace what was at `path`.

    Args:
        guidance: what is folded into the student, and whether its caller guides it.
        card: see `fewstep.export.card.Card`; its `prompt` is the one of the example and of the comparison.

    Raises ExportError where the two differ, or where more steps than the largest count do not raise; `path` then stays
    as it was. Some schedulers run any count: then the card says so instead.
    """
    check_settings(dtype, allowed_steps)
    path = path.resolve()
    opened = open_student(
        teacher, student, scheduler, allowed_steps=allowed_steps, guidance=guidance, dtype=torch_dtype(dtype), card=card,
    )  # fmt: skip
    if "license" not in card and card.get("teacher") in ASSETS:
        card = {**card, "license": "apache-2.0"}
    with atomic(path) as partial:
        with quiet():
            opened.pipeline.save_pretrained(partial, safe_serialization=True)
        passes_scale = "guidance_scale" in (opened.call.options or {})
        kind = type(opened.pipeline).__name__
        words = LIVE_GUIDANCE if guidance.by_caller else pipeline_guidance(student, guidance.scale, kind, passes_scale)
        text = model_card.render(
            card, opened.call, guidance=words, dtype=dtype, timesteps=opened.timesteps_text, refuses=opened.refuses
        )
        (partial / "README.md").write_text(text, encoding="utf-8")
        opened.check(run_isolated(partial, opened.call), tolerance_of(student, teacher.num_train_timesteps - 1, dtype))
    return path


def check_settings(dtype: str, allowed_steps: Sequence[int]) -> None:
    """Check dtype and step counts. Raises FewstepError for those that no export has."""
    if dtype not in TOLERANCES:
        raise FewstepError("export_dtype", repr(dtype), f"one of {', '.join(TOLERANCES)}")
    if not allowed_steps or min(allowed_steps) < 1:
        raise FewstepError("allowed_steps", tuple(allowed_steps), "at least one count of 1 or more")


def separate(pipeline: "DiffusionPipeline", dtype: torch.dtype) -> None:
    """Replace the pipeline's networks by copies on the CPU in `dtype`: those it shares with the teacher must not change."""
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    pipeline.register_modules(**{name: _on_cpu(part, dtype) for name, part in modules.items()})


def _on_cpu(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    own = copy.deepcopy(module).to("cpu")
    return own if own.dtype == dtype else own.to(dtype)


def call_options(teacher: Teacher, guidance_scale: float | None) -> dict[str, object]:
    """The arguments by name of a pipeline's call: a label, which is not every class's first argument, and its guidance."""
    labels: dict[str, object] = {"class_labels": [0]} if teacher.conditions == "label" else {}
    return labels | ({} if guidance_scale is None else {"guidance_scale": guidance_scale})


def with_scale(call: Call, teacher: Teacher, guidance_scale: float | None) -> Call:
    """The same call with another guidance scale, None for none."""
    return replace(call, options=call_options(teacher, guidance_scale))
