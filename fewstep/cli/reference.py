"""`fewstep reference`: statistics of real images, or of a teacher's."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.cli.options import (
    Commands,
    add_drawing,
    add_guidance,
    at_least,
    check_output,
    load_pipeline,
    one_progress_bar,
)
from fewstep.cli.protocol import Options, asked
from fewstep.errors import FewstepError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fewstep.evaluate.protocol import View


def reference(args: argparse.Namespace) -> None:
    check_output(args.output)
    from fewstep.evaluate.statistics import SUFFIXES

    if args.output.suffix not in SUFFIXES:
        raise FewstepError("--output", args.output, f"a file of statistics, which ends in {' or '.join(SUFFIXES)}")
    features, view = _lens(args)
    import torch
    from tqdm import tqdm

    from fewstep.evaluate import load_features
    from fewstep.evaluate.real_images import real_images
    from fewstep.evaluate.references import collect
    from fewstep.evaluate.statistics import Statistics, save_statistics

    one_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = real_images(args.source) if args.steps is None else _drawn(args, device)
    made = collect(tqdm(images, unit="image"), load_features(features).to(device), view, keep=not args.moments_only)
    metadata = {**made.metadata, "source": args.source} | ({} if args.steps is None else {"steps": str(args.steps)})
    save_statistics(Statistics(made.moments, made.features, None, metadata), args.output)
    assert made.moments is not None  # collect made them
    count, d = made.moments.count, len(made.moments.mean)
    print(f"{count} images, {d} dimensions of {features}; written to {args.output}")
    if count is not None and count <= d:
        print(
            f"images: found {count}; expected more than dimensions. Compare distances to these statistics by as many images only"
        )


def _lens(args: argparse.Namespace) -> "tuple[str, View]":
    """Features and view: those of the options, or of a comparison of the protocol."""
    from fewstep.evaluate import load_protocol
    from fewstep.evaluate.protocol import View

    if args.protocol is None:
        return args.features or "fashion", View()
    name, protocol = load_protocol(args.protocol)
    known = {c.name: c for c in protocol.comparisons}
    if args.comparison not in known:
        names = ", ".join(map(repr, known)) or "none"
        raise FewstepError("--comparison", repr(args.comparison), f"one of protocol {name}: {names}")
    return args.features or known[args.comparison].features, known[args.comparison].view


def _drawn(args: argparse.Namespace, device: "torch.device") -> "Iterator[Tensor]":
    """A pipeline's images, one by one."""
    from fewstep.evaluate import recommended_guidance_scale, sample
    from fewstep.evaluate.conditions import load_conditions
    from fewstep.evaluate.generate import batches, condition_kind, num_labels

    name, protocol, overrides = asked(Options(args.protocol, args.num_images, args.seed, prompts=args.prompts))
    scale = recommended_guidance_scale(args.source) if args.guidance_scale is None else args.guidance_scale
    pipeline = load_pipeline(args.source, args.dtype, device)
    what = load_conditions(protocol, condition_kind(pipeline), num_labels(pipeline), name, overrides)
    for part in batches(protocol.images, args.batch_size):
        conditions = [what.conditions[i] for i in part]
        yield from sample(
            pipeline, conditions, part, steps=args.steps, seed=protocol.seed, guidance_scale=scale,
            uint8=protocol.uint8,
        )  # fmt: skip


def add_reference(commands: Commands) -> None:
    r = commands.add_parser(
        "reference", help="statistics of real images, or of a teacher's, for `evaluate --reference`"
    )
    r.add_argument(
        "source",
        metavar="SOURCE",
        help="folder of images, parquet file or folder of them, owner/name[:split] of either in the hub's cache, ADM's .npz with "
        "arr_0, or fashion; with --steps, a pipeline",
    )
    r.add_argument("--output", type=Path, required=True, help=".npz or .safetensors")
    r.add_argument("--features", metavar="NAME", help="as for evaluate (default: the protocol's, or fashion)")
    r.add_argument("--protocol", metavar="NAME|FILE", help="take features and view from this protocol")
    r.add_argument(
        "--comparison", default="", metavar="NAME", help="which of the protocol's comparisons (default: the unnamed)"
    )
    r.add_argument("--moments-only", action="store_true", help="leave out the features, which KID, precision, ... need")
    r.add_argument("--steps", type=at_least(1), help="SOURCE is a pipeline: draw its images in so many steps")
    r.add_argument("--num-images", type=at_least(2), help="images to draw (default: the protocol's, or 2000)")
    r.add_argument("--batch-size", type=at_least(1), default=100, help="images drawn at once (default: 100)")
    r.add_argument("--prompts", type=Path, metavar="FILE", help="prompts of the images to draw")
    add_guidance(r)
    add_drawing(r)
    r.set_defaults(run=reference, seed=None)
