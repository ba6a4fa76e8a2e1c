"""`fewstep plan`: memory and operations of a run, from configs alone."""

import argparse
import json
import os
from typing import TYPE_CHECKING

from fewstep.cli.options import CONFIG_HELP, Commands, at_least
from fewstep.methods.registry import load_run, method_class

if TYPE_CHECKING:
    from fewstep.plan.plan import Plan


def plan(args: argparse.Namespace) -> None:
    config = load_run(args.config, args.overrides)
    # The plan is made on the CPU, whatever the machine has; accelerate reads this when it is loaded.
    os.environ["ACCELERATE_USE_CPU"] = "true"
    from fewstep.plan.plan import plan as planned

    method = method_class(config.method.name)
    on = config.memory.gradient_checkpointing
    whole = planned(method, config, args.device, args.processes)
    memory = config.memory.model_copy(update={"gradient_checkpointing": not on})
    other = config.model_copy(update={"memory": memory})
    found = {on: whole, not on: planned(method, other, args.device, args.processes, whole_round=False)}
    if args.json:
        peaks = {str(on).lower(): p.peak for on, p in found.items()}
        print(json.dumps(whole.as_dict() | {"gradient_checkpointing": on, "peaks_by_checkpointing": peaks}))
    else:
        print(text(whole), checkpointing(found), sep="\n\n")


def checkpointing(found: "dict[bool, Plan]") -> str:
    lines = []
    for on, p in sorted(found.items()):
        fits = ", ".join(f"{card} GB" for card, good in p.fits.items() if good) or "none of these cards"
        lines.append(f"memory.gradient_checkpointing={str(on).lower()}: peak {p.peak / 2**30:.2f} GiB, fits on {fits}")
    return "\n".join(lines)


def text(p: "Plan") -> str:
    def gib(size: int) -> str:
        return f"{size / 2**30:10.2f}" if size else " " * 10

    each = f"batch {p.batch_size}" + (f" x {p.accumulate} micro-batches" if p.accumulate > 1 else "")
    images = p.batch_size * p.accumulate * p.processes
    lines = [
        f"{p.method} on {p.device}, {p.mixed_precision}, {each} on {p.processes} process{'es' * (p.processes > 1)}: "
        f"{images} image{'s' * (images > 1)} an iteration",
        "",
        f"{'GiB per process':24}{'weights':>10}{'gradients':>10}{'optimizer':>10}{'activ.':>10}   parameters (trainable), M",
    ]
    for name, r in p.roles.items():
        counts = f"{r.parameters / 1e6:.1f}" + (f" ({r.trainable / 1e6:.1f})" if r.trainable else "")
        title = name if r.kind == "learnt" else f"{name} ({r.kind})"
        row = "".join(map(gib, (r.weights, r.gradients, r.optimizer, r.activations)))
        lines.append(f"{title:24}{row}   {counts}")
    lines += [f"{name:24}{gib(size)}" for name, size in p.parts.items()]
    if p.waiting:
        lines.append(f"{'teacher, in main memory':24}{gib(p.waiting)}")
    if p.buckets:
        lines.append(f"{'exchange of gradients':24}{' ' * 10}{gib(p.buckets)}")
    if p.prompts:
        lines.append(f"{'kept prompts, at most':24}{gib(p.prompts)}")
    lines += ["", f"between iterations {p.resident / 2**30:.2f} GiB; most while"]
    lines += [f"  {phase:22}{gib(size)}" for phase, size in p.peaks.items()]
    fits = ", ".join(f"{card} GB {'yes' if good else 'no'}" for card, good in p.fits.items())
    lines += [
        f"peak {p.peak / 2**30:.2f} GiB of tensors; with CUDA's own and fragmentation, fits on: {fits}",
        "",
        f"one forward of the teacher on a batch, F = {p.forward_tflop:.3g} TFLOP; in F, per iteration:",
    ]
    for name, r in p.roles.items():
        if r.forward or r.backward:
            backward = f", backwards of its updates {r.backward:.2f}" if r.backward else ""
            lines.append(f"  {name}: forwards {r.forward:.2f}{backward}")
    if p.elsewhere > 0.005:
        lines.append(f"  encoders, autoencoder: {p.elsewhere:.2f}")
    lines += [
        f"  all: {p.total_forwards:.2f} F, {p.total_forwards * p.forward_tflop:.3g} TFLOP",
        "",
        "the student's steps and timesteps:",
        *(f"  {n}: {', '.join(f'{t:g}' for t in grid)}" for n, grid in p.timesteps.items()),
    ]
    return "\n".join(lines)


def add_plan(commands: Commands) -> None:
    c = commands.add_parser("plan", help="memory and operations of a run, from configs, without weights")
    c.add_argument("config", metavar="RECIPE|FILE", help=CONFIG_HELP)
    c.add_argument("overrides", nargs="*", metavar="key.path=value", help="as for the training itself")
    c.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="device of the run (default: cuda)")
    c.add_argument(
        "--processes", type=at_least(1), default=1, help="of the run; a plan is for one of them (default: 1)"
    )
    c.add_argument("--json", action="store_true", help="all figures, in bytes")
    c.set_defaults(run=plan)
