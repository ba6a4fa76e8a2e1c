"""YAML for run configs: the scalars of YAML 1.2, and no duplicate keys."""

import re
from collections.abc import Hashable

import yaml


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: 1e-4 is a number, `no`, 2026-01-01 and 1:30 are text. A duplicate key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be text", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key.value!r}", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}  # YAML 1.1's are dropped; 1.2's are added below


class _Dumper(yaml.SafeDumper):
    """Quotes text that either YAML version would read as something other than text."""


_FLOAT = (
    r"[-+]?(?:(?:\.[0-9]+|[0-9][0-9_]*\.[0-9_]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
    r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)"
)
for _kind, _pattern, _first in (
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("float", _FLOAT, "-+0123456789."),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)", "-+0123456789"),
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", "<<", "<"),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), list(_first))


def parse(text: str) -> object:
    """Raises yaml.YAMLError, or ValueError for a scalar that cannot be built."""
    return yaml.load(text, Loader=_Loader)


def dump(value: object) -> str:
    """Dump in ASCII, which any locale reads and writes."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=120)


def dump_line(value: object) -> str:
    """The value in flow style, on one line."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("...\n").strip()
