"""Config models in words: help, types, and what is wrong with a value."""

import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fewstep.config import yaml12


def options(annotation: Any) -> Iterator[Any]:
    """The members of a union, without their constraints."""
    if get_origin(annotation) is Annotated:
        yield from options(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for member in get_args(annotation):
            yield from options(member)
    else:
        yield annotation


def _models(annotation: Any) -> list[type[BaseModel]]:
    return [o for o in options(annotation) if isinstance(o, type) and issubclass(o, BaseModel)]


def explain(cls: type[BaseModel], raw: Any, error: Any) -> str:
    """One problem in words, told of the key that the user wrote, not of an item or of a member of a union in it."""
    models, keys, field = [cls], list[str](), None
    for part in error["loc"]:
        found = next((m.model_fields[part] for m in models if part in m.model_fields), None)
        if found is None and error["type"] == "extra_forbidden":
            return f"  {'.'.join([*keys, str(part)])}: unknown key; {_hint(cls, models, str(part))}"
        if found is None:
            continue
        field, models = found, _models(found.annotation)
        keys.append(part)
        raw = raw.get(part) if isinstance(raw, dict) else raw
    where = ".".join(keys) or "config"
    if error["type"] == "missing" and field and error["loc"][-1] == keys[-1]:
        return f"  {where}: missing; allowed: {_type(field.annotation, field.metadata)}"
    if error["type"] == "value_error" or field is None:
        return f"  {where}: {error['msg'].removeprefix('Value error, ')}"
    allowed = _type(field.annotation, field.metadata) + _similar(raw, field.annotation)
    return f"  {where}: found {describe(raw)}; allowed: {allowed}"


def _hint(cls: type[BaseModel], models: list[type[BaseModel]], key: str) -> str:
    known = [name for m in models for name in m.model_fields]
    elsewhere = [path for path in _paths(cls) if path.split(".")[-1] == key]
    if close := difflib.get_close_matches(key, known, n=1) or elsewhere[:1]:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(known)}"


def _similar(value: Any, annotation: Any) -> str:
    choices = [str(c) for o in options(annotation) if get_origin(o) is Literal for c in get_args(o)]
    close = difflib.get_close_matches(str(value), choices, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _paths(cls: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in cls.model_fields.items():
        yield prefix + name
        for model in _models(field.annotation):
            yield from _paths(model, f"{prefix}{name}.")


def describe(value: Any) -> str:
    """A value as an error names what it found."""
    text = yaml12.dump_line(value)
    text = text if len(text) <= 80 else text[:77] + "..."
    match value:
        case str():
            return f"text {value!r}"
        case list():
            return f"list {text}"
        case dict():
            return f"mapping {text}"
    return text


_WORDS = {int: "whole number", float: "number", bool: "true or false", str: "text", Path: "path", type(None): "null"}


def _type(annotation: Any, metadata: Any = ()) -> str:
    """A type in the words of a YAML file, as help and errors name it."""
    arguments, origin = get_args(annotation), get_origin(annotation)
    tail = _limits(c for m in metadata for c in (m.metadata if isinstance(m, FieldInfo) else [m]))
    if origin is Annotated:
        return _type(arguments[0], annotation.__metadata__) + tail
    if origin in (Union, UnionType):
        return " or ".join(_type(a) for a in arguments) + tail
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin in (tuple, list):
        fixed = origin is tuple and arguments[-1] is not Ellipsis
        items = ", ".join(map(_type, arguments if fixed else arguments[:1]))
        return f"list of {len(arguments)} ({items})" if fixed else f"list of ({items}){tail}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"mapping with the keys {', '.join(annotation.model_fields)}"
    return _WORDS.get(annotation, str(annotation)) + tail


def _limits(constraints: Iterable[Any]) -> str:
    limits = []
    for constraint in constraints:
        match constraint:
            case Gt(gt=bound):
                limits.append(f" > {bound}")
            case Ge(ge=bound):
                limits.append(f" >= {bound}")
            case Lt(lt=bound):
                limits.append(f" < {bound}")
            case Le(le=bound):
                limits.append(f" <= {bound}")
            case MinLen(min_length=bound):
                limits.append(f", at least {bound}")
    return " and".join(limits)


def help_lines(cls: type[BaseModel], indent: str = "") -> Iterator[str]:
    """Every key, nested, with its type, default and meaning."""
    for name, field in cls.model_fields.items():
        models = _models(field.annotation)
        default = field.get_default(call_default_factory=True) if not field.is_required() else None
        if models:
            kind = "mapping or null" if type(None) in options(field.annotation) else "mapping"
            value = "" if field.is_required() or default is not None else " = null"
        else:
            kind = _type(field.annotation, field.metadata)
            value = "" if field.is_required() else f" = {_default(default)}"
        yield f"{indent}{name}: {kind}{value}{' (required)' if field.is_required() else ''}"
        yield from (f"{indent}    {line}" for line in (field.description or "").splitlines())
        for model in models:
            yield from help_lines(model, indent + "  ")


def _default(value: Any) -> str:
    value = list(value) if isinstance(value, tuple) else value
    return str(value) if isinstance(value, str | Path) else describe(value).removeprefix("list ")
