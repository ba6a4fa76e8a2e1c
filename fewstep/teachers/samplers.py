"""Stock schedulers for a teacher's students, and their grids."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fewstep.teachers.base import Teacher


class Samplers:
    def __init__(self, teacher: "Teacher") -> None:
        self.renoise, self.counts = teacher.renoise_scheduler, teacher.renoise_counts
        self.jump, self.grid = teacher.jump_scheduler, teacher.jump_grid
