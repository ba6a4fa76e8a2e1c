"""The commands, a file each."""

from typing import Any

from fewstep.commands.cache import add_cache
from fewstep.commands.compare import add_compare
from fewstep.commands.evaluate import add_evaluate
from fewstep.commands.plan import add_plan
from fewstep.commands.reference import add_reference
from fewstep.commands.report import add_report


def add_commands(commands: Any) -> None:
    for add in (add_evaluate, add_reference, add_compare, add_report, add_cache, add_plan):
        add(commands)
