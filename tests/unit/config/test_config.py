import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from builders import ROOT
from fewstep.config import DataConfig, EvaluateConfig, OptimConfig, RunConfig, Strict, dump_config, load_config


class MethodConfig(Strict):
    gan_weight: float = 0.5
    """Weight of the adversarial term."""
    optim: OptimConfig
    """Optimizer of the student."""


Config = RunConfig[MethodConfig]

YAML = """
teacher: fashion
method: {optim: {lr: 1e-4, betas: [0, 0.9]}}
data: {source: fashion}
output_dir: runs/x
max_iterations: 10
batch_size: 4
mixed_precision: no
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.yaml"
    path.write_text(YAML)
    return path


def load(file: Path, *overrides: str) -> Any:
    return load_config(Config, ["--config", str(file), *overrides])


def message(file: Path, *overrides: str) -> str:
    with pytest.raises(SystemExit) as e:
        load(file, *overrides)
    return str(e.value)


def test_yaml_scalars(file: Path) -> None:
    config = load(file, "ema_decay=0", "method.gan_weight=-2E+3", "seed=1_000")
    assert config.method.optim.lr == 1e-4 and config.method.optim.betas == (0.0, 0.9)
    assert config.mixed_precision == "no" and config.output_dir == Path("runs/x")
    assert isinstance(config.ema_decay, float) and config.method.gan_weight == -2000 and config.seed == 1000


def test_overrides(file: Path) -> None:
    config = load(file, "--resume", "latest", "evaluate.steps=[1, 2]", "method.optim.max_grad_norm=null")
    assert config.resume == "latest" and config.evaluate.steps == (1, 2)
    assert config.method.optim.max_grad_norm is None
    assert load(file, "--resume=x").resume == "x"
    assert load(file, "score.every=1", "score.every=2").score.every == 2


@pytest.mark.parametrize("tracker", ["1e-4", "no", "2026-01-01", "null", "010", "1:30", "ü: #", "", "~", ".5", "a\nb"])
def test_round_trip(file: Path, tracker: str) -> None:
    config = load(file, "evaluate.teacher_guidance_scale=2").model_copy(update={"tracker": tracker})
    text = dump_config(config, {"torch": "2.14.1"})
    assert text.startswith("# versions:\n#   torch: 2.14.1\n")
    file.write_text(text, encoding="utf-8")
    assert load(file) == config


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("method.gan_wieght=1", "method.gan_wieght: unknown key; did you mean 'gan_weight'?"),
        ("metod.gan_weight=1", "metod: unknown key; did you mean 'method'?"),
        ("gan_weight=1", "gan_weight: unknown key; did you mean 'method.gan_weight'?"),
        ("method.xyz=1", "method.xyz: unknown key; known: gan_weight, optim"),
        ("seed=10.5", "seed: found 10.5; allowed: whole number >= 0"),
        ("seed='5'", "seed: found text '5'; allowed: whole number >= 0"),
        ("seed=true", "seed: found true"),
        ("seed=010", "seed: found text '010'"),
        ("seed.x=1", "seed: found mapping {x: 1}; allowed: whole number"),
        ("method.optim.lr=[1]", "method.optim.lr: found list [1]; allowed: number > 0"),
        ("method.optim.lr=true", "method.optim.lr: found true"),
        ("method.optim.lr=.inf", "method.optim.lr: found .inf"),
        ("method.optim.lr=0", "method.optim.lr: found 0; allowed: number > 0"),
        ("method.optim.betas=[0.5]", "method.optim.betas: found list [0.5]; allowed: list of 2"),
        ("method=1", "method: found 1; allowed: mapping with the keys gan_weight, optim"),
        ("ema_decay=1", "ema_decay: found 1; allowed: number >= 0 and < 1"),
        ("evaluate.steps=[]", "evaluate.steps: found list []; allowed: list of (whole number > 0), at least 1"),
        ("evaluate.steps=[1, x]", "evaluate.steps: found list [1, x]; allowed: list of (whole number > 0)"),
        ("mixed_precision=bf61", "allowed: auto, no, bf16, fp16; did you mean 'bf16'?"),
        ("data.source=folder", "data: source 'folder' needs path, which is null"),
        ("data.source=labels", "data: source 'labels' needs num_labels, which is null"),
        ("data.path=x", "data: source 'fashion' takes no path, found 'x'"),
        ("batch_size=", "batch_size: found null; allowed: whole number > 0"),
    ],
)
def test_messages(file: Path, override: str, expected: str) -> None:
    text = message(file, override)
    assert text.startswith(f"{file}: 1 problem\n  ") and expected in text, text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["teacher.x=1"], "override 'teacher.x=1': teacher is text 'fashion', which has no keys"),
        (["foo"], "override 'foo' is not of the form key.path=value"),
        (["a..b=1"], "override 'a..b=1' is not of the form key.path=value"),
        (["seed=[1"], "override 'seed=[1', line 1: "),
        (["--confg"], "unknown option '--confg': usage: "),
        (["--seed=1"], "unknown option '--seed=1': a key is set without dashes, seed=1; usage: "),
        (["--resume"], "--resume needs a value: usage: "),
    ],
)
def test_bad_command_line(file: Path, words: list[str], expected: str) -> None:
    text = message(file, *words)
    assert text.startswith(expected) and "\n" not in text


def test_bad_files(file: Path, tmp_path: Path) -> None:
    assert message(tmp_path / "b.yaml") == f"config file {tmp_path / 'b.yaml'} does not exist"
    assert message(tmp_path).startswith(f"config file {tmp_path} cannot be read: ")
    for text, expected in (
        ("seed: 1\nseed: 2\n", ", line 2: key 'seed' stands twice"),
        ("method:\n  optim: {lr: 1, lr: 2}\n", ", line 2: key 'lr' stands twice"),
        ("- 1", ": found list [1] where a mapping of keys to values is wanted"),
        ("a: [", ", line 1: expected the node content, but found '<stream end>'"),
        ("a: !!python/name:os.system", ", line 1: could not determine a constructor"),
    ):
        file.write_text(text)
        assert message(file).startswith(f"{file}{expected}")
    file.write_text("")
    assert message(file).startswith(f"{file}: 6 problems\n  teacher: missing; allowed: text\n  method: missing; ")
    with pytest.raises(SystemExit, match=r"^usage: "):
        load_config(Config, [])
    with pytest.raises(SystemExit, match=r"^did you mean --config a\.yaml\? usage: "):
        load_config(Config, ["seed=1", "a.yaml"])


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        load_config(Config, ["--help"])
    assert e.value.code == 0
    text = capsys.readouterr().out
    for expected in (
        "\nbatch_size: whole number > 0 (required)\n    Samples per process and micro-batch.\n",
        "\nmethod: mapping (required)\n    Settings of the method.\n  gan_weight: number = 0.5\n",
        "\n    betas: list of 2 (number >= 0 and < 1, number >= 0 and < 1) = [0.9, 0.999]\n",
        "\nevaluate: mapping or null = null\n",
        "\n  steps: list of (whole number > 0), at least 1 = [1, 2, 4, 8]\n",
        "\nexport_dtype: fp32, fp16, bf16 = fp32\n",
    ):
        assert expected in text


@pytest.mark.parametrize("model", [Config, OptimConfig, DataConfig, EvaluateConfig])
def test_every_key_is_explained(model: type[Strict]) -> None:
    assert [name for name, field in model.model_fields.items() if not field.description] == []


def test_frozen_and_strict_from_python(tmp_path: Path) -> None:
    optim = OptimConfig(lr=1)
    with pytest.raises(ValidationError):
        optim.lr = 2.0  # type: ignore[misc]
    with pytest.raises(ValidationError):
        OptimConfig(lr="1")  # type: ignore[arg-type]
    assert DataConfig(source="folder", path=tmp_path).path == tmp_path


def test_no_heavy_import() -> None:
    code = (
        "import sys, fewstep.config; print(*{'torch', 'numpy', 'PIL', 'diffusers', 'transformers'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


@pytest.mark.parametrize("script", sorted((ROOT / "train").glob("*.py")), ids=lambda path: path.name)
@pytest.mark.parametrize("words", [["--config", "a.yaml"], ["--help"]], ids=["typo", "help"])
def test_a_trainer_answers_before_torch_is_loaded(script: Path, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("sede: 1\n")
    code = f"""
import runpy, sys
sys.argv = {[str(script), *words]!r}
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    print(end.code)
print("torch loaded" if "torch" in sys.modules else "no torch")
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.endswith("no torch\n"), done.stderr
    assert ("sede: unknown key; did you mean 'seed'?" if words[0] == "--config" else "\nseed: ") in done.stdout
