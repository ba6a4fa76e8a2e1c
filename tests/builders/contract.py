"""Shared by the tests: from test_families."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from builders.families import build_dit, build_edm, build_flux, build_pixart, build_sana, build_sd3, build_sdxl
from builders.pipelines import build_ddpm, build_sd
from fewstep.methods.boot.method import Boot, BootConfig
from fewstep.methods.consistency.lcm import LCM
from fewstep.methods.consistency.method_settings import LcmSettings, MlcmSettings
from fewstep.methods.consistency.mlcm import MLCM
from fewstep.methods.distribution_matching.dmd2 import DMD2, DMD2Config
from fewstep.methods.scm.method import Scm, ScmConfig
from fewstep.teachers import Teacher
from fewstep.teachers.families.edm import Edm

BUILDERS: dict[str, Callable[[Path], Path]] = {
    "sdxl": build_sdxl,
    "dit": lambda folder: build_dit(folder, num_labels=1000),
    "pixart": build_pixart,
    "sd3": build_sd3,
    "flux": build_flux,
    "sana": build_sana,
    "edm": build_edm,
}


CONTRACT: dict[str, Callable[[Path], Path]] = {"sd": build_sd, "ddpm": build_ddpm, **BUILDERS}


"""All families; the first two have further tests of their own in test_teachers.py."""


GUIDED = {"guidance": {"range": [1.0, 3.0], "export_scale": 2.0}}
METHODS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "consistency": (LCM, LcmSettings, {"grid": {"kind": "even", "points": 8}, "steps": 4, **GUIDED}),
    "mlcm": (
        MLCM,
        MlcmSettings,
        {
            "points": 8,
            "steps": 4,
            "stages": [{"phases": 4}],
            "states": {"kind": "shared_trajectories", "replay": 4},
            "target": {"kind": "solver", "decay": 0.95},
            **GUIDED,
        },
    ),
    "dmd2": (
        DMD2,
        DMD2Config,
        {"steps": 4, "guidance": {"scale": 2.0}, "adversarial": {"weight": 0.1}, "student_update_every": 2},
    ),
    "boot": (Boot, BootConfig, {"steps": 2, "n_sub": 4, "guidance": {"scale": 2.0}}),
    "scm": (
        Scm,
        ScmConfig,
        {"steps": 4, "guidance": {"range": [1.0, 3.0], "export_scale": 2}, "warmup_iterations": 0},
    ),
}


ONE_JUMP: dict[str, dict[str, Any]] = {"mlcm": {"stages": [{"phases": 1}]}, "boot": {"steps": 1}}


"""For EDM's, whose stock pipeline takes one deterministic step."""


MATRIX = [(family, method) for family in CONTRACT for method in METHODS]


def raw(teacher: Teacher, size: int = 2) -> list[Any]:
    return (["a bag", "a long coat"] if teacher.conditions == "prompt" else [3, 7])[:size]


def noise(teacher: Teacher, size: int = 2) -> Tensor:
    return torch.randn(size, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))


def settings_of(method: str, teacher: Teacher, steps: int | None = None) -> dict[str, Any]:
    """What METHODS has, for a family that may lack something, and for another count of steps."""
    settings = METHODS[method][2]
    if steps is not None:
        # Phases of one teacher's step each leave an unguided student nothing to learn: it is its teacher, to the bit.
        points = max(8, 2 * steps)
        phases = {"stages": [{"phases": steps}], "points": points} if "stages" in settings else {}
        settings = settings | {"steps": steps} | phases
    if not teacher.guidance.guidable:
        settings = settings | {"guidance": {"scale": 1.0} if "scale" in settings["guidance"] else None}
    return settings | (ONE_JUMP.get(method, {}) if isinstance(teacher, Edm) else {})
