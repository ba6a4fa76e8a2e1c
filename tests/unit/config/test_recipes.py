"""The recipes of the package: complete, valid, and named after what they run."""

import re
from pathlib import Path

import pytest

from builders import ROOT
from fewstep.config.recipes import (
    accelerate_files,
    load_recipe,
    locate_recipe,
    markdown,
    recipe_names,
    recipe_path,
    shipped_file,
)
from fewstep.errors import FewstepError, MissingError
from fewstep.methods.registry import METHODS, load_run, names
from fewstep.pretrain.config import load_training

NAMES = recipe_names()


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_validates(name: str) -> None:
    recipe = load_recipe(name)
    if recipe.method == "teacher":
        assert load_training(recipe.path).recipe == recipe.info
    else:
        config = load_run(name)
        assert config.recipe == recipe.info and config.method.name == recipe.method


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_named_after_what_it_runs(name: str) -> None:
    family, word = name.split("/")
    recipe = load_recipe(name)
    if family != "teachers":
        assert recipe.method == word.split("_")[0] or (recipe.method, word) == ("lcm", "consistency")
    assert str(recipe.raw["output_dir"]) == f"runs/{name}"
    text = recipe.path.read_text()
    first = next(line for line in text.splitlines() if not line.startswith("#"))
    assert first == "recipe:"


@pytest.mark.parametrize("family", ["sdxl", "pixart", "sd3", "flux"])
def test_large_families_have_a_recipe_of_every_method_with_its_budget(family: str) -> None:
    recipes = [load_recipe(name) for name in NAMES if name.startswith(f"{family}/")]
    assert {recipe.method for recipe in recipes} >= {"lcm", "mlcm", "dmd2", "boot"}
    assert not [recipe.name for recipe in recipes if "# Budget" not in recipe.path.read_text()]


def test_files_that_a_recipe_starts_from_are_written_by_another() -> None:
    for name in NAMES:
        for made in re.findall(r"(?:teacher|init_from|path): runs/(\S+)", recipe_path(name).read_text()):
            assert "/".join(made.split("/")[:2]) in NAMES, (name, made)


def test_the_table_is_of_today() -> None:
    """Written by `fewstep recipes --markdown`."""
    text = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    assert text[text.index("| recipe") :] == markdown()


def test_a_word_is_a_file_or_a_name(tmp_path: Path) -> None:
    assert locate_recipe("fashion/dmd2") == recipe_path("fashion/dmd2") == ROOT / "configs" / "fashion" / "dmd2.yaml"
    assert locate_recipe(str(tmp_path / "x.yaml")) == tmp_path / "x.yaml"
    with pytest.raises(MissingError, match=r"recipe: found 'fashion/dmd'; .* Did you mean fashion/dmd2"):
        locate_recipe("fashion/dmd")
    with pytest.raises(MissingError, match=r"Did you mean sdxl/lcm_lora"):
        locate_recipe("x/lcm_lora")
    with pytest.raises(MissingError, match=r"See `fewstep recipes` for all"):
        locate_recipe("qqq")


def test_every_method_has_a_script_and_a_script_its_methods() -> None:
    scripts = {path.stem for path in (ROOT / "train").glob("*.py")} - {"teacher"}
    assert {entry.script for entry in METHODS.values()} == scripts
    with pytest.raises(FewstepError, match=r"found boot; expected one of dmd2\. Train it with train/boot\.py"):
        load_run("fashion/boot", script="dmd2")
    assert names("scm") == ["scm"]


@pytest.mark.parametrize(("name", "machines", "processes"), [("ddp", 1, 8), ("two_machines", 2, 16)])
def test_accelerate_takes_the_launches_of_the_package(name: str, machines: int, processes: int) -> None:
    """As its own launcher reads them, and none of them is a recipe."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    file = accelerate_files()[name]
    words = ["--config_file", str(file), "-m", "fewstep", "train"]
    args, settings, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert (settings.num_machines, args.num_machines, args.num_processes) == (machines, machines, processes)
    assert args.multi_gpu and settings.main_process_port == 29500
    assert shipped_file(f"accelerate/{name}") == file and f"accelerate/{name}" not in NAMES
    with pytest.raises(MissingError):
        recipe_path(f"accelerate/{name}")
