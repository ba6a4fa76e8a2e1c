"""The command `fewstep`: evaluate a pipeline, draw samples from one."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.assets import ASSETS, asset_path

if TYPE_CHECKING:
    import torch

PIPELINE_HELP = f"folder or hub id of a diffusers pipeline, or an embedded one: {', '.join(ASSETS)}"


def _load_pipeline(name: str, dtype: str, device: "torch.device") -> Any:
    import torch
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    # The one progress bar is that of the images.
    logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    path = str(asset_path(name) / "pipeline") if name in ASSETS else name
    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    try:
        return DiffusionPipeline.from_pretrained(path, dtype=dtypes[dtype]).to(device)
    except (OSError, ValueError) as e:
        reason = str(e).strip().splitlines()[0]
        raise SystemExit(f"pipeline {name!r} cannot be loaded as a folder or from the hub: {reason}") from None


def _guidance(args: argparse.Namespace) -> float | None:
    from fewstep.evaluate import recommended_guidance_scale

    given: float | None = args.guidance_scale
    return recommended_guidance_scale(args.pipeline) if given is None else given


def _evaluate(args: argparse.Namespace) -> None:
    from fewstep.evaluate.reference import resolve

    sources = {"reference": args.reference, "features": args.features, "clip": args.clip, "prompts": args.prompts}
    resolve(**sources)  # A wrong name is told before any weight loads.
    from accelerate import Accelerator

    from fewstep.evaluate import evaluate, format_table, protocol, write_report

    accelerator = Accelerator()
    rows = evaluate(
        _load_pipeline(args.pipeline, args.dtype, accelerator.device),
        name=args.name or args.pipeline,
        steps=args.steps,
        num_images=args.num_images,
        seed=args.seed,
        batch_size=args.batch_size,
        guidance_scale=_guidance(args),
        accelerator=accelerator,
        **sources,
    )
    if accelerator.is_main_process:
        settings = protocol(num_images=args.num_images, seed=args.seed, batch_size=args.batch_size, **sources)
        write_report(args.output, {"pipeline": args.pipeline, "dtype": args.dtype, **settings}, rows)
        print(format_table(rows))
        print(f"written to {args.output}")
    accelerator.end_training()


def _sample(args: argparse.Namespace) -> None:
    import torch

    from fewstep.evaluate import grid, sample
    from fewstep.evaluate.generate import condition_kind

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = _load_pipeline(args.pipeline, args.dtype, device)
    kind = condition_kind(pipeline)
    given = {"prompt": args.prompt, "label": args.label, "none": [None]}[kind]
    if not given:
        raise SystemExit(f"this pipeline wants --{kind}")
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
                guidance_scale=_guidance(args),
            )
        )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    grid(rows, min_size=1).save(args.output)
    print(f"written to {args.output}")


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pipeline", metavar="PIPELINE", help=PIPELINE_HELP)
    parser.add_argument(
        "--guidance-scale",
        type=float,
        help="default: what the embedded pipeline recommends, else the pipeline's own default",
    )
    parser.add_argument("--seed", type=int, default=0, help="noise of image i is fixed by (seed, i) (default: 0)")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="(default: fp32)")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fewstep", description="Few-step generators from diffusers pipelines.")
    commands = parser.add_subparsers(dest="command", required=True)

    e = commands.add_parser("evaluate", help="FID, CLIP score and time of a pipeline at several step counts")
    _common(e)
    e.add_argument(
        "--reference", default="fashion", help="fashion, a .npz or .safetensors of statistics, or a folder of images"
    )
    e.add_argument(
        "--features", metavar="FOLDER", help="transformers image model whose pooled features FID is measured in"
    )
    e.add_argument("--clip", metavar="FOLDER", help="transformers CLIPModel of the CLIP score, or none")
    e.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt a line, taken in order and repeated")
    e.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8], help="step counts (default: 1 2 4 8)")
    e.add_argument("--num-images", type=int, default=2000, help="images per step count (default: 2000)")
    e.add_argument("--batch-size", type=int, default=100, help="images drawn at once in a process (default: 100)")
    e.add_argument("--name", help="what the report calls the model (default: PIPELINE)")
    e.add_argument("--output", type=Path, default=Path("evaluation.json"), help="(default: evaluation.json)")
    e.set_defaults(run=_evaluate)

    s = commands.add_parser("sample", help="draw images into one picture, a row per prompt or label")
    _common(s)
    s.add_argument("--prompt", nargs="+", help="prompts of a text-to-image pipeline")
    s.add_argument("--label", type=int, nargs="+", help="labels of a class-conditional pipeline")
    s.add_argument("--num-images", type=int, default=1, help="images per row (default: 1)")
    s.add_argument("--steps", type=int, required=True, help="network evaluations, as num_inference_steps")
    s.add_argument("--output", type=Path, required=True, help="the picture's file, e.g. x.png")
    s.set_defaults(run=_sample)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        args.run(args)
    except ValueError as e:
        raise SystemExit(f"fewstep {args.command}: {e}") from None


if __name__ == "__main__":
    main(sys.argv[1:])
