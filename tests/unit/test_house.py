"""Promises of the package as a whole: quick to import, complete configs, small assets."""

import ast
import subprocess
import sys

import pytest

import fewstep
from builders import ROOT

PACKAGE = ROOT / "fewstep"


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


def test_interfaces_are_not_probed() -> None:
    """An attribute is part of an interface or it is not: nothing asks `hasattr`."""
    for path in PACKAGE.rglob("*.py"):
        names = [node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)]
        assert "hasattr" not in names, path


def test_assets_are_small() -> None:
    assert sum(path.stat().st_size for path in (PACKAGE / "assets").rglob("*") if path.is_file()) <= 14e6
