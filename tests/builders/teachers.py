"""Shared by the tests: from test_teachers."""

import torch

from fewstep.teachers import Denoiser, Teacher


def perturbed(teacher: Teacher, guidance: bool) -> Denoiser:
    """A student that has moved from its teacher, its guidance embedding too."""
    student = teacher.students.new(guidance)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.02)
    return student.eval()
