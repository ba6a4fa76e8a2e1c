"""The optimizer loop that all stages share."""

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fewstep.pretrain.config import StageConfig

Loss = Callable[[torch.Generator], Tensor]


@contextmanager
def aside(target: Path) -> Iterator[Path]:
    """A path to write an output to; it takes its name only once it is complete."""
    part = target.with_name(f"part-{target.name}")
    if part.is_dir():
        shutil.rmtree(part)
    yield part
    os.replace(part, target)


def learning_rate(config: StageConfig, iteration: int) -> float:
    warmup = max(1, round(config.warmup * config.iterations))
    if iteration < warmup:
        return config.lr * (iteration + 1) / warmup
    progress = (iteration - warmup) / max(1, config.iterations - warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def fit(
    name: str,
    model: nn.Module,
    loss: Loss,
    config: StageConfig,
    folder: Path,
    seed: int,
    checkpoint_seconds: float,
    ema_decay: float | None = None,
) -> None:
    """Minimises `loss`, going on from a checkpoint in `folder`; leaves the EMA weights in `model` if asked.

    Every random draw comes from the generator given to `loss`, whose state is part of the checkpoint.
    """
    checkpoint = folder / f"{name}.checkpoint.pt"
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay)
    average = [p.detach().clone() for p in model.parameters()]
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        average, start = state["average"], state["iteration"]

    def save(iteration: int) -> None:
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "generator": generator.get_state(),
            "average": average,
            "iteration": iteration,
        }
        with aside(checkpoint) as part:
            torch.save(state, part)

    model.train()
    saved_at = time.monotonic()
    smooth = math.nan
    bar = tqdm(range(start, config.iterations), name, config.iterations, initial=start, mininterval=5)
    for iteration in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, iteration)
        value = loss(generator)
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if ema_decay is not None:
            # The first iterations are averaged over a shorter window, or the random start would linger.
            decay = min(ema_decay, (iteration + 1) / (iteration + 10))
            torch._foreach_lerp_(average, [p.detach() for p in model.parameters()], 1 - decay)
        smooth = value.item() if math.isnan(smooth) else 0.98 * smooth + 0.02 * value.item()
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if time.monotonic() - saved_at > checkpoint_seconds:
            save(iteration + 1)
            saved_at = time.monotonic()
    # Whatever follows within the stage may still be interrupted: the last state is kept too.
    save(max(start, config.iterations))
    if ema_decay is not None:
        with torch.no_grad():
            for p, a in zip(model.parameters(), average, strict=True):
                p.copy_(a)
    model.eval()
