"""Problems of a config, each named by the key as the user wrote it."""

import difflib
from dataclasses import dataclass

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from fewstep.config.help import choices, describe, discriminator, models, paths, tags, type_name
from fewstep.errors import FewstepError


@dataclass(frozen=True)
class Problem:
    """One wrong key: its dotted path, what was found, what was expected, and both in a sentence."""

    key: str
    text: str
    found: str = ""
    expected: str = ""


class ConfigError(FewstepError):
    """A config that cannot be used; the message has a line for each problem, the attributes are those of the first."""

    def __init__(self, where: str, problems: list[Problem]) -> None:
        first = problems[0]
        super().__init__(first.key, first.found, first.expected)
        self.where, self.problems = where, problems
        count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        self.message = "\n".join([f"{where}: {count}", *(f"  {p.text}" for p in problems)])

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[object, ...]]:
        return type(self), (self.where, self.problems)


def explain(cls: type[BaseModel], raw: object, error: ErrorDetails) -> Problem:
    """One problem of pydantic's, of the key that the user wrote, not of an item or a member of a union in it."""
    known, keys, field = [cls], list[str](), None
    kind, loc = error["type"], error["loc"]
    for i, part in enumerate(loc):
        if isinstance(part, int) and known and isinstance(raw, list) and part < len(raw):  # a section in a list
            raw = raw[part]
            keys[-1] += f"[{part}]"
            continue
        found = next((m.model_fields[part] for m in known if part in m.model_fields), None)
        if found is None and isinstance(part, str) and i < len(loc) - 1:
            known = _member(field, known, part)
        elif found is None and kind == "extra_forbidden":
            return _unknown(cls, known, keys, str(part), raw)
        if found is None:
            continue
        field, known = found, models(found.annotation)
        keys.append(str(part))
        raw = raw.get(part) if isinstance(raw, dict) else raw
    where = ".".join(keys)
    untagged = kind in ("model_type", "model_attributes_type", "dict_type") and field and discriminator(field)
    if field and (untagged or kind in ("union_tag_invalid", "union_tag_not_found")):
        return _tag(where, field, raw)
    if kind == "missing" and field and loc[-1] == keys[-1]:
        expected = type_name(field.annotation, field.metadata)
        return Problem(where, f"{where}: missing; expected {expected}", "nothing", expected)
    if kind == "value_error" or field is None:
        text = error["msg"].removeprefix("Value error, ")
        return Problem(where, f"{where}: {text}" if where else text)
    expected = type_name(field.annotation, field.metadata)
    near = nearest(raw, choices(field.annotation))
    return Problem(where, f"{where}: found {describe(raw)}; expected {expected}{near}", describe(raw), expected)


def nearest(value: object, allowed: list[str]) -> str:
    """The question after an error: `; did you mean 'x'?`, or nothing where no allowed text is near."""
    close = difflib.get_close_matches(str(value), allowed, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _member(field: FieldInfo | None, known: list[type[BaseModel]], part: str) -> list[type[BaseModel]]:
    """The member of a union that pydantic's `part` of a place means: a discriminator's value or the name of a class."""
    if field is not None and part in (tagged := tags(field)):
        return [tagged[part]]
    return [m for m in known if m.__name__ == part] or known


def _tag(where: str, field: FieldInfo, raw: object) -> Problem:
    """A union's discriminator that is missing or none of its values."""
    key = discriminator(field) or ""
    allowed = list(tags(field))
    if not isinstance(raw, dict):
        expected = f"mapping with the key {key}, which is one of {', '.join(allowed)}"
        return Problem(where, f"{where}: found {describe(raw)}; expected {expected}", describe(raw), expected)
    found = describe(raw[key]) if key in raw else "nothing"
    words = f"found {found}" if key in raw else "missing"
    text = f"{where}.{key}: {words}; expected {', '.join(allowed)}{nearest(raw.get(key), allowed)}"
    return Problem(f"{where}.{key}", text, found, ", ".join(allowed))


def _unknown(cls: type[BaseModel], known: list[type[BaseModel]], keys: list[str], part: str, raw: object) -> Problem:
    """A key that is in no section, or in another one."""
    where = ".".join([*keys, part])
    found = describe(raw.get(part)) if isinstance(raw, dict) else ""
    names = [name for m in known for name in m.model_fields]
    everywhere = list(paths(cls))
    # `log_every` and `every_log` both mean `log.every`.
    parts = sorted(part.split("_"))
    moved = [p for p in everywhere if sorted(p.replace(".", "_").split("_")) == parts and "." in p]
    inside = [p for p in everywhere if p.split(".")[-1] == part]
    near = difflib.get_close_matches(part, names, n=1)
    similar = difflib.get_close_matches(part, {p.split(".")[-1] for p in everywhere}, n=1, cutoff=0.8)
    far = [p for p in everywhere if p.split(".")[-1] in similar]
    close = [key for key in _moved(cls, part, keys) or moved or near or inside or far if key != where]
    expected = f"one of {', '.join(names)}"
    hint = f"did you mean {close[0]!r}?" if close else f"expected {expected}"
    return Problem(where, f"{where}: unknown key; {hint}", found, close[0] if close else expected)


def _moved(cls: type[BaseModel], part: str, keys: list[str]) -> list[str]:
    places = getattr(cls, "moved", {})
    return [places[part]] if not keys and part in places else []


__all__ = ["ConfigError", "Problem", "explain", "nearest"]
