"""fewstep: few-step generators from any diffusers pipeline."""

from typing import TYPE_CHECKING, Any

from fewstep._version import __version__

if TYPE_CHECKING:
    from fewstep.evaluate import sample
    from fewstep.teachers import load_teacher

__all__ = ["__version__", "load_teacher", "sample"]

# Loaded when first used, so that `import fewstep` and the check of a config wait for no torch.
# `evaluate` and `export` are modules of the same name and stay so: `from fewstep.export.pipeline import export`.
_HOMES = {"load_teacher": "fewstep.teachers", "sample": "fewstep.evaluate"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fewstep' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
