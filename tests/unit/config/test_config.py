import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from builders import ROOT
from fewstep.cli.scripts import read_words
from fewstep.config import (
    DataConfig,
    EvaluateConfig,
    MethodConfig,
    OptimConfig,
    RunConfig,
    Strict,
    dump_config,
    load_config,
    merged,
)
from fewstep.config.help import help_lines
from fewstep.errors import FewstepError, MissingError


class Settings(MethodConfig):
    gan_weight: float = 0.5
    """Weight of the adversarial term."""
    optim: OptimConfig
    """Optimizer of the student."""


Config = RunConfig[Settings]

YAML = """
teacher: fashion
method: {optim: {lr: 1e-4, betas: [0, 0.9]}}
data: {source: fashion}
output_dir: runs/x
max_iterations: 10
batch_size: 4
train: {mixed_precision: no}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.yaml"
    path.write_text(YAML)
    return path


def load(file: Path, *overrides: str) -> Any:
    return load_config(Config, file, overrides)


def message(file: Path, *overrides: str) -> str:
    with pytest.raises(FewstepError) as e:
        load(file, *overrides)
    return str(e.value)


def test_yaml_scalars(file: Path) -> None:
    config = load(file, "train.ema_decay=0", "method.gan_weight=-2E+3", "seed=1_000")
    assert config.method.optim.lr == 1e-4 and config.method.optim.betas == (0.0, 0.9)
    assert config.train.mixed_precision == "no" and config.output_dir == Path("runs/x")
    assert isinstance(config.train.ema_decay, float) and config.method.gan_weight == -2000 and config.seed == 1000


def test_overrides(file: Path) -> None:
    config = load(file, "checkpoint.resume=latest", "evaluate.steps=[1, 2]", "method.optim.max_grad_norm=null")
    assert config.checkpoint.resume == "latest" and config.evaluate.steps == (1, 2)
    assert config.method.optim.max_grad_norm is None
    assert load(file, "score.every=1", "score.every=2").score.every == 2


@pytest.mark.parametrize("tracker", ["1e-4", "no", "2026-01-01", "null", "010", "1:30", "ü: #", "", "~", ".5", "a\nb"])
def test_round_trip(file: Path, tracker: str) -> None:
    config = load(file, "evaluate.teacher_guidance_scale=2", "train.student={kind: lora, rank: 2}")
    config = config.model_copy(update={"log": config.log.model_copy(update={"tracker": tracker})})
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
        ("method.xyz=1", "method.xyz: unknown key; expected one of name, gan_weight, optim"),
        ("seed=10.5", "seed: found 10.5; expected whole number >= 0"),
        ("seed='5'", "seed: found text '5'; expected whole number >= 0"),
        ("seed=true", "seed: found true"),
        ("seed=010", "seed: found text '010'"),
        ("seed.x=1", "seed: found mapping {x: 1}; expected whole number"),
        ("method.optim.lr=[1]", "method.optim.lr: found list [1]; expected number > 0"),
        ("method.optim.lr=true", "method.optim.lr: found true"),
        ("method.optim.lr=.inf", "method.optim.lr: found .inf"),
        ("method.optim.lr=0", "method.optim.lr: found 0; expected number > 0"),
        ("method.optim.betas=[0.5]", "method.optim.betas: found list [0.5]; expected list of 2"),
        ("method=1", "method: found 1; expected mapping with the keys name, gan_weight, optim"),
        ("train.ema_decay=1", "train.ema_decay: found 1; expected number >= 0 and < 1"),
        ("evaluate.steps=[]", "evaluate.steps: found list []; expected list of (whole number > 0), at least 1"),
        ("evaluate.steps=[1, x]", "evaluate.steps: found list [1, x]; expected list of (whole number > 0)"),
        ("train.mixed_precision=bf61", "expected auto, no, bf16, fp16; did you mean 'bf16'?"),
        ("data.source=folder", "data: path: found null with source folder"),
        ("data.source=labels", "data: num_labels: found null with source labels"),
        ("data.path=x", "data: path: found 'x' with source fashion"),
        ("batch_size=", "batch_size: found null; expected whole number > 0"),
        ("log_every=5", "log_every: unknown key; did you mean 'log.every'?"),
        ("validate_every=5", "validate_every: unknown key; did you mean 'log.samples_every'?"),
        ("keep_checkpoints=1", "keep_checkpoints: unknown key; did you mean 'checkpoint.keep'?"),
        ("lora.rank=4", "lora: unknown key; did you mean 'train.student'?"),
        ("student=lora", "student: unknown key; did you mean 'train.student'?"),
        ("init_from=x", "init_from: unknown key; did you mean 'train.init_from'?"),
        ("init_form=x", "init_form: unknown key; did you mean 'train.init_from'?"),
        ("train.acumulate=2", "train.acumulate: unknown key; did you mean 'accumulate'?"),
        ("train.log_every=2", "train.log_every: unknown key; did you mean 'log.every'?"),
        (
            "train.student={kind: lroa}",
            "train.student.kind: found text 'lroa'; expected full, lora; did you mean 'lora'?",
        ),
        ("train.student={rank: 4}", "train.student.kind: missing; expected full, lora"),
        (
            "train.student=lora",
            "train.student: found text 'lora'; expected mapping with the key kind, which is one of full",
        ),
        ("train.student={kind: lora, rnk: 4}", "train.student.rnk: unknown key; did you mean 'rank'?"),
        ("train.student={kind: lora, rank: x}", "train.student.rank: found text 'x'; expected whole number > 0"),
        ("train.student={kind: full, rank: 4}", "train.student.rank: unknown key; expected one of kind"),
        (
            "train.student={kind: lora, base_dtype: bf16}",
            "train: student.base_dtype: found bf16; expected fp32 or mixed_precision, which is no. Set",
        ),
    ],
)
def test_messages(file: Path, override: str, expected: str) -> None:
    text = message(file, override)
    assert text.startswith(f"{file}: 1 problem\n  ") and expected in text, text


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("teacher.x=1", "override 'teacher.x=1': found teacher: text 'fashion'; expected a mapping, which has keys"),
        ("foo", "override: found 'foo'; expected the form key.path=value"),
        ("a..b=1", "override: found 'a..b=1'; expected the form key.path=value"),
        ("seed=[1", "override 'seed=[1', line 1: found "),
    ],
)
def test_bad_overrides(file: Path, word: str, expected: str) -> None:
    text = message(file, word)
    assert text.startswith(expected) and "\n" not in text


def test_command_line_of_a_script() -> None:
    words = read_words(["--config", "a.yaml", "seed=1", "--resume", "latest"])
    assert words.file == "a.yaml" and words.overrides == ("seed=1", "checkpoint.resume=latest")
    assert read_words(["--config=a.yaml", "--resume=x"]).overrides == ("checkpoint.resume=x",)
    assert read_words(["--config", "a.yaml", "-h"]).file is None


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--confg"], "option: found '--confg'; expected --config FILE "),
        (["--seed=1"], "A key is set without dashes: seed=1"),
        (["--resume"], "--resume: found no value; expected --config FILE "),
        ([], "--config: found nothing; expected --config FILE "),
        (["seed=1", "a.yaml"], "Did you mean --config a.yaml?"),
    ],
)
def test_bad_command_line(words: list[str], expected: str) -> None:
    with pytest.raises(FewstepError) as e:
        read_words(words)
    assert expected in str(e.value) and "\n" not in str(e.value)


def test_what_an_error_has(file: Path) -> None:
    with pytest.raises(FewstepError) as e:
        load(file, "seed=x", "sede=1")
    assert (e.value.key, e.value.found, e.value.expected) == ("seed", "text 'x'", "whole number >= 0")
    assert [p.key for p in pickle.loads(pickle.dumps(e.value)).problems] == ["seed", "sede"]


def test_changes_at_any_depth() -> None:
    old = {"a": {"b": 1, "c": 2}, "student": {"kind": "lora", "rank": 4}, "d": 0}
    new = {"a": {"b": 3}, "student": {"kind": "full"}, "e": {}}
    assert merged(old, new) == {"a": {"b": 3, "c": 2}, "student": {"kind": "full"}, "d": 0, "e": {}}
    assert merged(old, {"student": {"rank": 2}})["student"] == {"kind": "lora", "rank": 2}
    assert old["a"] == {"b": 1, "c": 2}


def test_bad_files(file: Path, tmp_path: Path) -> None:
    with pytest.raises(
        MissingError, match=r"^config file: found .*b\.yaml, which does not exist; expected a YAML file$"
    ):
        load(tmp_path / "b.yaml")
    assert message(tmp_path).startswith(f"config file: found {tmp_path}, which cannot be read (")
    for text, expected in (
        ("seed: 1\nseed: 2\n", ", line 2: found duplicate key 'seed'; expected YAML"),
        ("method:\n  optim: {lr: 1, lr: 2}\n", ", line 2: found duplicate key 'lr'; expected YAML"),
        ("- 1", ": found list [1]; expected a mapping of keys to values"),
        ("a: [", ", line 1: found expected the node content, but found '<stream end>'"),
        ("a: !!python/name:os.system", ", line 1: found could not determine a constructor"),
    ):
        file.write_text(text)
        assert message(file).startswith(f"{file}{expected}")
    file.write_text("")
    assert message(file).startswith(f"{file}: 6 problems\n  teacher: missing; expected text\n  method: missing; ")


def test_help() -> None:
    text = "\n".join(help_lines(Config))
    for expected in (
        "\nbatch_size: whole number > 0 (required)\n    Samples per process and micro-batch.\n",
        "\nmethod: mapping (required)\n    Settings of the method, which its key `name` names.\n  name: text = \n",
        "\n  gan_weight: number = 0.5\n",
        "\n  student: mapping\n",
        "\n    kind: full = full\n        A whole network.\n    or\n    kind: lora = lora\n",
        "\n    betas: list of 2 (number >= 0 and < 1, number >= 0 and < 1) = [0.9, 0.999]\n",
        "\nevaluate: mapping or null = null\n",
        "\n  steps: list of (whole number > 0), at least 1 = [1, 2, 4, 8]\n",
        "\nexport: mapping\n    The exported pipeline.\n  dtype: fp32, fp16, bf16 = fp32\n",
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
    (tmp_path / "a.yaml").write_text("kind: sd\nsede: 1\n" if script.stem == "teacher" else "sede: 1\n")
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
