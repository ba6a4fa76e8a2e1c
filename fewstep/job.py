"""The main job: a config in, a trained, exported and scored student out."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
    known = _known(config, teacher) if config.evaluate else None
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
        if known is not None and known.words:
            print(f"teacher's scores: {known.words}; others are measured after the training")
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
    if known is not None:
        _evaluate(config, teacher, known, trainer.accelerator, method.keeps_guidance)


def _example(source: "Source") -> dict[str, str]:
    """The prompt of the model card's example: one that the student was trained on."""
    return {"prompt": source.conditions_at([0])[0]} if source.conditions == "prompt" else {}


class _Known(NamedTuple):
    """What is known of the teacher before the training: what it is, and scores of it that need not be measured."""

    fingerprints: dict[str, str]
    rows: dict[int, dict[str, Any]]
    words: str


def _asked(config: RunConfig[Any]) -> dict[str, Any]:
    e = config.evaluate
    assert e is not None  # the caller asked
    return {
        "reference": e.reference, "features": e.features, "clip": e.clip, "prompts": e.prompts,
        "num_images": e.num_images, "batch_size": e.batch_size, "seed": config.seed,
    }  # fmt: skip


def _known(config: RunConfig[Any], teacher: "Teacher") -> _Known:
    """Taken now: adapters may come into the teacher's network, and what cannot be read is told before the training."""
    from fewstep.evaluate import earlier_rows, fingerprints, protocol
    from fewstep.validation import teacher_guidance_scale

    e = config.evaluate
    assert e is not None  # the caller asked
    own = fingerprints(teacher.pipeline)
    if e.teacher_from is None:
        return _Known(own, {}, "")
    try:
        found = earlier_rows(
            e.teacher_from, protocol(**_asked(config)), own, teacher_guidance_scale(config), e.teacher_steps
        )
    except ValueError as error:
        raise ValueError(f"evaluate.teacher_from: {error}") from None
    return _Known(own, found.rows, found.words)


def _evaluate(
    config: RunConfig[Any], teacher: "Teacher", known: _Known, accelerator: Any, keeps_guidance: bool
) -> None:
    from diffusers import DiffusionPipeline

    from fewstep.evaluate import evaluate, fingerprints, format_table, protocol, write_report
    from fewstep.export import update_card
    from fewstep.teachers import quiet
    from fewstep.validation import student_guidance_scale, teacher_guidance_scale

    e = config.evaluate
    assert e is not None  # the caller asked
    folder = Path(config.output_dir)
    with quiet():
        student = DiffusionPipeline.from_pretrained(folder / "pipeline").to(accelerator.device)
    asked = _asked(config)
    scale, own = teacher_guidance_scale(config), student_guidance_scale(config, teacher, keeps_guidance)
    results = evaluate(student, name="student", steps=e.steps, guidance_scale=own, accelerator=accelerator, **asked)
    results = [row | {"fingerprints": fingerprints(student)} for row in results]
    results += _teacher_rows(config, teacher, known, scale, accelerator)
    if accelerator.is_main_process:
        named = protocol(**asked)
        write_report(folder / "evaluation.json", named, results)
        update_card(folder / "pipeline", results, named)
        print(format_table(results))
        if known.rows:
            print(f"teacher's scores: {known.words}; its time is measured here")
        _picture(config, teacher, student, scale, own)


def _teacher_rows(
    config: RunConfig[Any], teacher: "Teacher", known: _Known, scale: float | None, accelerator: Any
) -> list[dict[str, Any]]:
    """One for each of `evaluate.teacher_steps`. Where the scores are known, one batch a process shows what they cost."""
    from fewstep.evaluate import COSTS, evaluate

    e, asked = config.evaluate, _asked(config)
    assert e is not None  # the caller asked
    brief = asked | {"num_images": max(2, min(e.num_images, e.batch_size * accelerator.num_processes))}
    rows: dict[int, dict[str, Any]] = {}
    for these, wanted in (
        ([n for n in e.teacher_steps if n not in known.rows], asked),
        ([n for n in e.teacher_steps if n in known.rows], brief),
    ):
        if these:
            drawn = evaluate(
                teacher.pipeline, name="teacher", steps=these, guidance_scale=scale, accelerator=accelerator, **wanted
            )
            rows |= {row["steps"]: row for row in drawn}
    for n, row in known.rows.items():
        rows[n] = row | {"model": "teacher"} | {key: rows[n][key] for key in COSTS}
    return [rows[n] | {"fingerprints": known.fingerprints} for n in e.teacher_steps]


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
