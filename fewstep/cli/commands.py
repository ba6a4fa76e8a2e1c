"""The commands, a file each."""

from fewstep.cli.cache import add_cache
from fewstep.cli.compare import add_compare
from fewstep.cli.evaluate import add_evaluate
from fewstep.cli.export import add_export
from fewstep.cli.options import Commands
from fewstep.cli.plan import add_plan
from fewstep.cli.recipes import add_recipes
from fewstep.cli.reference import add_reference
from fewstep.cli.report import add_report
from fewstep.cli.train import add_train


def add_commands(commands: Commands) -> None:
    """Add every command but `sample` to the parser."""
    for add in (
        add_train, add_export, add_recipes, add_plan, add_cache, add_evaluate, add_reference, add_compare, add_report
    ):  # fmt: skip
        add(commands)
