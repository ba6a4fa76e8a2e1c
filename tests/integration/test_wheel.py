"""The package as pip installs it: recipes, commands and a training, from a wheel and outside the clone."""

import os
import shutil
import site
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import ROOT
from fewstep.config.recipes import accelerate_files, recipe_names

Fewstep = Callable[..., str]
"""Words of a command line -> what it prints."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, so that nothing is left in the clone."""
    sources, folder = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in ("fewstep", "configs", "train"):
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, sources / name)
    words = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(sources)]
    subprocess.run([sys.executable, *words], check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that has the wheel, and the libraries of the running environment."""
    environment = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    binaries = environment / ("Scripts" if os.name == "nt" else "bin")
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "libraries.pth").write_text("\n".join(site.getsitepackages()))
    words = ["-m", "pip", "install", "-q", "--no-deps", "--no-index", "--ignore-installed", str(wheel)]
    subprocess.run([str(binaries / "python"), *words], check=True, env=_environment())
    return binaries


@pytest.fixture
def fewstep(installed: Path, tmp_path: Path) -> Fewstep:
    """Run a program of that environment outside the clone."""

    def run(program: str, *words: str) -> str:
        command = [str(installed / program), *words]
        done = subprocess.run(command, cwd=tmp_path, env=_environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}


SHORT = (
    "max_iterations=4", "batch_size=4", "checkpoint.every=2", "log.samples_every=0", "evaluate=null", "train.cpu_threads=1",
    "train.mixed_precision=no",
)  # fmt: skip
FEW = ("method.trajectories.count=16", "method.trajectories.batch_size=8")


@pytest.mark.slow
def test_the_wheel_has_recipes_scripts_and_protocols(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"fewstep/recipes/{name}.yaml" for name in recipe_names()} <= names
    assert {f"fewstep/scripts/{path.name}" for path in (ROOT / "train").glob("*.py")} <= names
    assert {f"fewstep/recipes/accelerate/{name}.yaml" for name in accelerate_files()} <= names
    assert "fewstep/evaluate/protocols/fashion_10k.yaml" in names


@pytest.mark.slow
def test_recipes_are_listed_shown_and_copied(fewstep: Fewstep, tmp_path: Path) -> None:
    assert fewstep("fewstep", "--version").startswith("fewstep 0.")
    listed = [line.split()[0] for line in fewstep("fewstep", "recipes").splitlines()[1:]]
    assert listed == recipe_names()
    shown = fewstep("fewstep", "recipes", "show", "fashion/dmd2")
    fewstep("fewstep", "recipes", "copy", "fashion/dmd2", "mine.yaml")
    assert (tmp_path / "mine.yaml").read_text() == shown == (ROOT / "configs" / "fashion" / "dmd2.yaml").read_text()
    where = fewstep("python", "-c", "import fewstep; print(fewstep.__file__)")
    assert "environment" in where and str(ROOT) not in where


@pytest.mark.slow
def test_a_student_is_trained_resumed_and_sampled(fewstep: Fewstep, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "fashion" / "trajectory"
    fewstep("fewstep", "train", "fashion/trajectory", *SHORT, *FEW, "max_iterations=2")
    fewstep("fewstep", "train", "fashion/trajectory", *SHORT, *FEW, "--resume", "latest")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["2", "4"]
    # Two processes, started by the command itself; and one under accelerate's launcher.
    fewstep("fewstep", "train", "fashion/trajectory", *SHORT, *FEW, "output_dir=two", "--processes", "2")
    launch = ("-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1")
    fewstep("python", *launch, "-m", "fewstep", "train", "fashion/trajectory", *SHORT, *FEW, "output_dir=one")
    for folder in (run, tmp_path / "two", tmp_path / "one"):
        assert (folder / "pipeline" / "model_index.json").is_file()
    fewstep("fewstep", "sample", str(run / "pipeline"), "--prompt", "a coat", "--steps", "2", "--output", "x.png")
    assert (tmp_path / "x.png").stat().st_size > 0


@pytest.mark.slow
def test_a_student_is_trained_on_images(fewstep: Fewstep, tmp_path: Path) -> None:
    fewstep("fewstep", "train", "fashion/lcm", *SHORT, "data.limit=16")
    run = tmp_path / "runs" / "fashion" / "lcm"
    assert [path.name for path in (run / "checkpoints").iterdir()] and (run / "pipeline" / "model_index.json").is_file()


@pytest.mark.slow
def test_python_of_the_readme(fewstep: Fewstep, tmp_path: Path) -> None:
    """Its first lines, with fewer iterations."""
    code = (ROOT / "README.md").read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    short = code.replace("max_iterations=200", 'max_iterations=4, batch_size=4, train={"cpu_threads": 1}')
    assert short != code
    fewstep("python", "-c", short)
    assert (tmp_path / "runs" / "mine" / "pipeline" / "model_index.json").is_file()
    assert (tmp_path / "coat.png").stat().st_size > 0
