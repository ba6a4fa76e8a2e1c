"""Settings from a YAML file and dotted overrides, checked before anything heavy is loaded."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from fewstep.config import yaml12
from fewstep.config.help import describe
from fewstep.config.problems import ConfigError, explain
from fewstep.errors import FewstepError, MissingError

C = TypeVar("C", bound=BaseModel)
Raw = dict[str, object]
"""A config as YAML has it, before it is checked."""


def load_config(cls: type[C], file: str | Path, overrides: Sequence[str] = ()) -> C:
    """The settings `cls` from a file and overrides `key.path=value`.

    Raises FewstepError, in one sentence per problem, for whatever is wrong with either.
    """
    return check(cls, read(file, overrides), str(file))


def read(file: str | Path, overrides: Sequence[str] = ()) -> Raw:
    """The mapping in a file under its overrides, unchecked."""
    raw = _read(Path(file))
    for item in overrides:
        _override(raw, item)
    return raw


def check(cls: type[C], raw: object, where: str) -> C:
    """The settings `cls` of a mapping; `where` is what an error names as its origin."""
    try:
        return cls.model_validate(raw)
    except ValidationError as e:
        problems = list(dict.fromkeys(explain(cls, raw, x) for x in e.errors()))
        raise ConfigError(where, problems) from None


def merged(base: Mapping[str, object], changes: Mapping[str, object]) -> Raw:
    """`base` with `changes` at any depth; a mapping of another `kind` or `name` takes the whole place of the old one."""
    whole = dict(base)
    for key, value in changes.items():
        old = whole.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            other = any(tag in value and value[tag] != old.get(tag, value[tag]) for tag in ("kind", "name"))
            whole[key] = dict(value) if other else merged(old, value)
        else:
            whole[key] = value
    return whole


def dump_config(config: BaseModel, versions: Mapping[str, str]) -> str:
    """The config as YAML that loads back to an equal one, below a comment with the versions of libraries."""
    header = "".join(["# versions:\n", *(f"#   {name}: {version}\n" for name, version in versions.items())])
    return header + yaml12.dump(config.model_dump(mode="json"))


def _yaml(text: str, where: str) -> object:
    try:
        return yaml12.parse(text)
    except yaml.MarkedYAMLError as e:
        line = f", line {e.problem_mark.line + 1}" if e.problem_mark else ""
        raise FewstepError(f"{where}{line}", e.problem, "YAML") from None
    except (yaml.YAMLError, ValueError) as e:
        raise FewstepError(where, " ".join(str(e).split()), "YAML") from None


def _read(path: Path) -> Raw:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise MissingError("config file", f"{path}, which does not exist", "a YAML file") from None
    except (OSError, UnicodeDecodeError) as e:
        raise FewstepError("config file", f"{path}, which cannot be read ({e})", "a YAML file") from None
    raw = _yaml(text, str(path))
    if raw is not None and not isinstance(raw, dict):
        raise FewstepError(str(path), describe(raw), "a mapping of keys to values")
    return raw or {}


def _override(raw: Raw, item: str) -> None:
    key, equals, text = item.partition("=")
    *parents, last = key.split(".")
    if not equals or not all((*parents, last)):
        raise FewstepError("override", repr(item), "the form key.path=value")
    node = raw
    for depth, parent in enumerate(parents, 1):
        inner = {} if node.get(parent) is None else node[parent]
        if not isinstance(inner, dict):
            where = ".".join(parents[:depth])
            raise FewstepError(f"override {item!r}", f"{where}: {describe(inner)}", "a mapping, which has keys")
        node[parent] = inner
        node = inner
    node[last] = _yaml(text, f"override {item!r}")
