"""Scores of a teacher that are taken from an earlier report."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from builders import changed
from fewstep.assets import asset_path
from fewstep.cli.main import main
from fewstep.config import RunConfig
from fewstep.evaluate import earlier_rows, evaluate, fingerprints, protocol
from fewstep.methods.consistency.lcm import LCM
from fewstep.methods.consistency.method_settings import LcmSettings
from fewstep.teachers import load_teacher
from fewstep.training.run import run

IMAGES = 3
SETTINGS: dict[str, Any] = {"reference": "fashion", "num_images": IMAGES}


@pytest.fixture(scope="module")
def report(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two step counts by the command, with scores that no measurement gives."""
    file = tmp_path_factory.mktemp("earlier") / "teacher.json"
    command = ["evaluate", str(tiny_sd), "--reference", "fashion", "--num-images", str(IMAGES)]
    main([*command, "--steps", "1", "2", "--guidance-scale", "1.5", "--output", str(file)])
    found = json.loads(file.read_text())
    for row in found["results"]:
        row |= {"fid": 1000.0 + row["steps"], "clip_score": 1.0, "seconds_per_image": 1000.0}
    file.write_text(json.dumps(found))
    return file


def _config(teacher: Path, folder: Path, earlier: Path, **changes: Any) -> RunConfig[LcmSettings]:
    values: dict[str, Any] = {
        "teacher": str(teacher), "output_dir": str(folder), "data": {"source": "fashion", "limit": 4},
        "method": {"optim": {"lr": 1e-4}, "steps": 1, "guidance": {"range": [1.0, 2.0], "export_scale": 1.5}},
        "max_iterations": 1, "batch_size": 2, "train": {"cpu_threads": 1},
        "evaluate": {
            "steps": [1], "teacher_steps": [3, 2, 1], "num_images": IMAGES, "batch_size": 2,
            "teacher_guidance_scale": 1.5, "teacher_from": str(earlier),
        },
    }  # fmt: skip
    return RunConfig[LcmSettings].model_validate(changed(values, changes))


def test_a_run_takes_the_teachers_scores_and_measures_the_others_and_the_time(
    tiny_sd: Path, tmp_path: Path, report: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(_config(tiny_sd, tmp_path / "run", report, train={"student": {"kind": "lora"}}), LCM)
    shown = capsys.readouterr().out
    assert (
        shown.count(f"teacher's scores: {report} has them at 2, 1 steps") == 2
    )  # before the training, and below the table
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    rows = [row for row in found["results"] if row["model"] == "teacher"]
    assert [row["steps"] for row in rows] == [3, 2, 1]
    assert [row["fid"] for row in rows[1:]] == [1002.0, 1001.0] and rows[0]["fid"] != 1003.0
    assert [row.get("scores_from") for row in rows] == [None, str(report), str(report)]
    assert [row["network_evaluations"] for row in rows] == [6, 4, 2]
    assert all(0 < row["seconds_per_image"] < 1000 and row["images"] == IMAGES for row in rows)
    # What the run writes serves the next one as well, also where adapters are in the teacher's network by now.
    own = fingerprints(load_teacher(str(tiny_sd)).pipeline)
    again = earlier_rows(str(tmp_path / "run" / "evaluation.json"), protocol(**SETTINGS), own, 1.5, (1, 2, 3))
    assert list(again.rows) == [1, 2, 3]


def test_what_scores_depend_on_must_be_the_same(tiny_sd: Path, report: Path) -> None:
    pipeline = load_teacher(str(tiny_sd)).pipeline
    own = fingerprints(pipeline)

    def words(rows: int, own: dict[str, str] = own, scale: float | None = 1.5, **changes: Any) -> str:
        found = earlier_rows(str(report), protocol(**SETTINGS | changes), own, scale, (1, 2))
        assert len(found.rows) == rows
        return found.words

    words(2)
    words(2, batch_size=7)
    assert "found images 3; expected 4" in words(0, num_images=4)
    assert "found seed 0; expected 1" in words(0, seed=1)
    assert "found guidance 1.5; expected None" in words(0, scale=None)
    words(2, {key: value for key, value in own.items() if key != "text_encoder"})  # behind a cache
    assert "no scores of this pipeline" in words(0, {key: value for key, value in own.items() if key != "unet"})
    pipeline.scheduler.register_to_config(timestep_spacing="leading")
    assert "no scores of this pipeline" in words(0, fingerprints(pipeline))
    for name in ("unet", "vae", "text_encoder"):
        pipeline = load_teacher(str(tiny_sd)).pipeline
        with torch.no_grad():
            next(pipeline.components[name].parameters()).flatten()[0] += 1e-3
        assert "no scores of this pipeline" in words(0, fingerprints(pipeline))


@pytest.mark.parametrize("content", [None, "{", "[]", '{"protocol": {}}', '{"protocol": {}, "results": [1]}'])
def test_what_is_no_report_is_reported_before_the_training(content: str | None, tiny_sd: Path, tmp_path: Path) -> None:
    file = tmp_path / "earlier.json"
    if content is not None:
        file.write_text(content)
    said = r"a file that cannot be read \(No such file" if content is None else "expected a report of scores"
    with pytest.raises(ValueError, match=rf"evaluate\.teacher_from: found {file}, .*{said}"):
        run(_config(tiny_sd, tmp_path / "run", file), LCM)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_the_report_in_the_package_is_of_its_teacher() -> None:
    pipeline = load_teacher("fashion").pipeline
    wanted = protocol(reference="fashion", num_images=2000)
    found = earlier_rows("fashion", wanted, fingerprints(pipeline), 1.5, (1, 2, 3, 4, 6, 8, 50))
    assert list(found.rows) == [1, 2, 3, 4, 6, 8, 50], found.words
    assert json.loads((asset_path("fashion") / "evaluation.json").read_text())["protocol"]["pipeline"] == "fashion"


@pytest.mark.slow
def test_the_scores_in_the_package_are_found_again() -> None:
    pipeline = load_teacher("fashion").pipeline
    wanted = protocol(reference="fashion", num_images=2000)
    found = earlier_rows("fashion", wanted, fingerprints(pipeline), 1.5, (1, 4))
    rows = evaluate(pipeline, name="t", reference="fashion", steps=(1, 4), num_images=2000, guidance_scale=1.5)
    for again in rows:
        for key in ("fid", "clip_score"):
            assert again[key] == pytest.approx(found.rows[again["steps"]][key], rel=1e-3)
