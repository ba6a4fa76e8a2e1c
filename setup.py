"""Recipes and scripts of the clone's top level go into the wheel as fewstep/recipes and fewstep/scripts."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
FOLDERS = {"configs": "recipes", "train": "scripts"}


class Build(build_py):
    """The package's modules, recipes and scripts; an editable install finds the latter two in the clone."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for source, target in FOLDERS.items():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(
                    ROOT / source, Path(self.build_lib, "fewstep", target), ignore=ignored, dirs_exist_ok=True
                )


setup(cmdclass={"build_py": Build})
