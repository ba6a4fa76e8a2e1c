"""A run from settings to scores, in stages: check -> build -> train -> export -> score.

Each stage is a function; its value is what the next one needs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline

from fewstep import io
from fewstep.config import MethodConfig, RunConfig, dump_config
from fewstep.data import Source, load_source
from fewstep.errors import FewstepError, MissingError
from fewstep.export.lora import export_lora
from fewstep.export.pipeline import export as export_pipeline
from fewstep.methods.base import Method
from fewstep.methods.registry import load_run, method_class
from fewstep.teachers import load_teacher, locate, quiet
from fewstep.teachers.base import Teacher
from fewstep.teachers.denoiser import Denoiser
from fewstep.training import checkpoint as ckpt
from fewstep.training.callbacks import Callback
from fewstep.training.final_scores import Row, Scoring
from fewstep.training.preflight import check_built, check_config
from fewstep.training.roles import AVERAGE
from fewstep.training.trainer import Trainer
from fewstep.training.validation import BEST

if TYPE_CHECKING:
    from accelerate.state import PartialState

RunSettings = RunConfig[MethodConfig]


@dataclass(frozen=True)
class Checked:
    """Settings whose folders, references and tracker were found, and the method they name."""

    config: RunSettings
    method: type[Method]


@dataclass(frozen=True)
class Built:
    """A trainer, at its checkpoint if the run is resumed; and how its student will be scored."""

    config: RunSettings
    source: Source
    trainer: Trainer
    scoring: Scoring | None


@dataclass(frozen=True)
class Trained:
    """A student to export.

    Attributes:
        student: its best weights, or their average.
        prompt: one that it was trained on, for the example in the model card; None without prompts.
        process: which process of the run this is.
    """

    config: RunSettings
    method: Method
    student: Denoiser
    iteration: int
    prompt: str | None
    process: "PartialState | Accelerator"


@dataclass(frozen=True)
class Exported:
    """Folders in a run's: a pipeline for diffusers, and adapters if it trained adapters."""

    pipeline: Path
    lora: Path | None


@dataclass(frozen=True)
class Run:
    """Result of a run.

    Attributes:
        folder: of the run.
        iteration: iterations that are done.
        finished: False where a SIGTERM has stopped it: go on with checkpoint.resume=latest.
        exported: None where it was stopped.
        scores: rows of evaluation.json; none without `evaluate`.
    """

    folder: Path
    iteration: int
    finished: bool
    exported: Exported | None = None
    scores: Sequence[Row] = field(default_factory=tuple)

    @cached_property
    def pipeline(self) -> DiffusionPipeline:
        """The exported pipeline, on the CPU. Raises MissingError where the run was stopped before its export."""
        if self.exported is None:
            raise MissingError("run", f"{self.folder}, stopped at iteration {self.iteration}", "a run that has ended")
        with quiet():
            return DiffusionPipeline.from_pretrained(self.exported.pipeline)


def run(
    config: RunSettings,
    method: type[Method] | None = None,
    *,
    teacher: Teacher | None = None,
    source: Source | None = None,
    callbacks: Sequence[Callback] = (),
) -> Run:
    """Train as the settings say, export the student, score it beside its teacher.

    Args:
        method: class of the method; None = the one that `method.name` names.
        teacher, source: those of the settings, if None.
        callbacks: called at lines of the log, at checkpoints and at the end.

    Raises:
        FewstepError: for wrong input, too many updates that are not finite, and too little memory. Whatever is wrong in the
            settings alone is found before any weight is loaded, whatever would fail after training, before it.
        ExportError: the exported pipeline does not do what the student does.
    """
    try:
        built = build(check(config, method), teacher, source, callbacks)
        trained = train(built)
        if trained is None:
            ended = Run(config.output_dir, built.trainer.iteration, finished=False)
        else:
            exported = export(trained)
            ended = Run(config.output_dir, trained.iteration, True, exported, score(built))
    except torch.OutOfMemoryError as error:
        raise FewstepError(
            "batch_size", f"{config.batch_size}, and no memory left", "a lower one",
            f"Raise train.accumulate by as much. {error}",
        ) from error  # fmt: skip
    if built.trainer.accelerator.is_main_process:
        for callback in callbacks:
            callback.on_end(ended)
    return ended


def check(config: RunSettings, method: type[Method] | None = None) -> Checked:
    """Find what is wrong in the settings before any weight is loaded. Raises FewstepError."""
    method = method or method_class(config.method.name)
    check_config(config)
    return Checked(config, method)


def build(
    checked: Checked,
    teacher: Teacher | None = None,
    source: Source | None = None,
    callbacks: Sequence[Callback] = (),
) -> Built:
    """Load teacher and data, make the method and its trainer; write config.yaml. Raises FewstepError."""
    config = checked.config
    teacher = teacher or load_teacher(config.teacher)
    scoring = Scoring.of(config, teacher) if config.evaluate else None  # before adapters come into its network
    source = source or load_source(config.data, teacher.image_size)
    method = checked.method(config.method, teacher)
    check_built(config, method)
    trainer = Trainer(config, method, teacher, source, callbacks=callbacks)
    if config.checkpoint.resume:
        trainer.resume(config.checkpoint.resume)
    if trainer.accelerator.is_main_process:
        io.write_text(dump_config(config, _versions()), config.output_dir / "config.yaml")
        if scoring is not None and scoring.earlier.words:
            print(f"teacher's scores: {scoring.earlier.words}; others are measured after the training")
    return Built(config, source, trainer, scoring)


def train(built: Built) -> Trained | None:
    """Train to the end; None where a SIGTERM has stopped it after a checkpoint."""
    trainer = built.trainer
    if not trainer.fit():
        if trainer.accelerator.is_main_process:
            print(f"stopped at iteration {trainer.iteration}; go on with checkpoint.resume=latest")
        return None
    placement = trainer.teacher.placement
    placement.onload()
    placement.recall(placement.parts)  # the loop is over, and the pipeline itself will be called
    main = trainer.accelerator.is_main_process
    student = trainer.exported_weights() if main else trainer.average
    prompt = example_prompt(built.source)
    return Trained(built.config, trainer.method, student, trainer.iteration, prompt, trainer.accelerator)


def export(trained: Trained) -> Exported:
    """Write the student's stock pipeline, and its adapters; both are verified in plain diffusers. On the main process."""
    config, method = trained.config, trained.method
    folder, lora = config.output_dir, config.train.lora is not None
    exported = Exported(folder / "pipeline", folder / "lora" if lora else None)
    if trained.process.is_main_process:
        card = {
            "method": method.name, "paper": method.paper, "teacher": config.teacher, "data": config.data.source,
            "iterations": trained.iteration, "versions": _versions(),
        }  # fmt: skip
        card |= {} if trained.prompt is None else {"prompt": trained.prompt}
        export_pipeline(
            method.teacher, trained.student, method.scheduler(), exported.pipeline,
            allowed_steps=method.allowed_steps(), guidance=method.student_guidance, dtype=config.export.dtype, card=card,
        )  # fmt: skip
        print(f"exported {exported.pipeline}: opens in plain diffusers, checked against the trained student")
        if exported.lora is not None:
            export_lora(
                method.teacher, trained.student, method.scheduler(), exported.lora, base=locate(config.teacher),
                allowed_steps=method.allowed_steps(), guidance=method.student_guidance, dtype=config.export.dtype, card=card,
            )  # fmt: skip
            print(
                f"exported {exported.lora}: adapters for {config.teacher} in diffusers and in ComfyUI, checked likewise"
            )
    trained.process.wait_for_everyone()
    return exported


def score(built: Built) -> Sequence[Row]:
    """Score student and teacher, as `evaluate` says; nothing without it."""
    trainer = built.trainer
    if built.scoring is None:
        return ()
    return built.scoring.run(trainer.teacher, trainer.accelerator, trainer.method.student_guidance)


def export_run(folder: Path, method: type[Method] | None = None) -> Exported:
    """Export again from a run's folder: the newest checkpoint, or the best weights by score, where there were scores.

    method: its class; None = the one that config.yaml names. Raises FewstepError, MissingError for no checkpoint.
    """
    return export(load_trained(folder, method))


def load_trained(folder: Path, method: type[Method] | None = None) -> Trained:
    """The student of a run's folder, as `train` returns it."""
    config = load_run(folder / "config.yaml").model_copy(update={"output_dir": folder})
    found = ckpt.checkpoints(folder / "checkpoints")
    if not found:
        raise MissingError("run", f"{folder}, which has no checkpoint", "a run with one")
    state: ckpt.StateFile = io.read_json(found[-1] / "state.json")
    teacher, process = load_teacher(config.teacher), Accelerator()
    teacher.placement.to(process.device, io.torch_dtype(config.train.base_dtype))
    if config.train.lora is not None:
        teacher.students.adapt(config.train.lora)
    own = (method or method_class(config.method.name))(config.method, teacher)
    student = own.roles()["student"].net.to(process.device)
    assert isinstance(student, Denoiser)
    best = bool(state["best"]) and (folder / BEST).exists()
    ckpt.load_module(student, folder / BEST if best else found[-1] / f"{AVERAGE}.safetensors")
    student.requires_grad_(False).eval()
    held = config.data.source == "memory"  # by the caller, then
    prompt = None if held else example_prompt(load_source(config.data, teacher.image_size))
    return Trained(config, own, student, state["iteration"], prompt, process)


def example_prompt(source: Source) -> str | None:
    """A prompt that the student was trained on; None for sources of none."""
    return str(source.conditions_at([0])[0]) if source.conditions == "prompt" else None


def _versions() -> dict[str, str]:
    return io.versions("torch", "diffusers", "transformers", "accelerate")
