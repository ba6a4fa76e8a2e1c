"""Measures the cases, in float64. To write the numbers anew, from the root of the repository:

PYTHONPATH=.:tests OMP_NUM_THREADS=1 python -m golden.driver

A wanted change of the numbers is a commit of its own, which says that it is one and why.
"""

import json
import math
import re
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.config import LoraConfig
from fewstep.evaluate.rewards.load import load_training_reward
from fewstep.methods.base import Batch, Preparation
from fewstep.methods.registry import method_class, settings_class
from fewstep.teachers import load_teacher
from golden.cases import BATCH_SIZES, CASES, FAMILIES, LATENT_SIDES, SAMPLERS, TEXT_IN_FLOAT32, Case

FILE = Path(__file__).with_name("losses.json")
RAW = {"prompt": ["a bag", "a coat", "a bag"], "label": [3, 7, 3], "none": [None, None, None]}
LISTS = re.compile(r"\[[^\[\]]*\]")
"""Written on one line each."""
CPU = torch.device("cpu")
Numbers = dict[str, float | list[float]]


TEMPORARY = tempfile.TemporaryDirectory(prefix="golden")
"""Gone when the process ends."""


@cache
def folder(family: str) -> Path:
    return FAMILIES[family](Path(TEMPORARY.name) / family)


def new_teacher(family: str) -> Any:
    teacher: Any = load_teacher(str(folder(family)))
    teacher.placement.to(CPU, torch.float64)
    if family in TEXT_IN_FLOAT32:
        for name in teacher.placement.text_parts:
            teacher.pipeline.components[name].float()
    for name, part in teacher.pipeline.components.items():
        if name not in teacher.placement.text_parts:
            in_double(part)
    if family in LATENT_SIDES:
        teacher.latent_shape = (teacher.latent_shape[0], LATENT_SIDES[family], LATENT_SIDES[family])
    return teacher


kept_teacher = cache(new_teacher)
"""For students that leave their teacher as it is."""


def new_method(case: Case) -> Any:
    teacher = kept_teacher(case.family) if case.student == "full" else new_teacher(case.family)
    if case.student == "lora":
        teacher.students.adapt(LoraConfig(rank=2))
    kind, config = method_class(case.method), settings_class(case.method)
    return kind(config.model_validate({"optim": {"lr": 1e-3}} | case.settings), teacher)


def samplers(case: Case) -> dict[str, Any]:
    """The counts of steps that the exported student is for, and the timesteps at which it then is evaluated."""
    method, found = new_method(case), {}
    for steps in method.allowed_steps():
        scheduler = method.scheduler()
        grid = method.teacher.samplers.grid(scheduler, steps).tolist()
        found[str(steps)] = {"kind": type(scheduler).__name__, "grid": [short(v) for v in grid]}
        if len(scheduler.timesteps) != steps:  # not every family has to ask for them
            scheduler.set_timesteps(steps)
        found[str(steps)]["timesteps"] = [short(v) for v in scheduler.timesteps.tolist()]
    return {"allowed_steps": list(method.allowed_steps()), "by_steps": found}


def measured(case: Case, name: str) -> Numbers:
    """Of every iteration: terms and the norm of their gradient, step by step, and the figures for the log."""
    method = new_method(case)
    teacher, size = method.teacher, BATCH_SIZES.get(case.family, 2)
    raw = RAW[teacher.conditions][:size]

    def load_reward(reward: str) -> Any:
        return in_double(load_training_reward(reward, CPU, teacher.image_size, teacher.conditions == "prompt"))

    torch.manual_seed(0)  # not before: a teacher that is loaded for the first time draws numbers
    roles = method.roles()
    nets = {key: role.net for key, role in roles.items()} | {"ema": roles["student"].net.clone()}
    frozen = {p.data_ptr() for p in teacher.denoiser.parameters()}
    own = {key: moved(net, key, frozen) for key, net in nets.items() if key != "teacher"}
    learnt = [key for key, role in roles.items() if role.optim is not None]
    for key, net in nets.items():
        net.train(key in learnt)
    output = Path(TEMPORARY.name) / name
    output.mkdir(parents=True)
    at = Preparation(output, lambda rows: [raw[i] for i in rows], size, 4, CPU, 0, 1, lambda: None, load_reward)
    torch.manual_seed(1)
    with float64_by_default():
        method.prepare(at)
    found: Numbers = {}
    for iteration in case.iterations:
        cond, uncond = (doubled(v) for v in (teacher.condition(raw), teacher.null_condition(size)))
        latents = 0.5 * drawn((size, *teacher.latent_shape), "latents") if method.needs_images else None
        generator = torch.Generator().manual_seed(iteration)
        batch = Batch(size, cond, uncond, CPU, iteration, latents, generator, raw)
        carry: dict[str, Tensor] = {}
        figures: dict[str, Tensor] = {}
        for number, step in enumerate(method.steps()):
            if iteration % step.every:
                continue
            for key, parameters in own.items():
                for p in parameters:
                    p.requires_grad_(key == step.role)
                    p.grad = None
            torch.manual_seed(10 + number)
            with float64_by_default():
                output = step.loss(nets, batch, carry)
            carry |= output.carry
            figures |= output.logs | output.histograms
            torch.stack([v.double() for v in output.losses.values()]).sum().backward()
            squares = [p.grad.square().sum() for p in own[step.role] if p.grad is not None]
            terms = output.losses | {"gradient": torch.stack(squares).sum().sqrt()}
            found |= {f"{iteration}/{step.role}/{key}": numbers(v) for key, v in terms.items()}
        with torch.no_grad(), float64_by_default():
            figures |= method.health(nets, iteration)
        found |= {f"{iteration}/health/{key}": numbers(v) for key, v in figures.items()}
    return found


# Parts of it ------------------------------------------------------------------------------------------------------------


@contextmanager
def float64_by_default() -> Iterator[None]:
    """What the library draws is in float64, too; and huber_loss, which alone wants that of both sides, takes float32."""

    def huber_loss(a: Tensor, b: Tensor) -> Tensor:
        return huber(a.double(), b.double())

    huber = F.huber_loss
    torch.set_default_dtype(torch.float64)
    try:
        with patch.object(F, "huber_loss", huber_loss):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def in_double(module: Any) -> Any:
    """The module in float64, which takes arguments in float32, too: the library casts some of them."""
    if isinstance(module, nn.Module):
        for part in module.double().modules():
            if next(part.parameters(recurse=False), None) is not None and cast not in part._forward_pre_hooks.values():
                part.register_forward_pre_hook(cast)
    return module


def cast(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(v.double() if isinstance(v, Tensor) and v.dtype == torch.float32 else v for v in args)


@cache
def drawn(shape: tuple[int, ...], seed: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(seed.encode())), dtype=torch.float64)


def moved(net: nn.Module, role: str, frozen: set[int]) -> list[nn.Parameter]:
    """The parameters that are the role's own, moved from where they start; each role's in another direction."""
    own = [p for p in net.parameters() if p.data_ptr() not in frozen]
    in_double(net)
    noise = drawn((sum(p.numel() for p in own),), role)
    with torch.no_grad():
        for p, v in zip(own, noise.split([p.numel() for p in own]), strict=True):
            p.add_(v.view_as(p), alpha=0.02)
    net.requires_grad_(False)
    return own


def doubled(cond: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: v.double() if v.is_floating_point() else v.clone() for key, v in cond.items()}


def numbers(v: Tensor) -> float | list[float]:
    found = [short(x) for x in v.detach().double().flatten().tolist()]
    if not all(map(math.isfinite, found)):
        raise ValueError(f"not finite: {found}")
    return found if v.ndim else found[0]


def short(v: float) -> float:
    return v if isinstance(v, int) else float(f"{v:.12g}")


def main() -> None:
    torch.set_num_threads(1)
    found = {
        "losses": {name: measured(case, name) for name, case in CASES.items()},
        "samplers": {name: samplers(CASES[name]) for name in SAMPLERS},
    }
    FILE.write_text(LISTS.sub(lambda match: " ".join(match[0].split()), json.dumps(found, indent=1)) + "\n")


if __name__ == "__main__":
    main()
