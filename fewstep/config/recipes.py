"""The recipes that come with the package: YAML files <family>/<method>[_variant].yaml."""

import difflib
from dataclasses import dataclass
from pathlib import Path

from fewstep.config.load import Raw, check, read
from fewstep.config.sections import RecipeConfig
from fewstep.errors import MissingError

_PACKAGE = Path(__file__).parents[1]
SUFFIXES = (".yaml", ".yml")
ACCELERATE = "accelerate"
"""Folder of files that are no recipes: how accelerate launches the processes of one."""


@dataclass(frozen=True)
class Recipe:
    """A recipe, unchecked but for its key `recipe`.

    Attributes:
        name: `<family>/<method>[_variant]`.
        path: its file.
        info: what is known of it.
        raw: the whole of the file.
    """

    name: str
    path: Path
    info: RecipeConfig
    raw: Raw

    @property
    def method(self) -> str:
        """Name of its method; of a teacher's training, `teacher`."""
        method = self.raw.get("method")
        return str(method["name"]) if isinstance(method, dict) else "teacher"

    @property
    def teacher(self) -> str:
        """The pipeline that it distills, or for a teacher's training the data."""
        return str(self.raw.get("teacher", self.raw.get("dataset", "fashion")))


def folder() -> Path:
    """The folder of the recipes: in the installed package, or `configs/` of a clone."""
    inside = _PACKAGE / "recipes"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"


def recipe_names() -> list[str]:
    """All names, sorted."""
    found = folder()
    return sorted(
        file.relative_to(found).with_suffix("").as_posix()
        for file in found.glob("*/*.yaml")
        if file.parent.name != ACCELERATE
    )


def recipe_path(name: str) -> Path:
    """The file of a recipe. Raises MissingError, with the nearest names, for one that does not exist."""
    known = recipe_names()
    if name in known:
        return folder() / f"{name}.yaml"
    same = [n for n in known if n.split("/")[-1] == name.split("/")[-1]]
    close = difflib.get_close_matches(name, known, n=3) or same
    hint = f"Did you mean {' or '.join(close)}?" if close else "See `fewstep recipes` for all"
    raise MissingError("recipe", repr(name), "the name of a recipe, or a YAML file that exists", hint)


def accelerate_files() -> dict[str, Path]:
    """The files of `accelerate config` that are next to the recipes, by name."""
    return {file.stem: file for file in sorted((folder() / ACCELERATE).glob("*.yaml"))}


def shipped_file(name: str) -> Path:
    """The file of a recipe, or `accelerate/<name>` of a launch. Raises MissingError for one that does not exist."""
    family, _, launch = name.partition("/")
    return recipe_path(name) if family != ACCELERATE or launch not in accelerate_files() else accelerate_files()[launch]


def locate_recipe(word: str) -> Path:
    """The file that a user's word means: a YAML file, otherwise the recipe of that name."""
    path = Path(word).expanduser()
    return path if path.suffix in SUFFIXES or path.is_file() else recipe_path(word)


def load_recipe(name: str) -> Recipe:
    """A recipe by its name."""
    path = recipe_path(name)
    raw = read(path)
    return Recipe(name, path, check(RecipeConfig, raw.get("recipe") or {}, f"{path}: recipe"), raw)


def markdown() -> str:
    """All recipes as a table of Markdown, as in configs/README.md."""
    lines = ["| recipe | method | teacher | status | expected | settings from |", "|---|---|---|---|---|---|"]
    for recipe in map(load_recipe, recipe_names()):
        name = f"[`{recipe.name}`]({recipe.name}.yaml)"
        row = (name, recipe.method, recipe.teacher, recipe.info.status, expected(recipe.info), recipe.info.source)
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def expected(info: RecipeConfig) -> str:
    """The scores to expect, in words; empty where none are known."""
    scores = info.expected
    if scores is None:
        return ""
    steps = f"{scores.steps} step{'s' * (scores.steps > 1)}"
    return f"FID {scores.fid:g} in {steps} ({scores.images:,} images against {scores.reference})"
