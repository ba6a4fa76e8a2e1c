"""A teacher from configs alone: every network without values, as large and of the same modules as the real one."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from fewstep.plan.fake_tensors import without_values
from fewstep.teachers import FAMILIES, locate, quiet
from fewstep.teachers.base import Teacher

TEXT_FILES = ("*.json", "*.txt", "*.model")
"""What of a pipeline at a hub is read: configs and vocabularies."""


Within = Callable[[], AbstractContextManager[object]]
"""Makes the context in which networks are made: tensors without values, or a device."""


def unweighted_teacher(name_or_path: str, within: Within = without_values) -> Teacher:
    """The teacher of a folder, hub id or embedded name, whose weights are not read and may be missing.

    within: `lambda: torch.device(...)` gives networks with random weights there instead.
    Raises FileNotFoundError where its configs are not at hand, ValueError where they are of no use.
    """
    folder = _folder(name_or_path)
    with quiet():
        pipeline = _pipeline(name_or_path, folder, within)
    pipeline.set_progress_bar_config(disable=True)
    module, name = FAMILIES[type(pipeline).__name__]
    family: Any = getattr(import_module(f"fewstep.teachers.families.{module}"), name)
    teacher: Teacher = family(pipeline)
    index = pipeline.config

    def reload(names: Sequence[str]) -> dict[str, Any]:
        return {name: _part(folder / name, index[name], within) for name in names}

    # Parts that leave the device do not stay: here it would be the memory of the device.
    teacher.placement.reload = reload
    return teacher


def _folder(name_or_path: str) -> Path:
    source = locate(name_or_path)
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=list(TEXT_FILES)))
    # Offline, unknown, gated, misspelt: each has an exception of its own.
    except Exception as error:
        raise FileNotFoundError(
            f"teacher: the configs of {source} are neither on this machine nor to be had from the hub "
            f"({type(error).__name__}); a folder with its model_index.json, configs and tokenizers, without weights, is enough"
        ) from None


def _pipeline(name: str, folder: Path, within: Within) -> Any:
    import diffusers

    try:
        index = diffusers.DiffusionPipeline.load_config(folder)
    except OSError as error:
        raise FileNotFoundError(f"teacher: {folder} has no model_index.json") from error
    kind = index["_class_name"]
    if kind not in FAMILIES:
        raise ValueError(f"the teacher {name} is a {kind}; supported: {', '.join(FAMILIES)}")
    given: dict[str, Any] = {}
    for key, value in index.items():
        if isinstance(value, list | tuple):
            given[key] = _part(folder / key, value, within) if value[0] and key != "safety_checker" else None
        elif not key.startswith("_"):
            given[key] = value
    if kind == "StableDiffusionPipeline":
        given |= {"safety_checker": None, "requires_safety_checker": False}
    return getattr(diffusers, kind)(**given)


def _part(folder: Path, library_and_name: Sequence[str], within: Within) -> Any:
    """One component; only networks are without values: schedulers compute with theirs."""
    library, name = library_and_name
    try:
        kind = getattr(import_module(library), name)
        if not issubclass(kind, torch.nn.Module):
            return kind.from_pretrained(folder)
        with within():
            if library == "diffusers":
                return kind.from_config(kind.load_config(folder))
            return kind(kind.config_class.from_pretrained(folder))
    except Exception as error:  # diffusers and transformers raise what they like for files that are missing or broken
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"teacher: {folder} cannot be read: {reason}") from error
