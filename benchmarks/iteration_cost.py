"""Iterations of the trainer against the bare forwards and backwards of the same networks, interleaved in one process.

    python benchmarks/iteration_cost.py [--rounds 30]

The floor of latent consistency distillation is 6 F: student 1 + 2 (backward), target 1, teacher 2 (with and without prompt).
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch

from fewstep.config import RunConfig, load_config
from fewstep.data import load_source
from fewstep.methods.consistency import Consistency, ConsistencyConfig
from fewstep.teachers import load_teacher
from fewstep.trainer import Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"output_dir={folder}", "data.limit=512", "max_iterations=100000"]
        config = load_config(RunConfig[ConsistencyConfig], ["--config", "configs/consistency_fashion.yaml", *overrides])
        teacher = load_teacher(config.teacher)
        method = Consistency(config.method, teacher)
        trainer = Trainer(config, method, teacher, load_source(config.data, teacher.image_size))
        step = method.steps()[0]
        bare = _bare(trainer, config.batch_size)
        for _ in range(3):
            bare()
            trainer._update(step)
        pairs = [(_seconds(bare), _seconds(lambda: trainer._update(step))) for _ in range(rounds)]
    ratios = [whole / floor for floor, whole in pairs]
    floor, whole = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(
        f"batch {config.batch_size}, {torch.get_num_threads()} threads: bare {floor * 1e3:.0f} ms, "
        f"iteration {whole * 1e3:.0f} ms, ratio median {statistics.median(ratios):.3f} "
        f"(min {min(ratios):.3f}, max {max(ratios):.3f}) over {rounds} pairs"
    )


def _bare(trainer: Trainer, size: int) -> Callable[[], None]:
    batch = trainer._batch()
    x, t, g = batch.x0, torch.full((size,), 500), torch.full((size,), 2.0)
    both = {k: torch.cat([v, batch.uncond[k]]) for k, v in batch.cond.items()}
    student, target, teacher = (trainer.raw[name] for name in ("student", "target", "teacher"))

    def run() -> None:
        student(x, t, batch.cond, g).x0.square().mean().backward()
        with torch.no_grad():
            teacher(torch.cat([x, x]), torch.cat([t, t]), both)
            target(x, t, batch.cond, g)
        student.zero_grad()

    return run


def _seconds(f: Callable[[], object]) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
