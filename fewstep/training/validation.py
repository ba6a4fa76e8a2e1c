"""Validation during training: small-sample scores of the average, and sample grids beside the teacher's."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch

from fewstep import io
from fewstep.evaluate import evaluate, grid, recommended_guidance_scale, sample
from fewstep.teachers.denoiser import Denoiser
from fewstep.teachers.students import StudentGuidance
from fewstep.training.checkpoint import Progress, save_module

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import DiffusionPipeline
    from PIL import Image
    from torch import Tensor

    from fewstep.config import MethodConfig, RunConfig
    from fewstep.data import Source
    from fewstep.methods.base import Method
    from fewstep.teachers.base import Teacher
    from fewstep.training.log import Log

BEST = "best.safetensors"
"""File in a run's folder of the weights with the best small-sample FID."""
PICTURED_STEPS = (1, 2, 4, 8)
TEACHER_STEPS = 50


class SmallScores(TypedDict):
    """Scores of a student during training, from few samples."""

    fid: float
    clip_score: float | None
    images: int


def small_scores(
    pipeline: "DiffusionPipeline",
    config: "RunConfig[MethodConfig]",
    accelerator: "Accelerator",
    guidance_scale: float | None = None,
) -> "SmallScores":
    """FID and CLIP score as `config.score` asks, drawn without moving the training's random state.

    guidance_scale: what the pipeline's call is given; None = nothing.
    """
    s = config.score
    with torch.random.fork_rng():
        row = evaluate(
            pipeline, name="student", reference=s.reference, steps=(s.steps,), num_images=s.num_images,
            seed=config.seed, accelerator=accelerator, guidance_scale=guidance_scale,
            features=s.features, clip=s.clip, prompts=s.prompts,
        )[0]  # fmt: skip
    return {"fid": row["fid"], "clip_score": row.get("clip_score"), "images": s.num_images}


def teacher_guidance_scale(config: "RunConfig[MethodConfig]") -> float | None:
    """Guidance scale that the teacher's pipeline is called with; None = its own default."""
    scale = config.evaluate.teacher_guidance_scale if config.evaluate else None
    return recommended_guidance_scale(config.teacher) if scale is None else scale


def student_guidance_scale(
    config: "RunConfig[MethodConfig]", teacher: "Teacher", guidance: StudentGuidance
) -> float | None:
    """Guidance scale of a student's pipeline: the teacher's, if it keeps guidance; None = none is passed."""
    return teacher_guidance_scale(config) if guidance.by_caller else teacher.guidance.scale_to_pass


class Pictures:
    """Grids of eight samples, from the same initial noise and conditions every time; the teacher's rows are drawn once."""

    def __init__(
        self,
        config: "RunConfig[MethodConfig]",
        teacher: "Teacher",
        source: "Source",
        steps: tuple[int, ...],
        student_scale: float | None = None,
    ) -> None:
        self.teacher, self.seed, self.student_scale = teacher, config.seed, student_scale
        # A method for one count alone is shown at that one.
        self.steps = [n for n in PICTURED_STEPS if n in steps] or [max(steps)]
        self.indices = list(range(8))
        # A source of few conditions, or of none, is shown with several samples for each.
        self.conditions = source.conditions_at([i % len(source) for i in self.indices])
        self.guidance_scale = teacher_guidance_scale(config)
        self.teacher_rows: list[Tensor] = []

    def draw(self, student: "DiffusionPipeline") -> "Image.Image":
        """Teacher at the student's counts and at 50 steps, then the student."""
        counts = [*self.steps, TEACHER_STEPS]
        with torch.random.fork_rng():
            if not self.teacher_rows:
                self.teacher_rows = [self._row(self.teacher.pipeline, n, self.guidance_scale) for n in counts]
            rows = self.teacher_rows + [self._row(student, n, self.student_scale) for n in self.steps]
        return grid(rows, [f"teacher {n}" for n in counts] + [f"student {n}" for n in self.steps])

    def _row(self, pipeline: "DiffusionPipeline", steps: int, guidance_scale: float | None) -> "Tensor":
        return sample(
            pipeline, self.conditions, self.indices, steps=steps, seed=self.seed, guidance_scale=guidance_scale
        )


@dataclass
class Validation:
    """Scores and sample grids of the student's average, `score.every` and `log.samples_every` iterations.

    Attributes:
        progress: has the best score and early stopping, which scores change.
    """

    config: "RunConfig[MethodConfig]"
    method: "Method"
    accelerator: "Accelerator"
    average: Denoiser
    source: "Source"
    progress: Progress
    log: "Log"
    pictures: Pictures | None = field(default=None, init=False)

    @property
    def folder(self) -> Path:
        return self.config.output_dir

    def pipeline(self) -> "DiffusionPipeline":
        """The stock pipeline with the average, as export writes it."""
        method, students = self.method, self.method.teacher.students
        return students.stock_pipeline(self.average, method.scheduler(), method.student_guidance)

    def run(self) -> None:
        """Draw samples and take scores that are due after the current iteration."""
        iteration, every = self.progress.iteration, self.config.log.samples_every
        if self.config.score.every and iteration % self.config.score.every == 0:
            self.score()
        if every and iteration % every == 0:
            self.picture()

    def score(self) -> None:
        """Small-sample FID and CLIP score; the best weights by FID are kept, the last stage's first."""
        progress, stopping = self.progress, self.progress.stopping
        with self.method.teacher.placement.whole():
            scores = small_scores(self.pipeline(), self.config, self.accelerator, self._call_scale())
        self.log.write({"iteration": progress.iteration, **scores})
        fid = scores["fid"]
        stopping.add(fid, progress.iteration)
        if stopping.over:
            self.log.warn(
                progress.iteration,
                f"score.patience: the FID has not been below {stopping.best:.4g}, of iteration {stopping.best_at}, for "
                f"{stopping.waited} scores; training ends here",
            )
        if stopping.improves(fid, progress.iteration, progress.best):
            progress.best = {"fid": fid, "iteration": progress.iteration}
            if self.accelerator.is_main_process:
                with io.atomic(self.folder / BEST) as partial:
                    save_module(self.average, partial)

    def picture(self) -> None:
        """Write samples/<iteration>.png, on the main process."""
        if not self.accelerator.is_main_process:
            return
        teacher = self.method.teacher
        if self.pictures is None:
            steps = self.method.allowed_steps()
            self.pictures = Pictures(self.config, teacher, self.source, steps, self._call_scale())
        (self.folder / "samples").mkdir(exist_ok=True)
        with teacher.placement.whole():
            self.pictures.draw(self.pipeline()).save(self.folder / "samples" / f"{self.progress.iteration}.png")

    def _call_scale(self) -> float | None:
        return student_guidance_scale(self.config, self.method.teacher, self.method.student_guidance)
