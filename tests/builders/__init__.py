"""Tiny pipelines from the real classes, and what several test modules share."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The clone."""
