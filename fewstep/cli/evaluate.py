"""`fewstep evaluate`: scores and time of a pipeline, or of a folder of images."""

import argparse
from pathlib import Path

from fewstep.assets import ASSETS
from fewstep.cli.options import (
    PIPELINE_HELP,
    Commands,
    add_drawing,
    add_guidance,
    at_least,
    check_output,
    guidance,
    load_pipeline,
    one_progress_bar,
)
from fewstep.cli.protocol import add_protocol, protocol_of
from fewstep.errors import FewstepError


def evaluate(args: argparse.Namespace) -> None:
    check_output(args.output)
    drawn = _is_pipeline(args.pipeline)
    if not drawn and (args.keep is not None or args.guidance_scale is not None):
        raise FewstepError(
            "PIPELINE", f"images in {args.pipeline}", "a pipeline", "For images, leave out --keep and --guidance-scale"
        )
    one_progress_bar()
    name, protocol, overrides = protocol_of(args, args.num_images)
    # What is missing is reported before any weight is loaded.
    from fewstep.evaluate import (
        describe_protocol,
        evaluate_images,
        evaluate_protocol,
        fingerprints,
        format_table,
        write_report,
    )

    settings = describe_protocol(protocol, name=name, batch_size=args.batch_size, overrides=overrides)
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator()
    model = args.name or args.pipeline
    if drawn:
        pipeline = load_pipeline(args.pipeline, args.dtype, accelerator.device)
        rows = evaluate_protocol(
            pipeline,
            protocol,
            protocol_name=name,
            overrides=overrides,
            name=model,
            steps=args.steps,
            batch_size=args.batch_size,
            guidance_scale=guidance(args),
            accelerator=accelerator,
            keep=args.keep,
        )
        own = fingerprints(pipeline)
        rows = [row | {"fingerprints": own} for row in rows]
    else:
        rows = evaluate_images(
            args.pipeline,
            protocol,
            protocol_name=name,
            overrides=overrides,
            name=model,
            batch_size=args.batch_size,
            device=accelerator.device,
            dtype=torch.float64 if args.dtype == "fp64" else torch.float32,
            accelerator=accelerator,
        )
    if accelerator.is_main_process:
        write_report(args.output, {"pipeline": args.pipeline, "dtype": args.dtype, **settings}, rows)
        print(format_table(rows))
        print(f"protocol {name}, {settings['hash']}; written to {args.output}")
    accelerator.end_training()


def add_evaluate(commands: Commands) -> None:
    e = commands.add_parser("evaluate", help="scores and time of a pipeline at several step counts, by a protocol")
    e.add_argument("pipeline", metavar="PIPELINE", help=f"{PIPELINE_HELP}; or a folder of images")
    add_guidance(e)
    add_drawing(e)
    add_protocol(e)
    e.add_argument("--steps", type=at_least(1), nargs="+", default=[1, 2, 4, 8], help="step counts (default: 1 2 4 8)")
    e.add_argument("--num-images", type=at_least(2), help="images per step count (default: the protocol's, or 2000)")
    e.add_argument(
        "--batch-size", type=at_least(1), default=100, help="images drawn at once in a process (default: 100)"
    )
    e.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="keep finished batches here; the same command goes on from them"
    )
    e.add_argument("--name", help="what the report calls the model (default: PIPELINE)")
    e.add_argument("--output", type=Path, default=Path("evaluation.json"), help="(default: evaluation.json)")
    e.set_defaults(run=evaluate, seed=None)


def _is_pipeline(name: str) -> bool:
    """False for images. Raises FewstepError for a folder of neither, such as that of a run."""
    from fewstep.data import IMAGE_SUFFIXES

    path = Path(name)
    if name in ASSETS or not path.exists() or (path / "model_index.json").exists():
        return True
    if (path / "pipeline" / "model_index.json").exists():
        raise FewstepError("PIPELINE", f"{name}, the folder of a run", f"its pipeline, {path / 'pipeline'}")
    suffixes = (*IMAGE_SUFFIXES, ".parquet", ".npz")
    if path.suffix.lower() not in suffixes and not any(f.suffix.lower() in suffixes for f in path.rglob("*")):
        raise FewstepError(
            "PIPELINE", f"{name}, without a model_index.json and without images", "a pipeline, or a folder of images"
        )
    return False
