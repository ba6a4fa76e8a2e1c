"""What a run would else stumble over only after the training, or after the images are encoded: checked before."""

import difflib
import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fewstep.config import ReferenceConfig, RunConfig
from fewstep.training import checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from fewstep.methods.base import Method


def check_surroundings(config: RunConfig[Any]) -> None:
    """Raises ValueError or FileNotFoundError, naming the key, before any weight is loaded."""
    _check_folder(config.output_dir)
    checkpoints = config.output_dir / "checkpoints"
    if config.checkpoint.resume:
        checkpoint.find(checkpoints, config.checkpoint.resume)
    elif earlier := checkpoint.checkpoints(checkpoints):
        # Mixed with these, the new run's checkpoints would count as the oldest and be the first to be deleted.
        raise ValueError(
            f"output_dir: {config.output_dir} holds a run that reached iteration {earlier[-1].name}: go on with "
            "checkpoint.resume=latest, or take another folder"
        )
    if config.train.init_from is not None and not config.train.init_from.is_dir():
        raise FileNotFoundError(
            f"train.init_from: {config.train.init_from} is not a folder: run first what writes it, or start from the teacher "
            "with train.init_from=null"
        )
    if config.log.tracker:
        _check_tracker(config.log.tracker)
    if config.score.every:
        _check_reference("score", config.score)
    if config.evaluate:
        _check_reference("evaluate", config.evaluate)


def check_steps(config: RunConfig[Any], method: "Method") -> None:
    """Raises ValueError where a score is asked for at a step count that the student is not trained for."""
    allowed = method.allowed_steps()
    scored = (config.score.steps,) if config.score.every else ()
    evaluated = config.evaluate.steps if config.evaluate else ()
    for key, steps in (("score.steps", scored), ("evaluate.steps", evaluated)):
        if wrong := [n for n in steps if n not in allowed]:
            raise ValueError(
                f"{key}: found {', '.join(map(str, wrong))}; this student is trained for {', '.join(map(str, allowed))}"
            )


def check_conditions(config: RunConfig[Any], pipeline: Any) -> None:
    """Raises ValueError where a score has no prompts for a pipeline that wants them, or labels of no known number."""
    from fewstep.evaluate.generate import condition_kind, num_labels
    from fewstep.evaluate.references import protocol_of, resolve, subjects

    for key, asked in (("score", config.score if config.score.every else None), ("evaluate", config.evaluate)):
        if asked is None:
            continue
        sources = resolve(asked.reference, asked.features, asked.clip, asked.prompts)
        try:
            subjects(protocol_of(sources, num_images=2, seed=0), condition_kind(pipeline), num_labels(pipeline))
        except ValueError as e:
            raise ValueError(f"{key}.prompts: {e}") from None


def check_guidance(config: RunConfig[Any], method: "Method") -> None:
    """Raises ValueError for a teacher that would be drawn for pictures or scores under guidance that its pipeline does not have,
    and for adapters that would need a scale for each step."""
    from fewstep.evaluate.generate import check_guidance_scale
    from fewstep.training.validation import teacher_guidance_scale

    if config.evaluate or config.log.samples_every:
        try:
            check_guidance_scale(method.teacher.pipeline, teacher_guidance_scale(config))
        except ValueError as e:
            raise ValueError(f"evaluate.teacher_{e}; set evaluate.teacher_guidance_scale to 1") from None
    if isinstance(method.export_guidance_scale, Mapping) and config.train.lora is not None:
        raise ValueError(
            "method.export_guidance_scale: a file of adapters has no place for scales that differ between steps; give one number"
        )


def _check_folder(folder: "Path") -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise ValueError(f"output_dir: cannot write into {folder}: {e.strerror}") from None


def _check_tracker(name: str) -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if name not in LOGGER_TYPE_TO_CLASS:
        close = difflib.get_close_matches(name, LOGGER_TYPE_TO_CLASS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}"
        raise ValueError(f"log.tracker: accelerate knows no {name!r}; {hint}")
    # accelerate itself goes on without a word.
    if name not in [str(tracker) for tracker in get_available_trackers()]:
        raise ValueError(f"log.tracker: {name} is not installed: pip install {name.replace('_', '-')}")


def _check_reference(key: str, asked: ReferenceConfig) -> None:
    from fewstep.evaluate.references import resolve

    try:
        resolve(asked.reference, asked.features, asked.clip, asked.prompts)
    except ValueError as e:
        raise ValueError(f"{key}.reference: {e}") from None
