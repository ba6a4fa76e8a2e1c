"""`fewstep plan`: what a run will hold in memory and compute, from configs alone."""

import argparse
import json
import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.cli.options import at_least
from fewstep.config import RunConfig, load_config

if TYPE_CHECKING:
    from fewstep.plan.plan import Plan

METHODS = {
    "boot": ("boot", "Boot", "BootConfig"),
    "consistency": ("consistency", "Consistency", "ConsistencyConfig"),
    "dmd2": ("dmd2", "DMD2", "DMD2Config"),
    "scm": ("scm", "Scm", "ScmConfig"),
}
"""train/<name>.py -> module of the method, its class, the class of its settings in <module>_config."""
RECIPES = {name: "consistency" for name in ("cd", "ect", "lcm", "mlcm", "pcm")}
"""What the published recipes of a method are called -> the method."""


def plan(args: argparse.Namespace) -> None:
    name = args.method or _named_by(args.config)
    module, method, settings = METHODS[name]
    settings_class: Any = getattr(import_module(f"fewstep.methods.{module}_config"), settings)
    run_config: Any = RunConfig[settings_class]
    config = load_config(run_config, ["--config", str(args.config), *args.overrides])
    # The rehearsal takes place on the CPU, whatever the machine has; accelerate is asked before it is loaded.
    os.environ["ACCELERATE_USE_CPU"] = "true"
    from fewstep.plan.plan import plan as planned

    method_class = getattr(import_module(f"fewstep.methods.{module}"), method)
    whole = planned(method_class, config, args.device, args.processes)
    other = config.model_copy(update={"gradient_checkpointing": not config.gradient_checkpointing})
    found = {
        config.gradient_checkpointing: whole,
        other.gradient_checkpointing: planned(method_class, other, args.device, args.processes, whole_round=False),
    }
    if args.json:
        peaks = {str(on).lower(): p.peak for on, p in found.items()}
        print(
            json.dumps(
                whole.as_dict()
                | {"gradient_checkpointing": config.gradient_checkpointing, "peaks_by_checkpointing": peaks}
            )
        )
    else:
        print(text(whole), checkpointing(found), sep="\n\n")


def _named_by(file: Path) -> str:
    """Configs are called <method>_<family>.yaml."""
    name = file.stem.split("_")[0]
    name = RECIPES.get(name, name)
    if name in METHODS:
        return name
    raise ValueError(f"{file} does not say by its name which method it is for: pass --method {'|'.join(METHODS)}")


def checkpointing(found: "dict[bool, Plan]") -> str:
    lines = []
    for on, p in sorted(found.items()):
        fits = ", ".join(f"{card} GB" for card, good in p.fits.items() if good) or "none of these cards"
        lines.append(f"gradient_checkpointing={str(on).lower()}: peak {p.peak / 2**30:.2f} GiB, fits on {fits}")
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


def add_plan(commands: Any) -> None:
    c = commands.add_parser("plan", help="what a run will hold in memory and compute, from configs, without weights")
    c.add_argument("config", type=Path, metavar="CONFIG", help="YAML file of a run")
    c.add_argument("overrides", nargs="*", metavar="key.path=value", help="as for the training itself")
    c.add_argument("--method", choices=METHODS, help="default: the beginning of the file's name")
    c.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="that the run will have (default: cuda)")
    c.add_argument(
        "--processes", type=at_least(1), default=1, help="of the run; a plan is for one of them (default: 1)"
    )
    c.add_argument("--json", action="store_true", help="all figures, in bytes")
    c.set_defaults(run=plan)
