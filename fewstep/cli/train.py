"""`fewstep train`: a training from a recipe or a file, on one process or several."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.cli.options import CONFIG_HELP, Commands, at_least
from fewstep.config import MethodConfig, RunConfig, check, read
from fewstep.config.help import help_lines
from fewstep.config.recipes import accelerate_files, locate_recipe
from fewstep.errors import FewstepError, MissingError
from fewstep.methods.registry import check_run, method_class, name_in, names, settings_class

if TYPE_CHECKING:
    from fewstep.pretrain.config import Training


def train(args: argparse.Namespace) -> None:
    from fewstep.pretrain.config import is_training, training_class

    path = locate_recipe(args.recipe)
    overrides = [*args.overrides, *([f"checkpoint.resume={args.resume}"] if args.resume else [])]
    raw = read(path, overrides)
    if args.keys:
        name = name_in(raw, str(path))
        print(*(help_lines(training_class(raw)) if is_training(raw) else keys([name] if name else names())), sep="\n")
    elif is_training(raw):
        if args.processes or args.accelerate_config:
            raise FewstepError("--processes", "several", "one, in the training of a teacher")
        train_teacher(check(training_class(raw), raw, str(path)))
    else:
        config = check_run(raw, str(path))
        if args.processes or args.accelerate_config:
            launch(["train", str(path), *overrides], args.processes, args.accelerate_config)
        train_run(config)


def keys(methods: Sequence[str]) -> Iterator[str]:
    """Every key of a run with these methods, a line or more each."""
    classes = list(dict.fromkeys(map(settings_class, methods)))
    return help_lines(RunConfig[MethodConfig], methods=classes)


def train_run(config: RunConfig[MethodConfig]) -> None:
    """Train in this process; loads torch, so that errors in the config are reported before. Errors end the program."""
    method = method_class(config.method.name)
    from fewstep.training.run import run

    try:
        run(config, method)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None


def train_teacher(config: "Training") -> None:
    """Train a teacher in this process."""
    from fewstep.pretrain.config import DigitsTraining, DiTTraining, SD3Training

    if isinstance(config, DigitsTraining):
        from fewstep.pretrain import digits

        digits.run(config)
    elif isinstance(config, DiTTraining):
        from fewstep.pretrain import dit

        dit.run(config)
    elif isinstance(config, SD3Training):
        from fewstep.pretrain import sd3

        sd3.run(config)
    else:
        from fewstep.pretrain.run import run

        run(config)


def launched() -> bool:
    """Whether a launcher, accelerate's or torchrun, has started this process."""
    return bool({"LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"} & set(os.environ))


def launch(words: Sequence[str], processes: int | None, config: Path | None) -> None:
    """Replace this process by accelerate's launcher of `fewstep WORDS`. Raises FewstepError within a launcher."""
    option = "--processes" if processes else "--accelerate-config"
    if launched():
        raise FewstepError(option, "it under a launcher, which has chosen already", "a start without a launcher")
    config = None if config is None else _accelerate_file(config)
    if config is None and not _has_gpu():
        os.environ["ACCELERATE_USE_CPU"] = "true"  # without it, each of several processes would train by itself
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *launch_words(processes, config), "-m", "fewstep", *words])


def _accelerate_file(word: Path) -> Path:
    """A file of `accelerate config`, otherwise the package's of that name."""
    known = accelerate_files()
    if word.is_file() or str(word) in known:
        return word if word.is_file() else known[str(word)]
    expected = f"a file written by `accelerate config`, or {' or '.join(known)}"
    raise MissingError("--accelerate-config", f"{word}, which does not exist", expected)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available() or torch.xpu.is_available()


def launch_words(processes: int | None, config: Path | None) -> list[str]:
    """The words of accelerate's launcher, after the interpreter and before the program."""
    words = ["-m", "accelerate.commands.launch"]
    if config is not None:
        words += ["--config_file", str(config)]
    if processes is not None:
        words += ["--num_processes", str(processes)]
    if config is None:
        words += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        words += ["--multi_gpu", "--main_process_port", "0"] if processes and processes > 1 else []
    return words


def add_train(commands: Commands) -> None:
    c = commands.add_parser("train", help="train, export and score a student; or a teacher")
    c.add_argument("recipe", metavar="RECIPE|FILE", help=CONFIG_HELP)
    c.add_argument("overrides", nargs="*", metavar="key.path=value", help="keys that differ from the file")
    c.add_argument(
        "--resume", metavar="latest|CHECKPOINT", help="go on from a checkpoint of output_dir, or a folder of one"
    )
    c.add_argument("--processes", type=at_least(1), help="processes on this machine, one a GPU (default: this one)")
    c.add_argument(
        "--accelerate-config",
        type=Path,
        metavar="FILE|NAME",
        help="launch as a file of `accelerate config` says, or the package's ddp or two_machines",
    )
    c.add_argument("--keys", action="store_true", help="print every key with its meaning, and exit")
    c.set_defaults(run=train)
