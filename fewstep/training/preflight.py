"""Checks of a run that would otherwise fail only after training, or after images are encoded."""

import difflib
import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fewstep.config import MethodConfig, ReferenceConfig, RunConfig
from fewstep.errors import FewstepError, MissingError
from fewstep.training import checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import DiffusionPipeline

    from fewstep.methods.base import Method


def check_config(config: RunConfig[MethodConfig]) -> None:
    """Check what can be checked before any weight is loaded. Raises FewstepError, naming the key."""
    _check_folder(config.output_dir)
    checkpoints = config.output_dir / "checkpoints"
    if config.checkpoint.resume:
        checkpoint.find(checkpoints, config.checkpoint.resume)
    elif earlier := checkpoint.checkpoints(checkpoints):
        # Mixed with these, the new run's checkpoints would count as the oldest and be the first to be deleted.
        raise FewstepError(
            "output_dir", f"{config.output_dir}, with a run that reached iteration {earlier[-1].name}",
            "a folder without checkpoints", "Go on with checkpoint.resume=latest, or take another folder",
        )  # fmt: skip
    if config.train.init_from is not None and not config.train.init_from.is_dir():
        raise MissingError(
            "train.init_from", f"{config.train.init_from}, which is not a folder", "a checkpoint or a pipeline",
            "Run first what writes it, or start from the teacher with train.init_from=null",
        )  # fmt: skip
    if config.log.tracker:
        _check_tracker(config.log.tracker)
    if config.score.every:
        _check_reference("score", config.score)
    if config.evaluate:
        _check_reference("evaluate", config.evaluate)


def check_built(config: RunConfig[MethodConfig], method: "Method") -> None:
    """Check the settings against the teacher and the method. Raises FewstepError, naming the key."""
    _check_steps(config, method)
    _check_guidance(config, method)
    _check_conditions(config, method.teacher.pipeline)


def _check_steps(config: RunConfig[MethodConfig], method: "Method") -> None:
    """Raises FewstepError where a score is asked for at a step count that the student is not trained for."""
    allowed = method.allowed_steps()
    scored = (config.score.steps,) if config.score.every else ()
    evaluated = config.evaluate.steps if config.evaluate else ()
    for key, steps in (("score.steps", scored), ("evaluate.steps", evaluated)):
        if wrong := [n for n in steps if n not in allowed]:
            raise FewstepError(
                key, ", ".join(map(str, wrong)), f"some of {', '.join(map(str, allowed))}, which are trained"
            )


def _check_conditions(config: RunConfig[MethodConfig], pipeline: "DiffusionPipeline") -> None:
    """Raises ValueError where a score has no prompts for a pipeline that wants them, or labels of no known number."""
    from fewstep.evaluate.conditions import load_conditions
    from fewstep.evaluate.generate import condition_kind, num_labels
    from fewstep.evaluate.references import protocol_of, resolve

    for key, asked in (("score", config.score if config.score.every else None), ("evaluate", config.evaluate)):
        if asked is None:
            continue
        sources = resolve(asked.reference, asked.features, asked.clip, asked.prompts)
        try:
            load_conditions(protocol_of(sources, num_images=2, seed=0), condition_kind(pipeline), num_labels(pipeline))
        except FewstepError as e:
            raise e.under(key) from None


def _check_guidance(config: RunConfig[MethodConfig], method: "Method") -> None:
    """Raises ValueError for a teacher that would be drawn for pictures or scores under guidance that its pipeline does not have,
    and for adapters that would need a scale for each step."""
    from fewstep.evaluate.generate import check_guidance_scale
    from fewstep.training.validation import teacher_guidance_scale

    if config.evaluate or config.log.samples_every:
        try:
            check_guidance_scale(method.teacher.pipeline, teacher_guidance_scale(config))
        except FewstepError as e:
            key = "evaluate.teacher_guidance_scale"
            raise FewstepError(key, e.found, e.expected, f"Set {key} to 1") from None
    if isinstance(method.student_guidance.scale, Mapping) and config.train.lora is not None:
        raise FewstepError(
            "method.guidance.export_scale",
            "a scale for each step",
            "one number",
            "A file of adapters has no place for more",
        )


def _check_folder(folder: "Path") -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise FewstepError("output_dir", f"{folder}, and {e.strerror}", "a folder that can be written to") from None


def _check_tracker(name: str) -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if name not in LOGGER_TYPE_TO_CLASS:
        close = difflib.get_close_matches(name, LOGGER_TYPE_TO_CLASS, n=1)
        known = f"{close[0]!r}, perhaps" if close else f"one of {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}"
        raise FewstepError("log.tracker", f"{name!r}, unknown to accelerate", known)
    # accelerate itself ignores it.
    if name not in [str(tracker) for tracker in get_available_trackers()]:
        install = f"pip install {name.replace('_', '-')}"
        raise FewstepError("log.tracker", f"{name}, which is not installed", "an installed tracker", install)


def _check_reference(key: str, asked: ReferenceConfig) -> None:
    from fewstep.evaluate.references import resolve

    try:
        resolve(asked.reference, asked.features, asked.clip, asked.prompts)
    except FewstepError as e:
        raise e.under(key) from None
