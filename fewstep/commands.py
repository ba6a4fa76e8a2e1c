"""The commands about scores: evaluate, reference, compare, report."""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.assets import ASSETS, asset_path

if TYPE_CHECKING:
    import torch

    from fewstep.evaluate import Given, Protocol

PIPELINE_HELP = f"folder or hub id of a diffusers pipeline, or an embedded one: {', '.join(ASSETS)}"


# Shared ---------------------------------------------------------------------------------------------------------------


def load_pipeline(name: str, dtype: str, device: "torch.device") -> Any:
    """A pipeline on its device; SystemExit, in one sentence, for one that cannot be loaded."""
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
    # A broken folder ends in any of these, according to what is broken.
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError) as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise SystemExit(f"pipeline {name!r} cannot be loaded as a folder or from the hub: {reason}") from None


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option that counts something."""

    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"found {text}; allowed: whole numbers of {least} or more")
        return int(text)

    return count


def check_output(path: Path) -> None:
    """OSError or ValueError, before the work is done, where its result cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise ValueError(f"--output {path} is a folder; a file is wanted")


def guidance(args: argparse.Namespace) -> float | None:
    from fewstep.evaluate import recommended_guidance_scale

    given: float | None = args.guidance_scale
    return recommended_guidance_scale(args.pipeline) if given is None else given


def add_guidance(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--guidance-scale",
        type=float,
        help="default: what the embedded pipeline recommends, else the pipeline's own default",
    )


def add_drawing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="noise of image i is fixed by (seed, i) (default: 0)")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="(default: fp32)")


def add_protocol(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--protocol", metavar="NAME|FILE", help="a named protocol (see configs/protocols) or a YAML file of one"
    )
    parser.add_argument(
        "--reference",
        action="append",
        metavar="[COMPARISON=]PATH",
        help="fashion, a .npz or .safetensors of statistics, or a folder of images; with --protocol, where its own lie "
        "(default: fashion, or the protocol's)",
    )
    parser.add_argument(
        "--features",
        metavar="NAME",
        help="what FID is measured in: fashion, inception, inception-clean, efficientnet-lite0, module:function, or the folder "
        "or cached hub id of a transformers image model",
    )
    parser.add_argument("--clip", metavar="FOLDER", help="transformers CLIPModel of the CLIP score, or none")
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="one prompt a line, or .jsonl; taken in order and repeated"
    )
    parser.add_argument(
        "--teacher-statistics",
        metavar="FILE",
        help="statistics of a teacher's images (fewstep reference PIPELINE --steps N), for fid_to_teacher",
    )


def _protocol(args: argparse.Namespace, num_images: int | None) -> "tuple[str, Protocol, Given]":
    """What the options ask for: a named protocol with its changes told in its name, or the unnamed one."""
    from fewstep.evaluate import Given, load_protocol
    from fewstep.evaluate.reference import protocol_of, resolve

    references = dict(_named(item) for item in args.reference or [])
    if args.protocol is None:
        if len(references) > 1 or set(references) - {""}:
            raise ValueError("--reference COMPARISON=PATH needs a --protocol with that comparison")
        sources = resolve(references.get("", "fashion"), args.features, args.clip, args.prompts)
        protocol = protocol_of(sources, num_images=num_images or 2000, seed=args.seed or 0)
        return _with_teacher("custom", protocol, Given({}), args)
    name, protocol = load_protocol(args.protocol)
    if args.features is not None:
        raise ValueError(f"--features belong to the protocol {name}: copy its YAML file and change them there")
    unknown = set(references) - {c.name for c in protocol.comparisons}
    if unknown:
        raise ValueError(f"--reference: protocol {name} has no comparison {', '.join(map(repr, sorted(unknown)))}")
    if args.prompts is not None and not args.prompts.is_file():
        raise ValueError(f"prompts {str(args.prompts)!r} is not a file")
    changes: dict[str, Any] = {}
    if num_images is not None and num_images != protocol.images:
        changes["images"] = num_images
    if args.seed is not None and args.seed != protocol.seed:
        changes["seed"] = args.seed
    settings = protocol.model_dump(mode="json")
    if args.clip == "none":
        changes["clip"] = None
    elif args.clip is not None and protocol.clip is not None and protocol.clip.model is None:
        changes["clip"] = {**settings["clip"], "model": args.clip}
    elif args.clip is not None:
        raise ValueError(f"--clip: the CLIP of protocol {name} is fixed; only none is allowed")
    if changes:
        protocol = type(protocol).model_validate({**settings, **changes})
        name = f"{name}, changed: {', '.join(changes)}"
    given = Given({key: path for key, path in references.items()}, args.prompts)
    return _with_teacher(name, protocol, given, args)


def _with_teacher(
    name: str, protocol: "Protocol", given: "Given", args: argparse.Namespace
) -> "tuple[str, Protocol, Given]":
    if args.teacher_statistics is None:
        return name, protocol, given
    if not protocol.comparisons:
        raise ValueError("--teacher-statistics needs a protocol with features")
    from fewstep.evaluate import Given

    first = protocol.model_dump(mode="json")["comparisons"][0]
    added = {**first, "name": "to_teacher", "metrics": ["fid"], "reference": args.teacher_statistics}
    settings = protocol.model_dump(mode="json")
    settings["comparisons"] = [*settings["comparisons"], added]
    references: Mapping[str, str] = {**given.references, "to_teacher": args.teacher_statistics}
    label = name if name == "custom" else f"{name} and fid_to_teacher"
    return label, type(protocol).model_validate(settings), Given(references, given.prompts)


def _named(item: str) -> tuple[str, str]:
    name, equals, path = item.partition("=")
    return (name, path) if equals and name.isidentifier() and not Path(item).exists() else ("", item)


def _is_pipeline(name: str) -> bool:
    """False for what holds images; ValueError for a folder of neither, as that of a run."""
    from fewstep.evaluate.reference import IMAGE_SUFFIXES

    path = Path(name)
    if name in ASSETS or not path.exists() or (path / "model_index.json").exists():
        return True
    if (path / "pipeline" / "model_index.json").exists():
        raise ValueError(f"{name} is the folder of a run; its pipeline is {path / 'pipeline'}")
    suffixes = IMAGE_SUFFIXES | {".parquet", ".npz"}
    if path.suffix.lower() not in suffixes and not any(f.suffix.lower() in suffixes for f in path.rglob("*")):
        raise ValueError(f"{name} is neither a pipeline (it has no model_index.json) nor a folder of images")
    return False


# evaluate -------------------------------------------------------------------------------------------------------------


def evaluate(args: argparse.Namespace) -> None:
    check_output(args.output)
    name, protocol, given = _protocol(args, args.num_images)
    # What is missing is told before any weight loads.
    from fewstep.evaluate import describe_protocol, evaluate_images, evaluate_protocol, format_table, write_report

    settings = describe_protocol(protocol, name=name, batch_size=args.batch_size, given=given)
    from accelerate import Accelerator

    accelerator = Accelerator()
    model = args.name or args.pipeline
    if _is_pipeline(args.pipeline):
        rows = evaluate_protocol(
            load_pipeline(args.pipeline, args.dtype, accelerator.device),
            protocol,
            protocol_name=name,
            given=given,
            name=model,
            steps=args.steps,
            batch_size=args.batch_size,
            guidance_scale=guidance(args),
            accelerator=accelerator,
            keep=args.keep,
        )
    else:
        rows = evaluate_images(
            args.pipeline,
            protocol,
            protocol_name=name,
            given=given,
            name=model,
            batch_size=args.batch_size,
            device=accelerator.device,
        )
    if accelerator.is_main_process:
        write_report(args.output, {"pipeline": args.pipeline, "dtype": args.dtype, **settings}, rows)
        print(format_table(rows))
        print(f"protocol {name}, {settings['hash']}; written to {args.output}")
    accelerator.end_training()


def add_evaluate(commands: Any) -> None:
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


# reference ------------------------------------------------------------------------------------------------------------


def reference(args: argparse.Namespace) -> None:
    check_output(args.output)
    from fewstep.evaluate.statistics import SUFFIXES

    if args.output.suffix not in SUFFIXES:
        raise ValueError(f"--output {args.output}: a file of statistics ends in {' or '.join(SUFFIXES)}")
    features, view = _lens(args)
    import torch
    from tqdm import tqdm

    from fewstep.evaluate import load_features
    from fewstep.evaluate.reference import collect, real_images
    from fewstep.evaluate.statistics import Statistics, save_statistics

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = real_images(args.source) if args.steps is None else _drawn(args, device)
    made = collect(tqdm(images, unit="image"), load_features(features).to(device), view, keep=not args.moments_only)
    metadata = {**made.metadata, "source": args.source} | ({} if args.steps is None else {"steps": str(args.steps)})
    save_statistics(Statistics(made.moments, made.features, None, metadata), args.output)
    assert made.moments is not None  # collect made them
    count, d = made.moments.count, len(made.moments.mean)
    print(f"{count} images, {d} dimensions of {features}; written to {args.output}")
    if count is not None and count <= d:
        print(f"fewer images than dimensions: distances to these statistics depend on the number of images ({count})")


def _lens(args: argparse.Namespace) -> tuple[str, Any]:
    """Features and view: those of the options, or of a comparison of the protocol."""
    from fewstep.evaluate import load_protocol
    from fewstep.evaluate.protocol import View

    if args.protocol is None:
        return args.features or "fashion", View()
    name, protocol = load_protocol(args.protocol)
    known = {c.name: c for c in protocol.comparisons}
    if args.comparison not in known:
        names = ", ".join(map(repr, known)) or "none"
        raise ValueError(f"--comparison {args.comparison!r}: those of protocol {name} are {names}")
    return args.features or known[args.comparison].features, known[args.comparison].view


def _drawn(args: argparse.Namespace, device: "torch.device") -> Any:
    """A pipeline's images, one by one."""
    from fewstep.evaluate import sample
    from fewstep.evaluate.generate import batches, condition_kind, num_labels
    from fewstep.evaluate.reference import subjects

    args.pipeline, args.teacher_statistics, args.reference, args.clip = args.source, None, None, None
    features, args.features = args.features, None
    name, protocol, given = _protocol(args, args.num_images)
    args.features = features
    pipeline = load_pipeline(args.source, args.dtype, device)
    what = subjects(protocol, condition_kind(pipeline), num_labels(pipeline), name, given)
    for part in batches(protocol.images, args.batch_size):
        conditions = [what.conditions[i] for i in part]
        yield from sample(
            pipeline, conditions, part, steps=args.steps, seed=protocol.seed, guidance_scale=guidance(args),
            uint8=protocol.uint8,
        )  # fmt: skip


def add_reference(commands: Any) -> None:
    r = commands.add_parser(
        "reference", help="statistics of real images, or of a teacher's, for `evaluate --reference`"
    )
    r.add_argument(
        "source",
        metavar="SOURCE",
        help="folder of images, parquet file or folder of them, ADM's .npz with arr_0, or fashion; with --steps, a pipeline",
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


# compare --------------------------------------------------------------------------------------------------------------


def compare(args: argparse.Namespace) -> None:
    if len(args.steps) > 2:
        raise ValueError("--steps: one count for both, or one for each")
    name, protocol, given = _protocol(args, max(2, args.pairs))
    import torch

    from fewstep.evaluate import grid, load_features, recommended_guidance_scale
    from fewstep.evaluate.compare import Contestant, distances, draw, paired
    from fewstep.evaluate.generate import condition_kind, num_labels
    from fewstep.evaluate.protocol import View
    from fewstep.evaluate.reference import subjects

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    first = protocol.comparisons[0] if protocol.comparisons else None
    features = load_features(first.features if first else "fashion").to(device)
    view = first.view if first else View()
    calls = [("A", args.a, args.steps[0]), ("B", args.b, args.steps[-1])]
    if args.teacher is not None:
        calls.insert(0, ("teacher", args.teacher, args.teacher_steps))
    images: dict[str, Any] = {}
    for role, path, steps in calls:
        scale = args.guidance_scale if args.guidance_scale is not None else recommended_guidance_scale(path)
        who = Contestant(path, load_pipeline(path, args.dtype, device), steps, scale)
        what = subjects(protocol, condition_kind(who.pipeline), num_labels(who.pipeline), name, given)
        conditions = list(what.conditions[: args.pairs])
        images[role] = draw(who, conditions, seed=protocol.seed, batch_size=args.batch_size, uint8=protocol.uint8)
        who.pipeline.to("cpu")
    result: dict[str, Any] = {
        "protocol": {"name": name, "hash": protocol.hash(), "features": features.name},
        "pairs": args.pairs,
        "models": {role: {"pipeline": path, "steps": steps} for role, path, steps in calls},
    }
    between = distances(images["A"], images["B"], features, view)
    result["between"] = {key: float(value.mean()) for key, value in between.items()}
    if args.teacher is not None:
        a, b = (distances(images[role], images["teacher"], features, view) for role in ("A", "B"))
        result["to_teacher"] = {key: paired(a[key], b[key]) for key in a}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    rows, labels = [images[role][:16] for role, *_ in calls], [f"{role}, {steps} steps" for role, _, steps in calls]
    grid(rows, labels).save(args.output.with_suffix(".png"))
    print(_comparison_text(result))
    print(f"written to {args.output.with_suffix('.png')} and {args.output.with_suffix('.json')}")


def _comparison_text(result: Mapping[str, Any]) -> str:
    lines = [f"{key}: A to B {value:.4f}" for key, value in result["between"].items()]
    for key, p in result.get("to_teacher", {}).items():
        lines.append(
            f"{key} to the teacher: A {p['a']:.4f}, B {p['b']:.4f}, difference {p['difference']:.4f} "
            f"+- {p['standard_error']:.4f}; A closer in {100 * p['a_closer']:.0f} % of {result['pairs']} pairs"
        )
    return "\n".join(lines)


def add_compare(commands: Any) -> None:
    c = commands.add_parser("compare", help="two pipelines image by image, from the same noises")
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


# report ---------------------------------------------------------------------------------------------------------------


def report(args: argparse.Namespace) -> None:
    from fewstep.report import write_page

    write_page(args.runs, args.output, title=args.title)
    print(f"written to {args.output}")


def add_report(commands: Any) -> None:
    r = commands.add_parser("report", help="one HTML page of runs: curves, scores, samples, protocol; opens offline")
    r.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, or an evaluation.json")
    r.add_argument("--output", type=Path, default=Path("report.html"), help="(default: report.html)")
    r.add_argument("--title", help="(default: the runs' names)")
    r.set_defaults(run=report)


def add_commands(commands: Any) -> None:
    for add in (add_evaluate, add_reference, add_compare, add_report):
        add(commands)
