"""Promises of the package as a whole: quick to import, complete configs, small assets."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import fewstep
from builders import ROOT
from fewstep.config import RunConfig, Strict
from fewstep.methods.boot.config import BootConfig
from fewstep.methods.consistency.config import ConsistencyConfig
from fewstep.methods.distribution_matching.config import DMD2Config
from fewstep.methods.scm.config import ScmConfig
from fewstep.pretrain.config import DigitsTraining, DiTTraining, SD3Training, TeacherTraining

PACKAGE = ROOT / "fewstep"
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
MODELS: dict[str, type[Strict]] = {
    "boot": RunConfig[BootConfig],
    "cd": RunConfig[ConsistencyConfig],
    "consistency": RunConfig[ConsistencyConfig],
    "dmd2": RunConfig[DMD2Config],
    "ect": RunConfig[ConsistencyConfig],
    "lcm": RunConfig[ConsistencyConfig],
    "mlcm": RunConfig[ConsistencyConfig],
    "pcm": RunConfig[ConsistencyConfig],
    "scm": RunConfig[ScmConfig],
    "teacher": TeacherTraining,
    "teacher_digits": DigitsTraining,
    "teacher_fashion_dit": DiTTraining,
    "teacher_fashion_flow": SD3Training,
}


def test_import_is_quick_and_loads_no_torch() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import fewstep; seconds = time.perf_counter() - start;"
        "import fewstep.config; print(seconds, 'torch' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    seconds, torch_loaded = output.split()
    assert float(seconds) < 1
    assert torch_loaded == "False"


def test_public_names() -> None:
    for name in fewstep.__all__:
        getattr(fewstep, name)
    with pytest.raises(AttributeError, match="nothing"):
        fewstep.nothing  # noqa: B018


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_validates(path: Path) -> None:
    (MODELS.get(path.stem) or MODELS[path.stem.split("_")[0]]).model_validate(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize("family", ["sdxl", "pixart", "sd3", "flux"])
def test_large_families_have_a_recipe_of_every_method_with_its_budget(family: str) -> None:
    recipes = [path for path in CONFIGS if f"_{family}" in path.stem]
    methods = {"consistency" if path.stem.startswith("lcm") else path.stem.split("_")[0] for path in recipes}
    assert methods >= {"consistency", "mlcm", "dmd2", "boot"}
    assert not [path.name for path in recipes if "# Budget" not in path.read_text()]


def test_interfaces_are_not_probed() -> None:
    """An attribute is part of an interface or it is not: nothing asks `hasattr`."""
    for path in PACKAGE.rglob("*.py"):
        names = [node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)]
        assert "hasattr" not in names, path


def test_assets_are_small() -> None:
    assert sum(path.stat().st_size for path in (PACKAGE / "assets").rglob("*") if path.is_file()) <= 14e6
