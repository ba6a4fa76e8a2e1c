"""fewstep: few-step generators from any diffusers pipeline.

`distill` trains, exports and scores a student; `load_teacher` opens a pipeline as a teacher; `sample` draws images;
`Run` is what a run has left; `FewstepError` is about a user's input. The packages, in the order of a run: `teachers`, `methods`,
`training`, `export`, `evaluate`.
"""

from typing import TYPE_CHECKING

from fewstep._version import __version__

if TYPE_CHECKING:
    from fewstep.api import distill
    from fewstep.errors import FewstepError
    from fewstep.evaluate import sample
    from fewstep.teachers import load_teacher
    from fewstep.training.run import Run

__all__ = ["FewstepError", "Run", "__version__", "distill", "load_teacher", "sample"]

# Loaded when first used, so that `import fewstep` and the check of a config wait for no torch.
# `evaluate` and `export` are packages of the same name and stay so: `from fewstep.export.pipeline import export`.
_HOMES = {
    "FewstepError": "fewstep.errors",
    "Run": "fewstep.training.run",
    "distill": "fewstep.api",
    "load_teacher": "fewstep.teachers",
    "sample": "fewstep.evaluate",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'fewstep' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
