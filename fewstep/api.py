"""A run from Python: `fewstep.distill`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

from fewstep.assets import ASSETS
from fewstep.config import MethodConfig, RunConfig, merged, read
from fewstep.config.help import paths
from fewstep.config.load import Raw
from fewstep.config.problems import nearest
from fewstep.config.recipes import locate_recipe
from fewstep.errors import FewstepError, MissingError
from fewstep.methods.registry import check_run, name_in, settings_class

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from fewstep.data.memory import Items
    from fewstep.methods.base import Method
    from fewstep.training.callbacks import Callback
    from fewstep.training.run import Run

    Data: TypeAlias = str | Path | Mapping[str, object] | Sequence[str] | Items | None

SMALL: Raw = {"max_iterations": 1000, "batch_size": 64, "method": {"optim": {"lr": 5e-4, "warmup_iterations": 50}}}
"""Defaults for an embedded teacher: minutes on a CPU."""
LARGE: Raw = {"max_iterations": 10_000, "batch_size": 4, "method": {"optim": {"lr": 1e-5, "warmup_iterations": 500}}}
"""Defaults for any other teacher."""
IN_MEMORY = "memory"


def distill(
    teacher: "str | Path | DiffusionPipeline",
    method: "str | type[Method] | None" = None,
    data: "Data" = None,
    *,
    output_dir: str | Path,
    recipe: str | Path | None = None,
    callbacks: "Sequence[Callback]" = (),
    **settings: object,
) -> "Run":
    """Train, export and score a student of a pipeline.

    Args:
        teacher: name of an embedded pipeline, folder, hub id, or a pipeline object, which then belongs to the run.
        method: a registered name (see `fewstep.methods.registry`), a class of your own or its place as
            `path/to/file.py:Class`; None = the recipe's, otherwise lcm.
        data: folder of images, parquet file or folder of them, text file of prompts, list of prompts, `datasets.Dataset`
            or any sized collection of {"image", "text"} or {"image", "label"}; or a mapping as the config's section
            `data`, whose `source` may be such a collection. None = the recipe's, otherwise `fashion` for that teacher and
            nothing for others.
        output_dir: folder of the run.
        recipe: recipe or YAML file whose settings are the base; None = small defaults.
        callbacks: called at lines of the log, at checkpoints and at the end.
        settings: any setting by its name: a key of a run, whose sections are mappings of what differs
            (`train={"ema_decay": 0.99}`), otherwise a key of the method (`steps=4`).

    Raises:
        FewstepError: for whatever is wrong in the arguments, all of it before a weight is loaded where it can be.
    """
    base = _base(teacher, recipe)
    name = _name(method, base, recipe is not None)
    changes, items = _data(data, base, teacher)
    keys = {"teacher": _teacher_name(teacher), "output_dir": str(output_dir)}
    values = merged(merged(base, {"method": {"name": name}} | keys | changes), _placed(settings, settings_class(name)))
    config = check_run(values, "distill")
    _check_memory(config, teacher)
    return _run(config, teacher, items, callbacks)


def _run(
    config: RunConfig[MethodConfig],
    pipeline: "str | Path | DiffusionPipeline",
    items: "Sequence[str] | Items | None",
    callbacks: "Sequence[Callback]",
) -> "Run":
    """Load what is not loaded, and run."""
    from fewstep.data.sources import memory_source
    from fewstep.teachers import load_teacher
    from fewstep.training.run import check, run

    checked = check(config)
    teacher = load_teacher(config.teacher if isinstance(pipeline, str | Path) else pipeline)
    source = None if items is None else memory_source(items, config.data, teacher.image_size)
    return run(config, checked.method, teacher=teacher, source=source, callbacks=callbacks)


def _base(teacher: object, recipe: str | Path | None) -> Raw:
    if recipe is not None:
        return read(locate_recipe(str(recipe)))
    return dict(SMALL if teacher in ASSETS else LARGE)


def _name(method: "str | type[Method] | None", base: Raw, recipe: bool) -> str:
    if method is None:
        return (name_in(base, "recipe") if recipe else None) or "lcm"
    if isinstance(method, str):
        return method
    import sys

    module = sys.modules[method.__module__]
    file = getattr(module, "__file__", None)
    if method.__module__ == "__main__" and file is None:
        raise FewstepError("method", f"{method.__name__}, defined in an interactive session", "a class in a file")
    place = str(file) if method.__module__ == "__main__" else method.__module__
    return f"{place}:{method.__name__}"


def _teacher_name(teacher: "str | Path | DiffusionPipeline") -> str:
    """The name of a teacher in config.yaml: of a pipeline object, the folder or hub id it was loaded from."""
    if isinstance(teacher, str | Path):
        return str(teacher)
    return str(teacher.config.get("_name_or_path") or IN_MEMORY)


def _data(data: "Data", base: Raw, teacher: object) -> "tuple[Raw, Sequence[str] | Items | None]":
    """The section `data`, and the samples that the caller holds."""
    if data is None:
        return ({} if "data" in base else {"data": {"source": "fashion" if teacher == "fashion" else "none"}}), None
    if isinstance(data, Mapping):
        items = data.get("source")
        if items is None or isinstance(items, str):
            return {"data": dict(data)}, None
        return {"data": dict(data) | {"source": IN_MEMORY}}, cast("Items", items)
    if isinstance(data, str | Path):
        return {"data": {"source": _kind(data)} | ({} if data == "fashion" else {"path": str(data)})}, None
    return {"data": {"source": IN_MEMORY}}, data


def _kind(data: str | Path) -> str:
    """The `data.source` of a path."""
    path = Path(data).expanduser()
    if data == "fashion":
        return "fashion"
    if path.is_dir():
        return "parquet" if any(path.glob("*.parquet")) else "folder"
    hub = not path.exists() and not path.suffix and str(data)[0] not in "./~" and str(data).count("/") == 1
    if path.suffix == ".parquet" or hub:
        return "parquet"  # also owner/name of a data set in the hub's cache
    if not path.is_file():
        raise MissingError("data", f"{str(data)!r}, which does not exist", "a folder, a file, or samples in memory")
    return "prompts"


def _placed(settings: Mapping[str, object], method: type[MethodConfig]) -> Raw:
    """Settings by keyword, each in its place: of the run where it has such a key, otherwise of the method."""
    run, own = RunConfig.model_fields, method.model_fields
    placed, inner = Raw(), Raw()
    for key, value in settings.items():
        if key in run:
            placed[key] = value
        elif key in own:
            inner[key] = value
        else:
            raise FewstepError(key, "an unknown setting", f"a setting of a run or a method{_hint(key, [*run, *own])}")
    return placed | {"method": inner}


def _hint(key: str, known: list[str]) -> str:
    inside = [path for path in paths(RunConfig) if "." in path and path.split(".")[-1] == key]
    if inside:
        section, _, last = inside[0].partition(".")
        return f"; did you mean {section}={{'{last}': ...}}?"
    return nearest(key, known)


def _check_memory(config: RunConfig[MethodConfig], teacher: object) -> None:
    if config.train.lora is not None and config.teacher == IN_MEMORY:
        raise FewstepError(
            "train.student.kind", "lora, of a pipeline that was loaded from nowhere", "full, or a pipeline from a folder",
            "The exported adapters name the pipeline that they belong to",
        )  # fmt: skip
