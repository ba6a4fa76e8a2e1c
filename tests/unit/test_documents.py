"""The documents: commands, recipes, paths and keys in them exist."""

import contextlib
import io
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from builders import ROOT
from fewstep.cli.main import _parser
from fewstep.config import MethodConfig, RunConfig
from fewstep.config.help import paths
from fewstep.config.recipes import load_recipe, locate_recipe, recipe_names
from fewstep.methods.registry import METHODS, load_run, settings_class
from fewstep.pretrain.config import load_training

DOCUMENTS = (
    "README.md",
    "METHODS.md",
    "CONTRIBUTING.md",
    "docs/architecture.md",
    "configs/README.md",
    "benchmarks/RESULTS.md",
)
NAMES = recipe_names()
FAMILIES = sorted({name.split("/")[0] for name in NAMES})
FOLDERS = ("fewstep", "tests", "configs", "docs", "benchmarks", "train", "examples")
FILES = ("log.jsonl",)
"""Names that look like dotted keys."""


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command in a shell's block, or in code within a line."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`((?:fewstep|accelerate launch|python) [^`]+)`", text)
    for line in lines:
        for part in re.split(r"&&|\s#\s", line):
            words = shlex.split(part, comments=True)
            if words:
                yield words


def placeholder(word: str) -> bool:
    """A word for the reader to replace, such as FILE, or what a document leaves out."""
    return "..." in word or re.fullmatch(r"[A-Z][A-Z|]*", word.split("=")[-1]) is not None


def check_settings(recipe: str, words: list[str], script: str | None = None) -> None:
    """Validate a recipe under the overrides in a command."""
    overrides = [word for word in words if "=" in word and not word.startswith("-") and not placeholder(word)]
    path = locate_recipe(recipe)
    name = path.relative_to(ROOT / "configs").with_suffix("").as_posix() if path.is_relative_to(ROOT) else None
    if script == "teacher" or (name in NAMES and load_recipe(str(name)).method == "teacher"):
        load_training(path, overrides)
    else:
        load_run(path, overrides, script)


def check_command(words: list[str]) -> None:
    """Check what a command names: a recipe and its overrides, options of fewstep, a file that Python runs."""
    words = list(itertools.dropwhile(lambda word: re.fullmatch(r"[A-Z_]+=\S*", word) is not None, words))
    if words[:2] == ["accelerate", "launch"]:
        words = ["python", *itertools.dropwhile(lambda word: word.startswith("--"), words[2:])]
    if words[:3] in (["python", "-m", "fewstep"], ["python", "-m", "fewstep.cli"]):
        words = ["fewstep", *words[3:]]
    if words[0] == "python" and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file(), words
        if words[1].startswith("train/") and "--config" in words:
            recipe = words[words.index("--config") + 1]
            if not placeholder(recipe):
                check_settings(str(ROOT / recipe), words[4:], Path(words[1]).stem)
    elif words[0] == "fewstep" and not any(map(placeholder, words)):
        check_fewstep(words[1:])


def check_fewstep(words: list[str]) -> None:
    """Parse a command of fewstep, and validate the recipe of one that takes a recipe."""
    if all(word.startswith("-") for word in words[1:]):  # the command or an option is mentioned, not called
        with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
            _parser().parse_args([words[0], "--help"])
        assert set(words[1:]) <= set(re.findall(r"--?[\w-]+", shown.getvalue())), words
        return
    args, rest = _parser().parse_known_args(words)
    assert all("=" in word and not word.startswith("-") for word in rest), rest
    values: dict[str, object] = vars(args)
    recipe = values.get("recipe") or values.get("config")
    if isinstance(recipe, str):
        check_settings(str(ROOT / recipe) if recipe.endswith(".yaml") else recipe, words[2:])


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands(document: str) -> None:
    """Commands parse; recipes with their overrides validate."""
    found = list(commands((ROOT / document).read_text(encoding="utf-8")))
    for words in found:
        check_command(words)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_recipes_and_paths(document: str) -> None:
    """Recipes, files and folders exist; so does what a link points to."""
    text = (ROOT / document).read_text(encoding="utf-8")
    recipes = re.findall(rf"`((?:{'|'.join(FAMILIES)})/\w+)(?:\.yaml)?`", text)
    wrong = [name for name in recipes if name not in NAMES and not (ROOT / name).exists()]
    files = re.findall(rf"(?<![\w/.:-])((?:{'|'.join(FOLDERS)})/[\w./-]*\w)(?![\w<{{*-])", text)
    wrong += [
        file for file in files if file not in NAMES and not any((ROOT / f"{file}{end}").exists() for end in ("", ".py"))
    ]
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    wrong += [link for link in links if not ((ROOT / document).parent / link).exists()]
    assert not wrong


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if not name.startswith("benchmarks")])
def test_keys(document: str) -> None:
    """Dotted keys of a run or a method are keys of today."""
    text = (ROOT / document).read_text(encoding="utf-8")
    known = {key for key in paths(RunConfig[MethodConfig])}
    for method in METHODS:
        own = set(paths(settings_class(method)))
        known |= own | {f"method.{key}" for key in own}
    heads = {key.split(".")[0] for key in known if "." in key}
    found = re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?=[`:=])", text)
    assert not [key for key in found if key.split(".")[0] in heads and key not in known and key not in FILES]
