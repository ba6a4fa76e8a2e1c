"""The numbers of every method, variant and family are those that are written in losses.json.

They hold on for what changes the code and not what it computes; one after another, so that each case names itself.
"""

import json
import math
from typing import Any

import pytest

from golden.cases import CASES, SAMPLERS
from golden.driver import FILE, measured, samplers

RELATIVE, ABSOLUTE = 1e-9, 1e-12
HOW = (
    "\nIf this change is wanted, write the numbers anew with `PYTHONPATH=.:tests OMP_NUM_THREADS=1 python "
    "-m golden.driver`, in a commit of its own that says so and why."
)
GOLDEN: dict[str, Any] = json.loads(FILE.read_text())


def differences(found: Any, expected: Any, at: str = "") -> list[str]:
    """One line for each value that is missing, too many or another."""
    if isinstance(expected, dict) and isinstance(found, dict):
        lines = [f"{at}/{key}: missing" for key in expected.keys() - found.keys()]
        lines += [f"{at}/{key}: not in losses.json" for key in found.keys() - expected.keys()]
        for key in expected.keys() & found.keys():
            lines += differences(found[key], expected[key], f"{at}/{key}")
        return sorted(lines)
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = enumerate(zip(found, expected, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f"{at}[{i}]")]
    numbers = all(isinstance(v, int | float) for v in (found, expected))
    same = math.isclose(found, expected, rel_tol=RELATIVE, abs_tol=ABSOLUTE) if numbers else found == expected
    return [] if same else [f"{at}: {found!r}, expected {expected!r}"]


def test_losses_json_holds_these_cases() -> None:
    found = {"losses": dict.fromkeys(CASES), "samplers": dict.fromkeys(SAMPLERS)}
    held = {kind: dict.fromkeys(cases) for kind, cases in GOLDEN.items()}
    assert not (lines := differences(found, held)), "\n".join(lines) + HOW


@pytest.mark.parametrize("name", CASES)
def test_losses(name: str) -> None:
    lines = differences(measured(CASES[name], name), GOLDEN["losses"].get(name, {}))
    assert not lines, "\n".join(lines) + HOW


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers(name: str) -> None:
    lines = differences(samplers(CASES[name]), GOLDEN["samplers"].get(name, {}))
    assert not lines, "\n".join(lines) + HOW
