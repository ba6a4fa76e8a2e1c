"""Teachers: pretrained diffusers pipelines, one file per family."""

from fewstep.teachers.base import Teacher
from fewstep.teachers.denoiser import Call, Cond, Denoiser, Posterior
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
