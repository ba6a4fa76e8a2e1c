"""The commands, a file each."""

from typing import Any

from fewstep.cli.cache import add_cache
from fewstep.cli.compare import add_compare
from fewstep.cli.evaluate import add_evaluate
from fewstep.cli.plan import add_plan
from fewstep.cli.reference import add_reference
from fewstep.cli.report import add_report


def add_commands(commands: Any) -> None:
    for add in (add_evaluate, add_reference, add_compare, add_report, add_cache, add_plan):
        add(commands)
