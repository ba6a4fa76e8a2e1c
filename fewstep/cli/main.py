"""The command `fewstep`: the parser of all commands, and drawing samples."""

import argparse
import os
import sys
from pathlib import Path

from fewstep._version import __version__
from fewstep.cli.commands import add_commands
from fewstep.cli.options import (
    PIPELINE_HELP,
    add_drawing,
    add_guidance,
    at_least,
    check_output,
    guidance,
    load_pipeline,
)
from fewstep.errors import FewstepError


def _sample(args: argparse.Namespace) -> None:
    from PIL import Image

    check_output(args.output)
    if args.output.suffix.lower() not in Image.registered_extensions():
        raise FewstepError("--output", args.output, f"an image file, such as {args.output.with_suffix('.png')}")
    import torch

    from fewstep.evaluate import grid, sample
    from fewstep.evaluate.generate import condition_kind

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = load_pipeline(args.pipeline, args.dtype, device)
    kind = condition_kind(pipeline)
    given = {"prompt": args.prompt, "label": args.label, "none": [None]}[kind]
    if not given:
        raise FewstepError(f"--{kind}", "nothing", "one or more, which this pipeline needs")
    rows = []
    for row, condition in enumerate(given):
        indices = range(row * args.num_images, (row + 1) * args.num_images)
        rows.append(
            sample(
                pipeline,
                [condition] * args.num_images,
                indices,
                steps=args.steps,
                seed=args.seed,
                guidance_scale=guidance(args),
            )
        )
    grid(rows, min_size=1).save(args.output)
    print(f"written to {args.output}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fewstep", description="Few-step generators from diffusers pipelines.")
    parser.add_argument("--version", action="version", version=f"fewstep {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    add_commands(commands)
    s = commands.add_parser("sample", help="draw images into one picture, a row per prompt or label")
    s.add_argument("pipeline", metavar="PIPELINE", help=PIPELINE_HELP)
    add_guidance(s)
    add_drawing(s)
    s.add_argument("--prompt", nargs="+", help="prompts of a text-to-image pipeline")
    s.add_argument("--label", type=int, nargs="+", help="labels of a class-conditional pipeline")
    s.add_argument("--num-images", type=at_least(1), default=1, help="images per row (default: 1)")
    s.add_argument("--steps", type=at_least(1), required=True, help="network evaluations, as num_inference_steps")
    s.add_argument("--output", type=Path, required=True, help="the picture's file, e.g. x.png")
    s.set_defaults(run=_sample)
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if "overrides" in args and not any(word.startswith("-") for word in rest):
        args.overrides += rest  # argparse takes positionals in one place only, before or after the options
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        args.run(args)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as e:
        raise SystemExit(f"fewstep {args.command}: {e}") from None
