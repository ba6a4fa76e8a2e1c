"""The scripts in `train/`: `--config FILE [key.path=value ...] [--resume latest] [--help]`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from fewstep.cli.train import keys, train_run, train_teacher
from fewstep.errors import FewstepError
from fewstep.methods.registry import load_run, names

USAGE = "--config FILE [key.path=value ...] [--resume latest] [--help]"


@dataclass(frozen=True)
class Words:
    """A script's command line; `file` is None where help is asked for."""

    file: str | None
    overrides: tuple[str, ...]


def read_words(argv: Sequence[str]) -> Words:
    """The parts of a script's command line. Raises FewstepError."""
    file: str | None = None
    overrides: list[str] = []
    rest = iter(argv)
    for word in rest:
        option, equals, value = word.partition("=")
        if word in ("--help", "-h"):
            return Words(None, ())
        if option in ("--config", "--resume"):
            value = value if equals else next(rest, "")
            if not value:
                raise FewstepError(option, "no value", USAGE)
            file = value if option == "--config" else file
            overrides += [f"checkpoint.resume={value}"] if option == "--resume" else []
        elif word.startswith("-"):
            hint = f"A key is set without dashes: {word.lstrip('-')}" if equals else None
            raise FewstepError("option", repr(word), USAGE, hint)
        else:
            overrides.append(word)
    if file is None:
        first = next((word for word in overrides if "=" not in word), None)
        raise FewstepError("--config", "nothing", USAGE, f"Did you mean --config {first}?" if first else None)
    return Words(file, tuple(overrides))


def train(script: str) -> None:
    """Run the training that the command line of `train/<script>.py` asks for."""
    try:
        words = read_words(sys.argv[1:])
        config = load_run(words.file, words.overrides, script) if words.file else None
    except FewstepError as e:
        raise SystemExit(str(e)) from None
    if config is None:
        print(f"usage: {sys.argv[0]} {USAGE}", *keys(names(script)), sep="\n")
    else:
        train_run(config)


def train_a_teacher() -> None:
    """Run the training of a teacher that the command line asks for."""
    from fewstep.config.help import help_lines
    from fewstep.pretrain.config import TeacherTraining, load_training

    try:
        words = read_words(sys.argv[1:])
        config = load_training(words.file, words.overrides) if words.file else None
    except FewstepError as e:
        raise SystemExit(str(e)) from None
    if config is None:
        print(f"usage: {sys.argv[0]} {USAGE}", *help_lines(TeacherTraining), sep="\n")
    else:
        train_teacher(config)
