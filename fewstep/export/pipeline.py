"""A student to a pipeline folder that plain diffusers opens, reloaded and compared before it counts as written."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from fewstep.assets import ASSETS
from fewstep.export import card as model_card
from fewstep.export.card import update_card
from fewstep.export.verify import ExportError, ask_stranger
from fewstep.io import atomic, torch_dtype
from fewstep.teachers import Denoiser, Teacher, quiet
from fewstep.teachers.denoiser import Scale

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

__all__ = ["ExportError", "export", "update_card"]

TOLERANCES = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 4e-2}
"""Largest difference between reloaded and in-memory pixels in [0, 1]: rounding of the dtype, no more."""

LIVE_GUIDANCE = (
    "Guidance: none is part of the weights. `guidance_scale` and `negative_prompt` do what they do in the teacher's pipeline, "
    "with two evaluations of the network a step; `guidance_scale=1.0` is none."
)

_TOO_MANY = (
    "num_inference_steps={} does not raise, though at most {} steps were trained: the scheduler's grid and "
    "allowed_steps do not belong together"
)


def export(
    teacher: Teacher,
    student: Denoiser,
    scheduler: "SchedulerMixin",
    path: Path,
    *,
    allowed_steps: Sequence[int],
    guidance_scale: Scale | None = None,
    keeps_guidance: bool = False,
    dtype: str = "fp32",
    card: dict[str, Any],
) -> Path:
    """Write the student as a stock pipeline with a model card (safetensors only), and return `path`.

    The folder is written aside, loaded in a fresh process without fewstep, called with every count of `allowed_steps`
    and compared with the student in memory, timesteps and pixels; only then does it replace what was at `path`.

    guidance_scale: folded into a student with a guidance embedding, one number or one for each timestep; None leaves the
        embedding to the caller.
    keeps_guidance: whether the caller guides the student as its teacher.
    card: see `fewstep.card.render`; its `prompt` is the one of the example and of the comparison.
    Raises ExportError where the two differ, or where more steps than the largest count do not raise; `path` then stays
    as it was. Some schedulers run any count (`refuses`): then the card says so instead.
    """
    if dtype not in TOLERANCES:
        raise ValueError(f"export_dtype is {dtype!r}; allowed: {', '.join(TOLERANCES)}")
    if not allowed_steps or min(allowed_steps) < 1:
        raise ValueError(f"allowed_steps are {tuple(allowed_steps)}; at least one count of 1 or more is needed")
    path = path.resolve()
    if keeps_guidance:
        pipeline = teacher.students.guided_pipeline(student, scheduler)
    else:
        pipeline = teacher.students.pipeline(student, scheduler, guidance_scale)
    own_copies(pipeline, torch_dtype(dtype))
    if "license" not in card and card.get("teacher") in ASSETS:
        card = card | {"license": "apache-2.0"}
    arguments = arguments_of(teacher, card)
    options = options_of(teacher, None if keeps_guidance else teacher.guidance.scale_to_pass)
    drawn = draw(pipeline, allowed_steps, arguments, options, refuses(scheduler))
    with atomic(path) as partial:
        with quiet():
            pipeline.save_pretrained(partial, safe_serialization=True)
        kind = type(pipeline).__name__
        guidance = LIVE_GUIDANCE if keeps_guidance else _guidance_text(student, guidance_scale, kind, options)
        text = model_card.render(
            card,
            allowed_steps=allowed_steps,
            refuses=refuses(scheduler),
            guidance=guidance,
            arguments=arguments,
            options=options,
            dtype=dtype,
            timesteps=model_card.timesteps_text(scheduler, timesteps_of(drawn, allowed_steps)),
        )
        (partial / "README.md").write_text(text)
        tolerance = tolerance_of(student, teacher.num_train_timesteps - 1, dtype)
        found = ask_stranger(partial, allowed_steps, arguments, options)
        compare(drawn, found, allowed_steps, tolerance, refuses(scheduler))
    return path


def refuses(scheduler: Any) -> bool:
    """Whether a scheduler can refuse a step count, as those with a grid of their own do."""
    return "original_inference_steps" in scheduler.config


def own_copies(pipeline: "DiffusionPipeline", dtype: torch.dtype) -> None:
    """Copies of the pipeline's networks on the CPU in `dtype`: those it shares with the teacher must not change."""
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    pipeline.register_modules(**{name: _on_cpu(part, dtype) for name, part in modules.items()})


def _on_cpu(module: Any, dtype: torch.dtype) -> nn.Module:
    own = copy.deepcopy(module).to("cpu")
    return own if own.dtype == dtype else own.to(dtype)


def arguments_of(teacher: Teacher, card: dict[str, Any]) -> list[Any]:
    return [card.get("prompt", "a photo")] if teacher.conditions == "prompt" else []


def options_of(teacher: Teacher, guidance_scale: float | None) -> dict[str, Any]:
    """What a pipeline's call is given by name: a label, which is not every class's first argument, and what guidance it needs."""
    labels = {"class_labels": [0]} if teacher.conditions == "label" else {}
    return labels | ({} if guidance_scale is None else {"guidance_scale": guidance_scale})


def _guidance_text(student: Denoiser, guidance_scale: Scale | None, kind: str, options: dict[str, Any]) -> str:
    net: Any = student.net
    if "guidance_scale" in options:
        scale = "the scale that its teacher was given" if guidance_scale is None else scale_text(guidance_scale)
        return (
            f"Guidance: {scale} is part of the weights. Pass `guidance_scale=1.0`, as above: without it a {kind} "
            "guides by default, which takes twice the time and spoils the images, and no file in this folder can tell it "
            "not to. A `negative_prompt` then has no effect."
        )
    if net.config.get("time_cond_proj_dim") is None:
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


def draw(
    pipeline: "DiffusionPipeline", steps: Sequence[int], arguments: list[Any], options: dict[str, Any], refusing: bool
) -> dict[str, np.ndarray]:
    """Timesteps and pixels [1, H, W, C] of the student in memory, under the names that the stranger gives to its own.

    Raises ExportError for a count that does not run, and where one more than the largest does though it should not.
    """
    drawn = {}
    for count in steps:
        generator = torch.Generator().manual_seed(count)
        try:
            with torch.random.fork_rng():
                torch.manual_seed(count)
                images = pipeline(
                    *arguments, num_inference_steps=count, generator=generator, output_type="np", **options
                ).images
        except ValueError as error:
            raise ExportError(f"num_inference_steps={count} does not run: {error}") from error
        drawn[f"timesteps_{count}"] = np.asarray(pipeline.scheduler.timesteps.tolist(), dtype=np.float64)
        drawn[f"images_{count}"] = np.asarray(images, dtype=np.float32)
    if not refusing:
        return drawn
    try:
        pipeline(*arguments, num_inference_steps=max(steps) + 1, **options)
    except ValueError:
        return drawn
    raise ExportError(_TOO_MANY.format(max(steps) + 1, max(steps)))


def timesteps_of(drawn: Mapping[str, np.ndarray], steps: Sequence[int]) -> dict[int, list[float]]:
    """The timesteps that `draw` saw the stock scheduler run, by step count."""
    return {count: drawn[f"timesteps_{count}"].tolist() for count in steps}


def compare(
    drawn: dict[str, np.ndarray],
    found: dict[str, np.ndarray],
    steps: Sequence[int],
    tolerance: float,
    refusing: bool,
) -> None:
    for count in steps:
        timesteps, reloaded = drawn[f"timesteps_{count}"].tolist(), found[f"timesteps_{count}"].tolist()
        if timesteps != reloaded:
            raise ExportError(
                f"num_inference_steps={count} runs timesteps {reloaded} in plain diffusers, {timesteps} in memory"
            )
        difference = float(np.abs(drawn[f"images_{count}"] - found[f"images_{count}"]).max())
        # Not `>`: a NaN must fail too.
        if not difference <= tolerance:
            raise ExportError(
                f"num_inference_steps={count} draws other pixels in plain diffusers than in memory: largest difference "
                f"{difference:.2g}, allowed {tolerance:.2g}"
            )
    if refusing and not found["too_many_raised"]:
        raise ExportError(_TOO_MANY.format(max(steps) + 1, max(steps)))


def tolerance_of(student: Denoiser, last_timestep: int, dtype: str) -> float:
    """The dtype's; for epsilon, times a tenth of sigma / alpha at pure noise, by which x0 enlarges rounding of eps."""
    if student.prediction_type != "epsilon":
        return TOLERANCES[dtype]
    alpha, sigma = student.schedule(torch.tensor([last_timestep]))
    return TOLERANCES[dtype] * max(1.0, 0.1 * float(sigma / alpha))
