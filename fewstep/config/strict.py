"""The base of all settings: strict, frozen, no unknown keys."""

from collections.abc import Mapping
from pathlib import Path
from typing import get_origin

from pydantic import BaseModel, ConfigDict, model_validator

from fewstep.config.help import options


class Strict(BaseModel):
    """Settings without unknown keys or conversions, except those of YAML: text to paths, lists to tuples.

    The docstrings below the attributes are the help text.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    # Of the model, not of its fields: pydantic allows no such validator on a key that distinguishes members of a union.
    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, values: object) -> object:
        if not isinstance(values, Mapping):
            return values
        return {key: cls._converted(key, value) for key, value in values.items()}

    @classmethod
    def _converted(cls, key: str, value: object) -> object:
        field = cls.model_fields.get(key)
        accepted = list(options(field.annotation)) if field else []
        if isinstance(value, str) and Path in accepted:
            return Path(value).expanduser()
        if isinstance(value, list) and any(get_origin(o) is tuple for o in accepted):
            return _tuples(value)
        return value


def _tuples(value: object) -> object:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
