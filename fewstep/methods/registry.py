"""The list of methods: a name, its settings and its class, each loaded only when asked for; imports no torch."""

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, cast

from fewstep.config import MethodConfig, RunConfig, check, read
from fewstep.config.help import describe
from fewstep.config.problems import nearest
from fewstep.config.recipes import locate_recipe
from fewstep.errors import FewstepError, MissingError

if TYPE_CHECKING:
    from fewstep.methods.base import Method


@dataclass(frozen=True)
class Entry:
    """A method of the package.

    Attributes:
        settings: class of its settings, as `module:Class`.
        method: the method's own class, likewise.
        script: name of the file in `train/` that trains it.
        title: the method in a few words.
    """

    settings: str
    method: str
    script: str
    title: str


def _consistency(name: str, title: str) -> Entry:
    package = "fewstep.methods.consistency"
    settings = f"{package}.method_settings:{name.capitalize()}Settings"
    return Entry(settings, f"{package}.{name}:{name.upper()}", "consistency", title)


METHODS: Mapping[str, Entry] = {
    "cd": _consistency("cd", "consistency distillation"),
    "lcm": _consistency("lcm", "latent consistency"),
    "ect": _consistency("ect", "easy consistency tuning"),
    "pcm": _consistency("pcm", "phased consistency"),
    "mlcm": _consistency("mlcm", "multistep latent consistency"),
    "trajectory": Entry(
        "fewstep.methods.trajectory.settings:TrajectorySettings",
        "fewstep.methods.trajectory.method:Trajectory",
        "consistency",
        "regression onto the ends of stored trajectories",
    ),
    "scm": Entry(
        "fewstep.methods.scm.config:ScmConfig", "fewstep.methods.scm.method:Scm", "scm", "continuous-time consistency"
    ),
    "dmd2": Entry(
        "fewstep.methods.distribution_matching.config:DMD2Config",
        "fewstep.methods.distribution_matching.dmd2:DMD2",
        "dmd2",
        "distribution matching with a GAN",
    ),
    "boot": Entry(
        "fewstep.methods.boot.config:BootConfig",
        "fewstep.methods.boot.method:Boot",
        "boot",
        "bootstrapping without data",
    ),
}
OWN = "path/to/file.py:Class or package.module:Class"
"""The form of the name of a method that is not in the list."""


def settings_class(name: str) -> type[MethodConfig]:
    """The settings of a method by its name.

    A class of one's own names them by its attribute `settings`. Raises FewstepError for an unknown name.
    """
    if ":" not in name:
        return _settings(_load(_entry(name).settings), name)
    return _settings(vars(own := _load(name)).get("settings") or getattr(own, "settings", None), name)


def method_class(name: str) -> "type[Method]":
    """The class of a method by its name; loads torch. Raises FewstepError for an unknown name."""
    from fewstep.methods.base import Method

    found = _load(name if ":" in name else _entry(name).method)
    if not issubclass(found, Method):
        raise FewstepError("method.name", f"{name!r}, which is no method", "a subclass of fewstep.methods.base.Method")
    return found


def load_run(file: str | Path, overrides: Sequence[str] = (), script: str | None = None) -> RunConfig[MethodConfig]:
    """The settings of a run from a recipe's name or a file, under overrides `key.path=value`.

    With `script`, the name of a file in `train/`, methods that it does not train are refused. Raises FewstepError.
    """
    path = locate_recipe(str(file))
    return check_run(read(path, overrides), str(path), script)


def check_run(raw: Mapping[str, object], where: str, script: str | None = None) -> RunConfig[MethodConfig]:
    """The settings of a run from a mapping; `where` is what an error names as its origin."""
    name = name_in(raw, where)
    if name is None:  # what is wrong besides, all at once
        return check(RunConfig[MethodConfig], raw, where)
    settings = settings_class(name)
    if script is not None and ":" not in name and METHODS[name].script != script:
        raise FewstepError(
            f"{where}: method.name",
            name,
            f"one of {', '.join(names(script))}",
            f"Train it with train/{METHODS[name].script}.py",
        )
    return check(cast("type[RunConfig[MethodConfig]]", RunConfig.__class_getitem__(settings)), raw, where)


def names(script: str | None = None) -> list[str]:
    """The registered names, of one script in `train/` only where it is given."""
    return [name for name, entry in METHODS.items() if script in (None, entry.script)]


def name_in(raw: Mapping[str, object], where: str) -> str | None:
    """The method's name in a config; None for one without a method. Raises FewstepError for a method without a name."""
    method = raw.get("method")
    if not isinstance(method, Mapping):
        return None
    name = method.get("name")
    if isinstance(name, str):
        return name
    found = "nothing" if name is None else describe(name)
    raise FewstepError(f"{where}: method.name", found, f"one of {', '.join(METHODS)}, or {OWN}")


def _entry(name: str) -> Entry:
    if name not in METHODS:
        near = nearest(name, list(METHODS))
        raise FewstepError("method.name", repr(name), f"one of {', '.join(METHODS)}, or {OWN}{near}")
    return METHODS[name]


def _settings(found: object, name: str) -> type[MethodConfig]:
    if not (isinstance(found, type) and issubclass(found, MethodConfig)):
        raise FewstepError(
            "method.name", f"{name!r} with settings {found!r}", "a subclass of fewstep.config.MethodConfig",
            "Name it by the class attribute `settings` of the method",
        )  # fmt: skip
    return found


def _load(place: str) -> type:
    module, _, attribute = place.rpartition(":")
    try:
        loaded = _file(Path(module)) if module.endswith(".py") else import_module(module)
    except ModuleNotFoundError as e:
        if e.name is None or not module.startswith(e.name):
            raise
        raise MissingError("method.name", f"{place!r}, and no module {e.name!r}", OWN) from None
    found = vars(loaded).get(attribute)
    if not isinstance(found, type):
        classes = [name for name, value in vars(loaded).items() if isinstance(value, type)]
        raise FewstepError("method.name", repr(place), f"a class in {module}{nearest(attribute, classes)}")
    return found


def _file(path: Path) -> "object":
    """The module in a file, loaded once."""
    path = path.expanduser().resolve()
    if not path.is_file():
        raise MissingError("method.name", f"{path}, which does not exist", OWN)
    name = f"fewstep_method_{path.stem}_{abs(hash(path)):x}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # before it runs, as dataclasses look themselves up there
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
