"""The optimizer loop that all stages share."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from fewstep.io import atomic
from fewstep.pretrain.config import StageConfig
from fewstep.training.checkpoint import pack_optimizer, unpack_optimizer
from fewstep.training.optim import lr_factor

Loss = Callable[[torch.Generator], Tensor]


def best_device() -> torch.device:
    """The first GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def stratified(n: int, generator: torch.Generator) -> Tensor:
    """One number from each n-th of [0, 1): less variance between batches than independent draws. [n], float32, below 1."""
    shares = (torch.arange(n) + torch.rand(n, generator=generator)) / n
    return shares.clamp(max=1 - 2**-24)  # n - 1 + 0.999999 is n in float32


class RecentMean:
    """Mean loss of every so many iterations: reading one from a GPU makes the CPU wait for it."""

    def __init__(self, every: int = 20) -> None:
        self.every = every
        self.values: list[Tensor] = []

    def add(self, value: Tensor) -> float | None:
        self.values.append(value.detach())
        if len(self.values) < self.every:
            return None
        mean = float(torch.stack(self.values).mean())
        self.values.clear()
        return mean


def learning_rate(config: StageConfig, iteration: int) -> float:
    """The learning rate of an iteration, from 0."""
    warmup = max(1, round(config.warmup * config.iterations))
    return config.lr * lr_factor(iteration + 1, config.iterations, warmup, full_updates=1)


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
    """Minimise `loss`, from a checkpoint in `folder` if there is one; with `ema_decay`, the model ends with averaged weights.

    The model trains on the device it is given on. Every random draw comes from the generator given to `loss`, which is on
    the CPU, so that the draws are the same on every device, and whose state is part of the checkpoint.
    """
    checkpoint = folder / f"{name}.checkpoint.safetensors"
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay)
    average = [p.detach().clone() for p in model.parameters()]
    start = 0
    if checkpoint.exists():
        start = _load(checkpoint, model, optimizer, average, generator)

    def save(iteration: int) -> None:
        with atomic(checkpoint) as part:
            save_file(_state(model, optimizer, average, generator, iteration), part)

    model.train()
    saved_at = time.monotonic()
    losses = RecentMean()
    bar = tqdm(range(start, config.iterations), name, config.iterations, initial=start, mininterval=5)
    for iteration in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, iteration)
        optimizer.zero_grad()
        value = loss(generator)
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if ema_decay is not None:
            # The first iterations are averaged over a shorter window, or the random start would linger.
            decay = min(ema_decay, (iteration + 1) / (iteration + 10))
            torch._foreach_lerp_(average, [p.detach() for p in model.parameters()], 1 - decay)
        if (mean := losses.add(value)) is not None:
            bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
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


def _state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: list[Tensor],
    generator: torch.Generator,
    iteration: int,
) -> dict[str, Tensor]:
    # Copies: a network may hold one tensor under two names, which safetensors refuses.
    parts = {
        "model": {name: value.clone() for name, value in model.state_dict().items()},
        "optimizer": pack_optimizer(optimizer),
        "average": {str(i): value for i, value in enumerate(average)},
    }
    tensors = {f"{part}.{name}": v.contiguous() for part, values in parts.items() for name, v in values.items()}
    return tensors | {"generator": generator.get_state(), "iteration": torch.tensor(iteration)}


def _load(
    file: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: list[Tensor], generator: torch.Generator
) -> int:
    """Load everything from a checkpoint and return its number of iterations."""
    tensors = load_file(file)

    def part(name: str) -> dict[str, Tensor]:
        return {key.partition(".")[2]: v for key, v in tensors.items() if key.startswith(f"{name}.")}

    model.load_state_dict(part("model"))
    unpack_optimizer(optimizer, part("optimizer"))
    for i, value in part("average").items():
        average[int(i)].copy_(value)
    generator.set_state(tensors["generator"])
    return int(tensors["iteration"])
