"""What a run shows of its student while it trains: small-sample scores, and pictures beside the teacher."""

from typing import TYPE_CHECKING, Any

import torch

from fewstep.evaluate import evaluate, grid, recommended_guidance_scale, sample

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL import Image
    from torch import Tensor

    from fewstep.config import RunConfig
    from fewstep.data import Source
    from fewstep.teachers.base import Teacher

PICTURED_STEPS = (1, 2, 4, 8)
TEACHER_STEPS = 50


def small_scores(
    pipeline: Any, config: "RunConfig[Any]", accelerator: "Accelerator", guidance_scale: float | None = None
) -> dict[str, Any]:
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


def teacher_guidance_scale(config: "RunConfig[Any]") -> float | None:
    """What the teacher's pipeline is called with; None = nothing, its own default holds."""
    scale = config.evaluate.teacher_guidance_scale if config.evaluate else None
    return recommended_guidance_scale(config.teacher) if scale is None else scale


def student_guidance_scale(config: "RunConfig[Any]", teacher: "Teacher", keeps_guidance: bool) -> float | None:
    """What a student's pipeline is called with: the teacher's scale, if it keeps guidance; None = nothing has to be passed."""
    return teacher_guidance_scale(config) if keeps_guidance else teacher.guidance.scale_to_pass


class Pictures:
    """Grids of eight samples, from the same noises and conditions every time; the teacher's rows are drawn once."""

    def __init__(
        self,
        config: "RunConfig[Any]",
        teacher: "Teacher",
        source: "Source",
        steps: tuple[int, ...],
        student_scale: float | None = None,
    ) -> None:
        self.teacher, self.seed, self.student_scale = teacher, config.seed, student_scale
        # A method for one count alone is shown at that one.
        self.steps = [n for n in PICTURED_STEPS if n in steps] or [max(steps)]
        self.indices = list(range(8))
        # A source of few conditions, or of none, is shown with several noises for each.
        self.conditions = source.conditions_at([i % len(source) for i in self.indices])
        self.guidance_scale = teacher_guidance_scale(config)
        self.teacher_rows: list[Tensor] = []

    def draw(self, student: Any) -> "Image.Image":
        """Teacher at the student's counts and at 50 steps, then the student."""
        counts = [*self.steps, TEACHER_STEPS]
        with torch.random.fork_rng():
            if not self.teacher_rows:
                self.teacher_rows = [self._row(self.teacher.pipeline, n, self.guidance_scale) for n in counts]
            rows = self.teacher_rows + [self._row(student, n, self.student_scale) for n in self.steps]
        return grid(rows, [f"teacher {n}" for n in counts] + [f"student {n}" for n in self.steps])

    def _row(self, pipeline: Any, steps: int, guidance_scale: float | None) -> "Tensor":
        return sample(
            pipeline, self.conditions, self.indices, steps=steps, seed=self.seed, guidance_scale=guidance_scale
        )
