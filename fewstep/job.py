"""The main job: a config in, a trained, exported and scored student out."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.config import RunConfig, dump_config

if TYPE_CHECKING:
    from fewstep.data import Source
    from fewstep.methods.base import Method
    from fewstep.teachers import Teacher


def run(method: "type[Method]", config: RunConfig[Any]) -> None:
    """Train `method` as the config says, export the student, score it beside its teacher.

    Errors that a user can mend end the program with one sentence.
    """
    import torch

    from fewstep.export import ExportError
    from fewstep.trainer import NonFiniteError

    try:
        _run(method, config)
    except (ValueError, OSError, NonFiniteError, ExportError) as error:
        sys.exit(str(error))
    except torch.OutOfMemoryError as error:
        sys.exit(f"out of memory: lower batch_size and raise accumulate by as much. {error}")


def _run(method_class: "type[Method]", config: RunConfig[Any]) -> None:
    from fewstep.data import load_source
    from fewstep.export import export
    from fewstep.lora_export import export_lora
    from fewstep.preflight import check_conditions, check_guidance, check_steps, check_surroundings
    from fewstep.teachers import load_teacher, locate
    from fewstep.trainer import Trainer

    check_surroundings(config)
    teacher = load_teacher(config.teacher)
    source = load_source(config.data, teacher.image_size)
    method = method_class(config.method, teacher)
    check_steps(config, method)
    check_guidance(config, method)
    check_conditions(config, teacher.pipeline)
    trainer = Trainer(config, method, teacher, source)
    folder = Path(config.output_dir)
    main = trainer.accelerator.is_main_process
    if config.resume:
        trainer.resume(config.resume)
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(dump_config(config, versions()))
    if not trainer.fit():
        if main:
            print(f"stopped at iteration {trainer.iteration}; go on with resume=latest")
        return
    teacher.settle()
    teacher.recall(teacher.text_parts + teacher.image_parts)  # the loop is over, and the pipeline itself will be called
    if main:
        student = trainer.exported_weights()
        card = {
            "method": method.name, "paper": method.paper, "teacher": config.teacher, "data": config.data.source,
            "iterations": trainer.iteration, "versions": versions(), **_example(source),
        }  # fmt: skip
        export(
            teacher, student, method.scheduler(), folder / "pipeline",
            allowed_steps=method.allowed_steps(), guidance_scale=method.export_guidance_scale,
            keeps_guidance=method.keeps_guidance, dtype=config.export_dtype, card=card,
        )  # fmt: skip
        print(f"exported {folder / 'pipeline'}: opens in plain diffusers, checked against the trained student")
        if config.student == "lora":
            export_lora(
                teacher, student, method.scheduler(), folder / "lora", base=locate(config.teacher),
                allowed_steps=method.allowed_steps(), guidance_scale=method.export_guidance_scale,
                dtype=config.export_dtype, card=card,
            )  # fmt: skip
            print(
                f"exported {folder / 'lora'}: adapters for {config.teacher} in diffusers and in ComfyUI, checked likewise"
            )
    trainer.accelerator.wait_for_everyone()
    if config.evaluate:
        _evaluate(config, teacher, trainer.accelerator, method.keeps_guidance)


def _example(source: "Source") -> dict[str, str]:
    """The prompt of the model card's example: one that the student was trained on."""
    return {"prompt": source.conditions_at([0])[0]} if source.conditions == "prompt" else {}


def _evaluate(config: RunConfig[Any], teacher: "Teacher", accelerator: Any, keeps_guidance: bool) -> None:
    from diffusers import DiffusionPipeline

    from fewstep.evaluate import evaluate, format_table, protocol, recommended_guidance_scale, write_report
    from fewstep.export import update_card
    from fewstep.teachers import quiet
    from fewstep.validation import student_guidance_scale

    e = config.evaluate
    assert e is not None  # the caller asked
    folder = Path(config.output_dir)
    with quiet():
        student = DiffusionPipeline.from_pretrained(folder / "pipeline").to(accelerator.device)
    asked: dict[str, Any] = {
        "reference": e.reference, "features": e.features, "clip": e.clip, "prompts": e.prompts,
        "num_images": e.num_images, "batch_size": e.batch_size, "seed": config.seed,
    }  # fmt: skip
    common = {**asked, "accelerator": accelerator}
    scale = e.teacher_guidance_scale
    scale = recommended_guidance_scale(config.teacher) if scale is None else scale
    own = student_guidance_scale(config, teacher, keeps_guidance)
    results = evaluate(student, name="student", steps=e.steps, guidance_scale=own, **common)
    results += evaluate(teacher.pipeline, name="teacher", steps=e.teacher_steps, guidance_scale=scale, **common)
    if accelerator.is_main_process:
        named = protocol(**asked)
        write_report(folder / "evaluation.json", named, results)
        update_card(folder / "pipeline", results, named)
        print(format_table(results))
        _picture(config, teacher, student, scale, own)


def _picture(config: RunConfig[Any], teacher: "Teacher", student: Any, scale: float | None, own: float | None) -> None:
    """Teacher and student side by side, from the same noises: samples/comparison.png."""
    from fewstep.evaluate import first_images, grid

    e = config.evaluate
    assert e is not None  # the caller asked
    rows, labels = [], []
    shown: dict[str, Any] = {"reference": e.reference, "features": e.features, "prompts": e.prompts}
    for name, pipeline, steps, guidance in (
        ("teacher", teacher.pipeline, e.teacher_steps, scale),
        ("student", student, e.steps, own),
    ):
        for n in steps:
            rows.append(first_images(pipeline, **shown, steps=n, count=10, seed=config.seed, guidance_scale=guidance))
            labels.append(f"{name} {n}")
    folder = Path(config.output_dir) / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    grid(rows, labels).save(folder / "comparison.png")
    print(f"pictures: {folder / 'comparison.png'}")


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("fewstep", "torch", "diffusers", "transformers", "accelerate")}
