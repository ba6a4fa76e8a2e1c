"""The main job: a config in, a trained, exported and scored student out."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep import io
from fewstep.config import RunConfig, dump_config

if TYPE_CHECKING:
    from fewstep.data import Source
    from fewstep.methods.base import Method


def run(method: "type[Method]", config: RunConfig[Any]) -> None:
    """Train `method` as the config says, export the student, score it beside its teacher.

    Errors that a user can mend end the program with one sentence.
    """
    import torch

    from fewstep.export.pipeline import ExportError
    from fewstep.training.trainer import NonFiniteError

    try:
        _run(method, config)
    except (ValueError, OSError, NonFiniteError, ExportError) as error:
        sys.exit(str(error))
    except torch.OutOfMemoryError as error:
        sys.exit(f"out of memory: lower batch_size and raise accumulate by as much. {error}")


def _run(method_class: "type[Method]", config: RunConfig[Any]) -> None:
    from fewstep.data import load_source
    from fewstep.export.lora import export_lora
    from fewstep.export.pipeline import export
    from fewstep.teachers import load_teacher, locate
    from fewstep.training.final_scores import Scoring
    from fewstep.training.preflight import check_conditions, check_guidance, check_steps, check_surroundings
    from fewstep.training.trainer import Trainer

    check_surroundings(config)
    teacher = load_teacher(config.teacher)
    scoring = Scoring.of(config, teacher) if config.evaluate else None
    source = load_source(config.data, teacher.image_size)
    method = method_class(config.method, teacher)
    check_steps(config, method)
    check_guidance(config, method)
    check_conditions(config, teacher.pipeline)
    trainer = Trainer(config, method, teacher, source)
    folder = Path(config.output_dir)
    main = trainer.accelerator.is_main_process
    if config.checkpoint.resume:
        trainer.resume(config.checkpoint.resume)
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(dump_config(config, versions()))
        if scoring is not None and scoring.earlier.words:
            print(f"teacher's scores: {scoring.earlier.words}; others are measured after the training")
    if not trainer.fit():
        if main:
            print(f"stopped at iteration {trainer.iteration}; go on with checkpoint.resume=latest")
        return
    teacher.placement.onload()
    teacher.placement.recall(teacher.placement.parts)  # the loop is over, and the pipeline itself will be called
    if main:
        student = trainer.exported_weights()
        card = {
            "method": method.name, "paper": method.paper, "teacher": config.teacher, "data": config.data.source,
            "iterations": trainer.iteration, "versions": versions(), **_example(source),
        }  # fmt: skip
        export(
            teacher, student, method.scheduler(), folder / "pipeline",
            allowed_steps=method.allowed_steps(), guidance_scale=method.export_guidance_scale,
            keeps_guidance=method.keeps_guidance, dtype=config.export.dtype, card=card,
        )  # fmt: skip
        print(f"exported {folder / 'pipeline'}: opens in plain diffusers, checked against the trained student")
        if config.train.lora is not None:
            export_lora(
                teacher, student, method.scheduler(), folder / "lora", base=locate(config.teacher),
                allowed_steps=method.allowed_steps(), guidance_scale=method.export_guidance_scale,
                dtype=config.export.dtype, card=card, keeps_guidance=method.keeps_guidance,
            )  # fmt: skip
            print(
                f"exported {folder / 'lora'}: adapters for {config.teacher} in diffusers and in ComfyUI, checked likewise"
            )
    trainer.accelerator.wait_for_everyone()
    if scoring is not None:
        scoring.run(teacher, trainer.accelerator, method.keeps_guidance)


def _example(source: "Source") -> dict[str, str]:
    """The prompt of the model card's example: one that the student was trained on."""
    return {"prompt": str(source.conditions_at([0])[0])} if source.conditions == "prompt" else {}


def versions() -> dict[str, str]:
    return io.versions("torch", "diffusers", "transformers", "accelerate")
