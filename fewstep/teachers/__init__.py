"""Teachers: pretrained diffusers pipelines, one file per family."""

from fewstep.teachers.base import Call, Cond, Denoiser, Posterior, Teacher
from fewstep.teachers.load import FAMILIES, NETWORKS, load_teacher, locate, quiet

__all__ = [
    "FAMILIES",
    "NETWORKS",
    "Call",
    "Cond",
    "Denoiser",
    "Posterior",
    "Teacher",
    "load_teacher",
    "locate",
    "quiet",
]
