"""Tiny pipelines from the real classes, and what several test modules share."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.config import merged

ROOT = Path(__file__).parents[2]
"""The clone."""

SECTIONS = ("train", "memory", "log", "checkpoint")


def changed(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A run's values with other ones, in the sections those alone that `changes` has."""
    inside = {key: value for key, value in changes.items() if key in SECTIONS}
    return merged(values, inside) | {key: value for key, value in changes.items() if key not in SECTIONS}
