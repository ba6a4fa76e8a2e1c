"""The JSON file of scores, evaluation.json: {"protocol": description, "results": rows}."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep import io

Row = dict[str, Any]
"""Scores and costs of one pipeline at one step count, by the names that the JSON file has."""


def write_report(path: Path | str, protocol: Mapping[str, object], results: Sequence[Row]) -> None:
    """Write {"protocol", "results"} as JSON, whole or not at all."""
    io.write_json({"protocol": dict(protocol), "results": list(results)}, Path(path))
