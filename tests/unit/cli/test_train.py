"""`fewstep train`, `fewstep recipes` and the scripts: what they read, start and refuse."""

import os
import sys
from pathlib import Path

import pytest

from builders import ROOT
from fewstep.cli import train as command
from fewstep.cli.main import main
from fewstep.cli.scripts import train
from fewstep.config import MethodConfig, RunConfig
from fewstep.config.recipes import recipe_names
from fewstep.pretrain.config import DiTTraining

Started = list[RunConfig[MethodConfig]]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    """The settings of the runs that were started, none of which runs."""
    runs: Started = []
    monkeypatch.setattr("fewstep.cli.train.train_run", runs.append)
    monkeypatch.setattr("fewstep.cli.scripts.train_run", runs.append)
    for name in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    return runs


def test_recipes_files_overrides_and_resume(started: Started, tmp_path: Path) -> None:
    main(["train", "fashion/boot", "method.steps=2", "--resume", "latest", "seed=4"])
    main(["recipes", "copy", "fashion/boot", str(tmp_path / "new" / "mine.yaml")])
    main(["train", str(tmp_path / "new" / "mine.yaml")])
    first, second = started
    assert (first.method.name, first.seed, first.checkpoint.resume) == ("boot", 4, "latest")
    assert second.output_dir == Path("runs/fashion/boot") and second.checkpoint.resume is None
    with pytest.raises(SystemExit, match=r"mine\.yaml, which exists; expected a new file"):
        main(["recipes", "copy", "fashion/boot", str(tmp_path / "new" / "mine.yaml")])


def test_a_recipe_of_a_teacher_trains_a_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[object] = []
    monkeypatch.setattr("fewstep.cli.train.train_teacher", found.append)
    main(["train", "teachers/fashion_dit", "layers=2"])
    assert isinstance(found[0], DiTTraining) and found[0].layers == 2
    with pytest.raises(SystemExit, match=r"--processes: found several; expected one"):
        main(["train", "teachers/fashion_dit", "--processes", "2"])


def test_several_processes_are_launched(started: Started, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    launched: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, words: launched.append(words))
    monkeypatch.setattr("fewstep.cli.train._has_gpu", lambda: False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    main(["train", "fashion/boot", "seed=4", "--processes", "2"])
    words = " ".join(launched[0])
    assert words.startswith(f"{sys.executable} -m accelerate.commands.launch --num_processes 2 --num_machines 1 ")
    assert words.endswith(f"--multi_gpu --main_process_port 0 -m fewstep train {ROOT}/configs/fashion/boot.yaml seed=4")
    assert os.environ["ACCELERATE_USE_CPU"] == "true"
    file = tmp_path / "accelerate.yaml"
    file.write_text("num_processes: 4\n")
    main(["train", "fashion/boot", "--accelerate-config", str(file)])
    assert launched[1][1:5] == ["-m", "accelerate.commands.launch", "--config_file", str(file)]
    with pytest.raises(SystemExit, match=r"--accelerate-config: found .*b\.yaml, which does not exist"):
        main(["train", "fashion/boot", "--accelerate-config", "b.yaml"])
    main(["train", "fashion/boot", "--accelerate-config", "ddp"])
    assert launched.pop()[4] == f"{ROOT}/configs/accelerate/ddp.yaml"
    with pytest.raises(SystemExit, match=r"sede: unknown key; did you mean 'seed'\?"):
        main(["train", "fashion/boot", "sede=4", "--processes", "2"])
    assert len(launched) == 2, "errors in a config are reported before anything starts"
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(SystemExit, match=r"--processes: found it under a launcher"):
        main(["train", "fashion/boot", "--processes", "2"])
    started.clear()
    main(["train", "fashion/boot"])
    assert len(started) == 1


def test_keys_of_a_recipes_method(capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "fashion/scm", "--keys"])
    text = capsys.readouterr().out
    assert "\n  name: scm = scm\n" in text and "\n  velocity: teacher, data = teacher\n" in text
    main(["train", "teachers/digits", "--keys"])
    assert "\ndataset: digits = digits\n" in capsys.readouterr().out


def test_the_list_of_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes"])
    plain = capsys.readouterr().out
    main(["recipes", "list"])
    assert capsys.readouterr().out == plain
    assert [line.split()[0] for line in plain.splitlines()[1:]] == recipe_names()
    main(["recipes", "show", "fashion/boot"])
    assert capsys.readouterr().out == (ROOT / "configs" / "fashion" / "boot.yaml").read_text()
    with pytest.raises(SystemExit, match=r"fewstep recipes: recipe: found 'boot'; .* Did you mean .*/boot"):
        main(["recipes", "show", "boot"])


def test_a_script_trains_its_methods_alone(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train/boot.py", "--config", "fashion/boot", "--resume", "latest"])
    train("boot")
    assert started[0].checkpoint.resume == "latest"
    with pytest.raises(
        SystemExit, match=r"method\.name: found boot; expected one of dmd2\. Train it with train/boot\.py"
    ):
        train("dmd2")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == "fewstep 0.1.0\n"


def test_a_launcher_is_recognized(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not command.launched()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert command.launched()
