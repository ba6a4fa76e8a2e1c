"""A run that cannot end well does not begin."""

from pathlib import Path
from typing import Any

import pytest

from builders import changed
from builders.families import build_dit
from fewstep.config import RunConfig
from fewstep.errors import FewstepError
from fewstep.methods.consistency.lcm import LCM
from fewstep.methods.consistency.method_settings import LcmSettings
from fewstep.training.run import run


def message(pipeline: Path, folder: Path, **changes: Any) -> str:
    values = {
        "teacher": str(pipeline), "output_dir": str(folder / "run"), "data": {"source": "fashion", "limit": 4},
        "method": {"optim": {"lr": 1e-4}, "grid": {"kind": "even", "points": 40}, "steps": 8},
        "max_iterations": 1, "batch_size": 2,
        "train": {"cpu_threads": 1},
    }  # fmt: skip
    with pytest.raises((ValueError, OSError)) as e:
        run(RunConfig[LcmSettings].model_validate(changed(values, changes)), LCM)
    assert not (folder / "run" / "config.yaml").exists(), "the run has begun"
    return str(e.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"teacher": "./nowhere"}, "teacher: found './nowhere'; expected a folder"),
        ({"checkpoint": {"resume": "latest"}}, "checkpoint.resume: found latest with no checkpoint in "),
        (
            {"checkpoint": {"resume": "x"}},
            "checkpoint.resume: found x, which has no state.json; expected a checkpoint's folder",
        ),
        (
            {"train": {"init_from": "x"}},
            "train.init_from: found x, which is not a folder; expected a checkpoint or a pipeline. Run first what ",
        ),
        ({"log": {"tracker": "wandbb"}}, "log.tracker: found 'wandbb', unknown to accelerate; expected 'wandb'"),
        ({"log": {"tracker": "xyz"}}, "log.tracker: found 'xyz', unknown to accelerate; expected one of aim, "),
        (
            {"evaluate": {"reference": "coco"}},
            "evaluate.reference: found 'coco'; expected fashion, a path of statistics",
        ),
        ({"evaluate": {"steps": (4, 16, 32)}}, "evaluate.steps: found 16, 32; expected some of 1, 2, 3, "),
        (
            {"score": {"every": 1, "reference": "coco"}},
            "score.reference: found 'coco'; expected fashion, a path of statistics",
        ),
        ({"score": {"every": 1, "steps": 9}}, "score.steps: found 9; expected some of 1, 2, 3, "),
        (
            {"evaluate": {"reference": "."}},
            "evaluate.features: found none for reference '.'; expected those that it was made in",
        ),
        (
            {"evaluate": {"reference": ".", "features": "fashion"}},
            "evaluate.prompts: found none (the protocol's conditions are labels); expected prompts for this pipeline",
        ),
        (
            {"score": {"every": 1, "reference": ".", "features": "fashion", "prompts": "nowhere.txt"}},
            "score.prompts: found 'nowhere.txt'; expected a file",
        ),
        ({"data": {"source": "folder", "path": "x"}}, "data.path: found 'x'; expected a folder of images"),
    ],
)
def test_reported_before_the_training(changes: Any, expected: str, tiny_sd: Path, tmp_path: Path) -> None:
    text = message(tiny_sd, tmp_path, **changes)
    assert text.startswith(expected) and "\n" not in text


def test_a_teacher_that_cannot_be_guided_is_not_to_be_drawn_so(tmp_path: Path) -> None:
    """DiTPipeline has a null label of its own; what is scored or shown under guidance ended in an IndexError after training."""
    folder = build_dit(tmp_path / "dit", num_labels=10)
    method = {"optim": {"lr": 1e-4}, "guidance": {"range": [3.0, 15.0], "export_scale": 4.0}}
    data = {"source": "fashion", "num_labels": 10}
    for more in ({"evaluate": {"prompts": None}}, {"log": {"samples_every": 1}}):
        text = message(folder, tmp_path, data=data, method=method, **more)
        assert text.startswith(
            "evaluate.teacher_guidance_scale: found 4 by default; expected 1, for DiTPipeline guides away from label 1000"
        )
        assert text.endswith("Set evaluate.teacher_guidance_scale to 1")


def test_adapters_have_one_guidance_scale(tiny_sd: Path, tmp_path: Path) -> None:
    method = {"optim": {"lr": 1e-4}, "steps": 2, "guidance": {"range": [3.0, 15.0], "export_scale": [4.0, 5.0]}}
    text = message(tiny_sd, tmp_path, method=method, train={"student": {"kind": "lora"}})
    assert text.startswith("method.guidance.export_scale: found a scale for each step; expected one number")


def test_output_that_cannot_be_written(tiny_sd: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        text = message(tiny_sd, tmp_path, output_dir=str(folder))
        assert text.startswith(f"output_dir: found {folder}, and ") and "\n" not in text


def test_the_folder_of_an_earlier_run(tiny_sd: Path, tmp_path: Path) -> None:
    earlier = tmp_path / "run" / "checkpoints" / "500"
    earlier.mkdir(parents=True)
    (earlier / "state.json").write_text("{}")
    text = message(tiny_sd, tmp_path)
    assert text.startswith(
        f"output_dir: found {tmp_path / 'run'}, with a run that reached iteration 500; expected a folder"
    )
    assert "checkpoint.resume=latest" in text


def test_tracker_that_is_not_installed(tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    assert (
        message(tiny_sd, tmp_path, log={"tracker": "comet_ml"})
        == "log.tracker: found comet_ml, which is not installed; expected an installed tracker. pip install comet-ml"
    )


def test_numbers_that_run_away_are_one_sentence(tiny_sd: Path, tmp_path: Path) -> None:
    optim = {"lr": 1e30, "max_grad_norm": None}
    values = {
        "teacher": str(tiny_sd), "output_dir": str(tmp_path), "data": {"source": "fashion", "limit": 4},
        "method": {"optim": optim}, "max_iterations": 50, "batch_size": 2,
        "train": {"cpu_threads": 1, "max_nonfinite": 2},
    }  # fmt: skip
    with pytest.raises(
        FewstepError, match=r"^train.max_nonfinite: found 3 updates in a row .* Lower method\.optim\.lr"
    ):
        run(RunConfig[LcmSettings].model_validate(values), LCM)
