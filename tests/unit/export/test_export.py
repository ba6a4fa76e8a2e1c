"""Export: what is written is what was trained, in plain diffusers, or nothing is written."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from builders.teachers import perturbed
from fewstep.export import ExportError, export, update_card
from fewstep.io import torch_dtype
from fewstep.teachers import load_teacher
from fewstep.teachers.students import StudentGuidance

CARD = {"method": "consistency", "paper": "arXiv 2310.04378", "teacher": "fashion", "data": "none", "prompt": "a bag"}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def exported(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with a scale of 2, for 1 to 8 steps, in fp32; not to be changed."""
    teacher = load_teacher(str(tiny_sd))
    return export(
        teacher, perturbed(teacher, True), teacher.samplers.renoise(8), tmp_path_factory.mktemp("run") / "pipeline",
        allowed_steps=(1, 2, 4, 8), guidance=StudentGuidance(2.0), card=CARD,
    )  # fmt: skip


def test_stock_diffusers_draws_the_student(tiny_sd: Path, exported: Path) -> None:
    from diffusers import DiffusionPipeline

    assert [p.name for p in exported.parent.iterdir()] == ["pipeline"]
    assert not [p for p in exported.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
    teacher = load_teacher(str(tiny_sd))
    stock = DiffusionPipeline.from_pretrained(exported)
    memory = teacher.students.pipeline(perturbed(teacher, True), teacher.samplers.renoise(8), 2.0)
    for pipeline in (stock, memory):
        pipeline.set_progress_bar_config(disable=True)
    images = [
        pipeline("a shoe", num_inference_steps=4, generator=torch.Generator().manual_seed(3), output_type="np").images
        for pipeline in (stock, memory)
    ]
    np.testing.assert_allclose(*images, atol=1e-5)
    assert stock.scheduler.timesteps.tolist() == [999, 749, 499, 249]
    with pytest.raises(ValueError):
        stock("a bag", num_inference_steps=9)


@pytest.mark.parametrize("dtype", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_half_precision_is_that_of_the_copy_alone(tiny_sd: Path, tmp_path: Path, dtype: str) -> None:
    teacher = load_teacher(str(tiny_sd))
    path = export(
        teacher, perturbed(teacher, True), teacher.samplers.renoise(8), tmp_path / "pipeline", allowed_steps=(1, 2, 4, 8),
        guidance=StudentGuidance(2.0), dtype=dtype, card=CARD,
    )  # fmt: skip
    assert teacher.pipeline.vae.dtype == torch.float32
    file = path / "unet" / "diffusion_pytorch_model.safetensors"
    assert {v.dtype for v in load_file(file).values()} == {torch_dtype(dtype)}


def test_pixels(tiny_ddpm_grey: Path, tmp_path: Path) -> None:
    teacher = load_teacher(str(tiny_ddpm_grey))
    path = export(
        teacher,
        perturbed(teacher, False),
        teacher.samplers.renoise(2),
        tmp_path / "pipeline",
        allowed_steps=(1, 2),
        card={},
    )
    assert "DDPMPipeline" in (path / "model_index.json").read_text()


def test_a_failed_export_keeps_the_old_one(tiny_sd: Path, exported: Path, tmp_path: Path) -> None:
    teacher, path = load_teacher(str(tiny_sd)), Path(shutil.copytree(exported, tmp_path / "pipeline"))
    before = tree(path)
    # A grid of 8 runs 5 steps, for which this student was not trained.
    with pytest.raises(ExportError, match="num_inference_steps=5: found images; expected an error"):
        export(teacher, teacher.students.new(), teacher.samplers.renoise(8), path, allowed_steps=(1, 2, 4), card=CARD)
    # A grid of 2 cannot run 4.
    with pytest.raises(ExportError, match="num_inference_steps=4: found an error"):
        export(teacher, teacher.students.new(), teacher.samplers.renoise(2), path, allowed_steps=(4,), card=CARD)
    assert tree(path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["pipeline"]
    # A student that draws NaN compares equal to nothing.
    student = teacher.students.new()
    with torch.no_grad():
        next(student.parameters()).fill_(float("nan"))
    with pytest.raises(ExportError, match="other pixels"):
        export(teacher, student, teacher.samplers.renoise(4), path, allowed_steps=(4,), card=CARD)
    assert tree(path) == before
    export(teacher, perturbed(teacher, False), teacher.samplers.renoise(4), path, allowed_steps=(1, 2, 4), card=CARD)
    assert tree(path) != before


def test_arguments_are_checked_first(tiny_sd: Path, tmp_path: Path) -> None:
    teacher = load_teacher(str(tiny_sd))
    arguments = (teacher, teacher.students.new(), teacher.samplers.renoise(4), tmp_path / "pipeline")
    with pytest.raises(ValueError, match="export_dtype: found 'fp8'"):
        export(*arguments, allowed_steps=(4,), dtype="fp8", card=CARD)
    with pytest.raises(ValueError, match="allowed_steps"):
        export(*arguments, allowed_steps=(), card=CARD)
    assert not list(tmp_path.iterdir())


def test_card_tells_what_each_count_runs(exported: Path) -> None:
    """Eight milestones, and for each count those that the folder's own scheduler runs."""
    from diffusers import LCMScheduler

    text, scheduler = (exported / "README.md").read_text(), LCMScheduler.from_pretrained(exported / "scheduler")
    assert "`LCMScheduler` with `original_inference_steps` 8 runs" in text
    found = {
        int(n): [int(t) for t in told.split(",")] for n, told in re.findall(r"^\| (\d) \| (999.*) \|$", text, re.M)
    }
    assert list(found) == [1, 2, 4, 8]
    for count, told in found.items():
        scheduler.set_timesteps(count)
        assert told == scheduler.timesteps.tolist()


def test_card(exported: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(exported, tmp_path / "pipeline"))
    text = (path / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "apache-2.0"
    assert front["base_model"] == "fashion"
    assert "consistency" in front["tags"]
    for part in (
        "arXiv 2310.04378",
        "1, 2, 4, 8",
        "pipeline('a bag', num_inference_steps=4)",
        "guidance_scale",
        "torch",
    ):
        assert part in text
    rows = [
        {"model": "student", "steps": 4, "guidance_scale": None, "fid": 12.3456, "clip_score": 0.3},
        {"model": "teacher", "steps": 50, "guidance_scale": 2.0, "fid": 9.0, "clip_score": 0.3},
    ]
    for fid in (12.3456, 11.0):
        update_card(path, [rows[0] | {"fid": fid}, rows[1]], {"images": 500})
    text = (path / "README.md").read_text()
    assert "| student | 4 |  | 11 | 0.3 |" in text
    assert "12.35" not in text
    assert text.count("## Scores") == 1
    (path / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="scores"):
        update_card(path, rows)
