"""Settings in words: help, types, values, and what is wrong with one."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fewstep.config import yaml12

Model = type[BaseModel]


def options(annotation: object) -> Iterator[object]:
    """Yield the members of a union, without their constraints."""
    if get_origin(annotation) is Annotated:
        yield from options(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for member in get_args(annotation):
            yield from options(member)
    else:
        yield annotation


def models(annotation: object) -> list[Model]:
    """The settings classes in a type: itself, the members of a union, the items of a list."""
    found: list[Model] = []
    for option in options(annotation):
        if get_origin(option) in (tuple, list):
            found += models(get_args(option)[0])
        elif isinstance(option, type) and issubclass(option, BaseModel):
            found.append(option)
    return found


def choices(annotation: object) -> list[str]:
    """The texts that a type allows, where it allows only some."""
    return [str(c) for o in options(annotation) if get_origin(o) is Literal for c in get_args(o)]


def discriminator(field: FieldInfo) -> str | None:
    """The key by which a union of settings distinguishes its members; None for any other field."""
    return next(_discriminators(field.annotation, [field]), None)


def _discriminators(annotation: object, metadata: Iterable[object]) -> Iterator[str]:
    """Yield the discriminators in a type, which may be a list of unions, or a union or null."""
    for constraint in metadata:
        if isinstance(constraint, FieldInfo) and isinstance(constraint.discriminator, str):
            yield constraint.discriminator
    if get_origin(annotation) is Annotated:
        first, *rest = get_args(annotation)
        yield from _discriminators(first, rest)
    elif get_origin(annotation) in (Union, UnionType, tuple, list):
        for argument in get_args(annotation):
            yield from _discriminators(argument, ())


def tags(field: FieldInfo) -> dict[str, Model]:
    """The values of a union's discriminator and the settings that each of them means."""
    key = discriminator(field)
    return {tag: m for m in models(field.annotation) for tag in choices(m.model_fields[key].annotation)} if key else {}


def paths(cls: Model, prefix: str = "") -> Iterator[str]:
    """Yield every key at any depth, dotted, sections before their keys."""
    for name, field in cls.model_fields.items():
        yield prefix + name
        for model in models(field.annotation):
            yield from paths(model, f"{prefix}{name}.")


def describe(value: object) -> str:
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


_WORDS: dict[object, str] = {
    int: "whole number",
    float: "number",
    bool: "true or false",
    str: "text",
    Path: "path",
    type(None): "null",
}


def type_name(annotation: object, metadata: Iterable[object] = ()) -> str:
    """A type in the words of a YAML file, as help and errors name it."""
    arguments, origin = get_args(annotation), get_origin(annotation)
    tail = _limits(c for m in metadata for c in (m.metadata if isinstance(m, FieldInfo) else [m]))
    if origin is Annotated:
        return type_name(arguments[0], arguments[1:]) + tail
    if origin in (Union, UnionType):
        return " or ".join(map(type_name, arguments)) + tail
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin in (tuple, list):
        fixed = origin is tuple and arguments[-1] is not Ellipsis
        items = ", ".join(map(type_name, arguments if fixed else arguments[:1]))
        return f"list of {len(arguments)} ({items})" if fixed else f"list of ({items}){tail}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"mapping with the keys {', '.join(annotation.model_fields)}"
    return _WORDS.get(annotation, str(annotation)) + tail


def _limits(constraints: Iterable[object]) -> str:
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


def help_lines(cls: Model, indent: str = "", methods: Sequence[Model] = ()) -> Iterator[str]:
    """Yield every key, nested, with its type, default and meaning.

    Args:
        cls: the settings.
        indent: spaces before each line.
        methods: settings classes that the key `method` of `cls` can have, in place of its own type.
    """
    for name, field in cls.model_fields.items():
        inner = list(methods) if name == "method" and methods else models(field.annotation)
        default = field.get_default(call_default_factory=True) if not field.is_required() else None
        if inner:
            kind = "mapping or null" if type(None) in options(field.annotation) else "mapping"
            kind = kind if get_origin(field.annotation) is not tuple else "list of mappings"
            value = "" if field.is_required() or default is not None else " = null"
        else:
            kind = type_name(field.annotation, field.metadata)
            value = "" if field.is_required() else f" = {_default(default)}"
        yield f"{indent}{name}: {kind}{value}{' (required)' if field.is_required() else ''}"
        yield from (f"{indent}    {line}" for line in (field.description or "").splitlines())
        for i, model in enumerate(inner):
            if i:
                yield f"{indent}  or"
            yield from help_lines(model, indent + "  ")


def _default(value: object) -> str:
    value = list(value) if isinstance(value, tuple) else value
    return str(value) if isinstance(value, str | Path) else describe(value).removeprefix("list ")
