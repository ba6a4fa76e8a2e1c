"""Import fewstep, its command line and every method's settings, and validate every recipe; needs pydantic and PyYAML alone."""

import sys

import fewstep
from fewstep.cli.main import main
from fewstep.config.recipes import load_recipe, recipe_names
from fewstep.methods.registry import METHODS, load_run, settings_class
from fewstep.pretrain.config import load_training

for method in METHODS:
    settings_class(method)
for name in recipe_names():
    recipe = load_recipe(name)
    if recipe.method == "teacher":
        load_training(recipe.path)
    else:
        load_run(name)
main(["recipes", "show", "fashion/dmd2"])
assert "torch" not in sys.modules
print(f"# Python {sys.version.split()[0]}, fewstep {fewstep.__version__}: {len(recipe_names())} recipes")
