"""The last part of a run: the exported student and its teacher, scored side by side."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from diffusers import DiffusionPipeline

from fewstep.config import EvaluateConfig, MethodConfig, RunConfig
from fewstep.errors import FewstepError
from fewstep.evaluate import (
    REMEASURED,
    EarlierScores,
    earlier_rows,
    evaluate,
    fingerprints,
    first_images,
    format_table,
    grid,
    protocol,
    write_report,
)
from fewstep.export.card import update_card
from fewstep.teachers import Teacher, quiet
from fewstep.teachers.students import StudentGuidance
from fewstep.training.validation import student_guidance_scale, teacher_guidance_scale

if TYPE_CHECKING:
    from accelerate import Accelerator

Row = dict[str, object]
"""Scores of one pipeline at one number of steps, as in evaluation.json."""


class Protocol(TypedDict):
    """Arguments of `evaluate` that all rows share."""

    reference: str
    features: str | None
    clip: str | None
    prompts: Path | None
    num_images: int
    batch_size: int
    seed: int


@dataclass(frozen=True)
class Scoring:
    """Settings of the evaluation, and scores that exist before the training.

    Attributes:
        fingerprints: of the teacher's pipeline, before adapters come into its network.
        earlier: scores of the teacher that need not be measured.
    """

    config: RunConfig[MethodConfig]
    settings: EvaluateConfig
    fingerprints: dict[str, str]
    earlier: EarlierScores

    @classmethod
    def of(cls, config: RunConfig[MethodConfig], teacher: Teacher) -> "Scoring":
        """Raises ValueError where `evaluate` is null, and for an `evaluate.teacher_from` that is no report."""
        settings = config.evaluate
        if settings is None:
            raise FewstepError("evaluate", "null", "settings of the evaluation")
        scoring = cls(config, settings, fingerprints(teacher.pipeline), EarlierScores({}, ""))
        if settings.teacher_from is None:
            return scoring
        expected, scale = protocol(**scoring.asked), teacher_guidance_scale(config)
        try:
            found = earlier_rows(settings.teacher_from, expected, scoring.fingerprints, scale, settings.teacher_steps)
        except FewstepError as e:
            file = settings.teacher_from
            raise type(e)("evaluate.teacher_from", f"{file}, {e.found}", e.expected, e.hint) from None
        return cls(config, settings, scoring.fingerprints, found)

    @property
    def asked(self) -> Protocol:
        """The protocol, as arguments of `evaluate`."""
        e = self.settings
        return {
            "reference": e.reference, "features": e.features, "clip": e.clip, "prompts": e.prompts,
            "num_images": e.num_images, "batch_size": e.batch_size, "seed": self.config.seed,
        }  # fmt: skip

    def run(self, teacher: Teacher, accelerator: "Accelerator", guidance: StudentGuidance) -> list[Row]:
        """Write evaluation.json, the scores in the student's card, and a picture; print the table. The rows."""
        folder = Path(self.config.output_dir)
        with quiet():
            student = DiffusionPipeline.from_pretrained(folder / "pipeline").to(accelerator.device)
        scale, own = teacher_guidance_scale(self.config), student_guidance_scale(self.config, teacher, guidance)
        results = evaluate(
            student,
            name="student",
            steps=self.settings.steps,
            guidance_scale=own,
            accelerator=accelerator,
            **self.asked,
        )
        results = [row | {"fingerprints": fingerprints(student)} for row in results]
        results += self._teacher_rows(teacher, scale, accelerator)
        if accelerator.is_main_process:
            named = protocol(**self.asked)
            write_report(folder / "evaluation.json", named, results)
            update_card(folder / "pipeline", results, named)
            print(format_table(results))
            if self.earlier.rows:
                print(f"teacher's scores: {self.earlier.words}; its time is measured here")
            self._picture(teacher, student, scale, own)
        return results

    def _teacher_rows(self, teacher: Teacher, scale: float | None, accelerator: "Accelerator") -> list[Row]:
        """One for each of `teacher_steps`. Where the scores are known, one batch a process shows what they cost."""
        e, known = self.settings, self.earlier.rows
        few = max(2, min(e.num_images, e.batch_size * accelerator.num_processes))
        rows: dict[int, Row] = {}
        for steps, num_images in (
            ([n for n in e.teacher_steps if n not in known], e.num_images),
            ([n for n in e.teacher_steps if n in known], few),
        ):
            if steps:
                asked: Protocol = {**self.asked, "num_images": num_images}
                drawn = evaluate(
                    teacher.pipeline, name="teacher", steps=steps, guidance_scale=scale, accelerator=accelerator,
                    **asked,
                )  # fmt: skip
                rows |= {row["steps"]: row for row in drawn}
        for n, row in known.items():
            rows[n] = row | {"model": "teacher"} | {key: rows[n][key] for key in REMEASURED}
        return [rows[n] | {"fingerprints": self.fingerprints} for n in e.teacher_steps]

    def _picture(self, teacher: Teacher, student: DiffusionPipeline, scale: float | None, own: float | None) -> None:
        """Teacher and student side by side, from the same initial noise: samples/comparison.png."""
        e = self.settings
        rows, labels = [], []
        for name, pipeline, steps, guidance in (
            ("teacher", teacher.pipeline, e.teacher_steps, scale),
            ("student", student, e.steps, own),
        ):
            for n in steps:
                rows.append(
                    first_images(
                        pipeline, reference=e.reference, features=e.features, prompts=e.prompts, steps=n, count=10,
                        seed=self.config.seed, guidance_scale=guidance,
                    )
                )  # fmt: skip
                labels.append(f"{name} {n}")
        folder = Path(self.config.output_dir) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        grid(rows, labels).save(folder / "comparison.png")
        print(f"pictures: {folder / 'comparison.png'}")
