"""Networks that learn from a teacher, and the stock pipelines that they leave in."""

from typing import TYPE_CHECKING

from fewstep.config import LoraConfig

if TYPE_CHECKING:
    from fewstep.teachers.base import Teacher


class Students:
    def __init__(self, teacher: "Teacher") -> None:
        self.teacher, self.lora_targets = teacher, teacher.lora_targets
        self.new, self.trainable, self.fold = teacher.student, teacher.learner, teacher.folded
        self.pipeline, self.guided_pipeline = teacher.student_pipeline, teacher.guided_pipeline

    def adapt(self, lora: LoraConfig) -> None:
        self.teacher.adapt(lora)
