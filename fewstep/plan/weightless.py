"""A teacher from configs alone: every network without values, as large and of the same modules as the real one."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from fewstep.errors import FewstepError, MissingError
from fewstep.plan.fake_tensors import without_values
from fewstep.teachers import Teacher, locate, quiet
from fewstep.teachers.load import check_family, left_out, teacher_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

TEXT_FILES = ("*.json", "*.txt", "*.model")
"""Files of a pipeline on the Hub that are read: configs and vocabularies."""


Within = Callable[[], AbstractContextManager[object]]
"""Makes the context in which networks are made: tensors without values, or a device."""


def weightless_teacher(name_or_path: str, within: Within = without_values) -> Teacher:
    """The teacher of a folder, hub id or embedded name, whose weights are not read and may be missing.

    within: `lambda: torch.device(...)` gives networks with random weights there instead.
    Raises MissingError where its configs are not on this machine, FewstepError where they are unusable.
    """
    folder = _folder(name_or_path)
    with quiet():
        pipeline = _pipeline(name_or_path, folder, within)
    teacher, index = teacher_of(pipeline), pipeline.config

    def reload(names: Sequence[str]) -> dict[str, nn.Module]:
        return {name: _network(folder / name, index[name], within) for name in names}

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
        raise MissingError(
            "teacher",
            f"no configs of {source}, neither on this machine nor on the Hub ({type(error).__name__})",
            "a folder with model_index.json, configs and tokenizers; weights are not needed",
        ) from None


def _pipeline(name: str, folder: Path, within: Within) -> "DiffusionPipeline":
    import diffusers

    try:
        index = diffusers.DiffusionPipeline.load_config(folder)
    except OSError as error:
        raise MissingError("teacher", f"{folder}, without a model_index.json", "a folder with one") from error
    kind = index["_class_name"]
    check_family(kind, name)
    given: dict[str, object] = {}
    for key, value in index.items():
        if isinstance(value, list | tuple):
            given[key] = _part(folder / key, value, within) if value[0] and key != "safety_checker" else None
        elif not key.startswith("_"):
            given[key] = value
    return getattr(diffusers, kind)(**given | left_out(kind))


def _part(folder: Path, library_and_name: Sequence[str], within: Within) -> object:
    """One component; only networks are without values: schedulers compute with theirs."""
    library, name = library_and_name
    try:
        kind = getattr(import_module(library), name)
        if not issubclass(kind, nn.Module):
            return kind.from_pretrained(folder)
        with within():
            if library == "diffusers":
                return kind.from_config(kind.load_config(folder))
            return kind(kind.config_class.from_pretrained(folder))
    except Exception as error:  # diffusers and transformers raise what they like for files that are missing or broken
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FewstepError(
            "teacher", f"{folder}, which cannot be read ({reason})", "a pipeline of diffusers"
        ) from error


def _network(folder: Path, library_and_name: Sequence[str], within: Within) -> nn.Module:
    network = _part(folder, library_and_name, within)
    assert isinstance(network, nn.Module)
    return network
