"""The list of methods: names, settings and classes, and methods of one's own."""

import subprocess
import sys
from pathlib import Path

import pytest

from fewstep.errors import FewstepError, MissingError
from fewstep.methods.registry import METHODS, check_run, load_run, method_class, settings_class

OWN = """
from fewstep.config import MethodConfig
from fewstep.methods.base import Method


class Settings(MethodConfig):
    strength: float = 1.0
    \"\"\"Strength.\"\"\"


class Mine(Method):
    settings = Settings


class Without(Method):
    pass


class NoMethod:
    settings = Settings
"""
RUN = {"teacher": "fashion", "data": {"source": "fashion"}, "output_dir": "x", "max_iterations": 1, "batch_size": 1}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_loaded(name: str) -> None:
    required = {"ect": {"gap": {"double_iterations": 1}}, "trajectory": {"trajectories": {"count": 1}}}.get(name, {})
    assert settings_class(name).model_validate({"name": name, "optim": {"lr": 1e-4}} | required).name == name
    assert method_class(name).__name__ in METHODS[name].method


def test_settings_load_no_torch() -> None:
    code = (
        "import sys\nfrom fewstep.methods.registry import METHODS, settings_class\n"
        "for name in METHODS: settings_class(name)\nprint('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ({"name": "dmd3"}, r"^method\.name: found 'dmd3'; expected one of cd, .* did you mean 'dmd2'\?"),
        ({"nam": "dmd2"}, r"^x: method\.name: found nothing; expected one of cd, "),
        ({"name": 1}, r"^x: method\.name: found 1; expected one of cd, "),
        ({"name": "nothing.here:Mine"}, r"^method\.name: found 'nothing\.here:Mine', and no module 'nothing'; "),
        ({"name": "./nothing.py:Mine"}, r"^method\.name: found .*nothing\.py, which does not exist"),
        (
            {"name": "fewstep.methods.base:Methud"},
            r"expected a class in fewstep\.methods\.base; did you mean 'Method'\?",
        ),
        (
            {"name": "scm", "optim": {"lr": 1.0}, "velocty": 1},
            r"method\.velocty: unknown key; did you mean 'velocity'\?",
        ),
        (3, r"method: found 3; expected mapping"),
    ],
)
def test_messages(method: object, expected: str) -> None:
    with pytest.raises(FewstepError, match=expected):
        check_run(RUN | {"method": method}, "x")
    with pytest.raises(FewstepError, match=r"x: 1 problem\n  method: missing; expected mapping"):
        check_run(RUN, "x")


def test_a_method_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    run = check_run(RUN | {"method": {"name": f"{file}:Mine", "strength": 2.0}}, "x")
    assert run.method.model_dump() == {"name": f"{file}:Mine", "strength": 2.0}
    assert method_class(f"{file}:Mine").__name__ == "Mine"
    assert method_class(f"{file}:Mine") is method_class(f"{file}:Mine")
    with pytest.raises(FewstepError, match=r"method\.stength: unknown key; did you mean 'strength'\?"):
        check_run(RUN | {"method": {"name": f"{file}:Mine", "stength": 2.0}}, "x")
    with pytest.raises(FewstepError, match=r"Name it by the class attribute `settings`"):
        settings_class(f"{file}:Without")
    with pytest.raises(FewstepError, match=r"NoMethod', which is no method"):
        method_class(f"{file}:NoMethod")
    with pytest.raises(FewstepError, match=r"found '.*mine\.py:Mein'; expected a class in .*; did you mean 'Mine'\?"):
        settings_class(f"{file}:Mein")


def test_a_run_loads_by_its_recipes_name() -> None:
    run = load_run("fashion/boot", ["method.steps=1", "seed=3"])
    assert (run.method.name, run.seed) == ("boot", 3)
    with pytest.raises(MissingError, match="Did you mean"):
        load_run("fashion/bot")
