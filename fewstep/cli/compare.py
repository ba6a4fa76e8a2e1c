"""`fewstep compare`: two pipelines image by image, from the same initial noise."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep import io
from fewstep.cli.options import (
    PIPELINE_HELP,
    Commands,
    add_drawing,
    add_guidance,
    at_least,
    load_pipeline,
    one_progress_bar,
)
from fewstep.cli.protocol import add_protocol, protocol_of
from fewstep.errors import FewstepError

if TYPE_CHECKING:
    from torch import Tensor


def compare(args: argparse.Namespace) -> None:
    if len(args.steps) > 2:
        raise FewstepError("--steps", f"{len(args.steps)} counts", "one for both pipelines, or one for each")
    name, protocol, overrides = protocol_of(args, max(2, args.pairs))
    import torch

    from fewstep.evaluate import grid, load_features, recommended_guidance_scale
    from fewstep.evaluate.compare import Candidate, distances, draw, paired
    from fewstep.evaluate.conditions import load_conditions
    from fewstep.evaluate.generate import condition_kind, num_labels
    from fewstep.evaluate.protocol import View

    one_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    first = protocol.comparisons[0] if protocol.comparisons else None
    features = load_features(first.features if first else "fashion").to(device)
    view = first.view if first else View()
    calls = [("A", args.a, args.steps[0]), ("B", args.b, args.steps[-1])]
    if args.teacher is not None:
        calls.insert(0, ("teacher", args.teacher, args.teacher_steps))
    images: dict[str, Tensor] = {}
    for role, path, steps in calls:
        scale = args.guidance_scale if args.guidance_scale is not None else recommended_guidance_scale(path)
        who = Candidate(path, load_pipeline(path, args.dtype, device), steps, scale)
        what = load_conditions(protocol, condition_kind(who.pipeline), num_labels(who.pipeline), name, overrides)
        conditions = list(what.conditions[: args.pairs])
        images[role] = draw(who, conditions, seed=protocol.seed, batch_size=args.batch_size, uint8=protocol.uint8)
        who.pipeline.to("cpu")
    gaps = distances(images["A"], images["B"], features, view)
    between = {key: float(value.mean()) for key, value in gaps.items()}
    to_teacher: dict[str, Mapping[str, float]] = {}
    if args.teacher is not None:
        a, b = (distances(images[role], images["teacher"], features, view) for role in ("A", "B"))
        to_teacher = {key: paired(a[key], b[key]) for key in a}
    result = {
        "protocol": {"name": name, "hash": protocol.hash(), "features": features.name},
        "pairs": args.pairs,
        "models": {role: {"pipeline": path, "steps": steps} for role, path, steps in calls},
        "between": between,
        **({"to_teacher": to_teacher} if to_teacher else {}),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    io.write_json(result, args.output.with_suffix(".json"))
    labels = [f"{role}, {steps} step{'s' * (steps > 1)}" for role, _, steps in calls]
    grid([images[role][:16] for role, *_ in calls], labels).save(args.output.with_suffix(".png"))
    print(_comparison_text(between, to_teacher, args.pairs))
    print(f"written to {args.output.with_suffix('.png')} and {args.output.with_suffix('.json')}")


def _comparison_text(between: Mapping[str, float], to_teacher: Mapping[str, Mapping[str, float]], pairs: int) -> str:
    lines = [f"{key}: A to B {value:.4f}" for key, value in between.items()]
    for key, p in to_teacher.items():
        lines.append(
            f"{key} to the teacher: A {p['a']:.4f}, B {p['b']:.4f}, difference {p['difference']:.4f} "
            f"+- {p['standard_error']:.4f}; A closer in {100 * p['a_closer']:.0f} % of {pairs} pairs"
        )
    return "\n".join(lines)


def add_compare(commands: Commands) -> None:
    c = commands.add_parser("compare", help="two pipelines image by image, from the same initial noise")
    c.add_argument("a", metavar="A", help=PIPELINE_HELP)
    c.add_argument("b", metavar="B", help="the other one")
    c.add_argument("--pairs", type=at_least(1), default=64, help="pairs of images (default: 64)")
    c.add_argument("--steps", type=at_least(1), nargs="+", required=True, help="steps of both, or of A and of B")
    c.add_argument("--teacher", metavar="PIPELINE", help="measure how far each is from this one's images")
    c.add_argument("--teacher-steps", type=at_least(1), default=50, help="(default: 50)")
    c.add_argument("--batch-size", type=at_least(1), default=64, help="images drawn at once (default: 64)")
    c.add_argument(
        "--output", type=Path, default=Path("comparison"), help="a .png and a .json of this name (default: comparison)"
    )
    add_guidance(c)
    add_drawing(c)
    add_protocol(c)
    c.set_defaults(run=compare, seed=None)
