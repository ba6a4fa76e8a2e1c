"""Iterations of the trainer against the bare forwards and backwards of the same networks, interleaved in one process.

    python benchmarks/iteration_cost.py boot|consistency|dmd2 [--config FILE] [--rounds 30] [key.path=value ...]

In units of F, one forward of the network on a batch, with backwards 2 F and an encoder with the middle block e F:

boot: 6 F. Student 1, and 1 + 2 for the next target; teacher 2 (with and without prompt). For k segments, another (k - 1) / 2
    of the averaged student to the states where they begin.
consistency: 4 + 2 m F, 6 for m = 1. Student 1 + 2, target 1, and m = `steps_per_point` times teacher 2 (with and without prompt).
    On stored trajectories no teacher, and for their ends no target: 3 F (method.trajectories.count=256 draws fewer).
dmd2, a round being `student_update_every` iterations: on each, k forwards of the student for k simulated steps, and the
    critic's 3 + 6 e (denoising; real and fake in one batch); on all but the first, 1 for the student's last step without
    gradient; on the first, 3 with it, teacher 2, critic 1, and e + e for the gradient in the discriminator's input.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from torch import nn

from fewstep.data import load_source
from fewstep.diffusion.guidance import concatenate
from fewstep.methods.base import Method
from fewstep.methods.boot.method import Boot
from fewstep.methods.consistency.settings import SolverTarget
from fewstep.methods.distribution_matching.dmd2 import DMD2
from fewstep.methods.noisy_batch import NoisyBatch
from fewstep.methods.registry import load_run, method_class
from fewstep.teachers import load_teacher
from fewstep.training.trainer import Trainer

RECIPES = {"boot": "fashion/boot", "consistency": "fashion/trajectory", "dmd2": "fashion/dmd2"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=RECIPES)
    parser.add_argument("--config")
    parser.add_argument("--rounds", type=int, default=30)
    args, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        file = args.config or RECIPES[args.method]
        given = [f"output_dir={folder}", "data.limit=512", "max_iterations=100000", *overrides]
        config = load_run(file, given)
        teacher = load_teacher(config.teacher)
        method = method_class(config.method.name)(config.method, teacher)
        trainer = Trainer(config, method, teacher, load_source(config.data, teacher.image_size))
        method.prepare(trainer.preparation())
        steps = method.steps()
        iterations = max(step.every for step in steps)
        match method:
            case DMD2():
                bare = _bare_dmd2(trainer, method)
            case Boot():
                bare = _bare_boot(trainer, method)
            case _:
                bare = _bare_consistency(trainer, method)

        def whole() -> None:
            for trainer.iteration in range(iterations):
                trainer.iterate(steps)

        for _ in range(2):
            bare()
            whole()
        pairs = [(_seconds(bare), _seconds(whole)) for _ in range(args.rounds)]
    ratios = [whole / floor for floor, whole in pairs]
    floor, spent = (statistics.median(column) / iterations for column in zip(*pairs, strict=True))
    print(
        f"{args.method}, batch {config.batch_size}, {torch.get_num_threads()} threads: bare {floor * 1e3:.0f} ms an "
        f"iteration, trainer {spent * 1e3:.0f} ms, ratio median {statistics.median(ratios):.3f} (min {min(ratios):.3f}, max "
        f"{max(ratios):.3f}) over {args.rounds} rounds of {iterations} iterations"
    )


def _networks(trainer: Trainer) -> dict[str, nn.Module]:
    return {name: role.net for name, role in trainer.roles.items()}


def _bare_boot(trainer: Trainer, method: Boot) -> Callable[[], None]:
    """With guidance at a fixed scale; segments, on-policy, in equal shares of the batch."""
    batch = trainer.batches.draw(trainer.iteration, 0)
    x, t, ends = (
        torch.randn(batch.size, *trainer.teacher.latent_shape),
        torch.full((batch.size,), 500),
        torch.ones(batch.size),
    )
    both, segments = concatenate(batch.cond, batch.uncond), method.config.steps
    student, ema, teacher = (_networks(trainer)[name] for name in ("student", "ema", "teacher"))

    def run() -> None:
        with torch.no_grad():
            for j in range(1, segments):
                n = batch.size * (segments - j) // segments
                ema(x[:n], t[:n], {k: v[:n] for k, v in batch.cond.items()}, None, ends[:n])
            student(x, t, batch.cond, None, ends)
            teacher(torch.cat([x, x]), torch.cat([t, t]), both)
        student(x, t, batch.cond, None, ends).x0.square().mean().backward()
        student.zero_grad()

    return run


def _bare_consistency(trainer: Trainer, method: Method) -> Callable[[], None]:
    batch = trainer.batches.draw(trainer.iteration, 0)
    x = torch.randn(batch.size, *trainer.teacher.latent_shape)
    t, g = torch.full((batch.size,), 500), torch.full((batch.size,), 2.0)
    both = concatenate(batch.cond, batch.uncond)
    student, target, teacher = (_networks(trainer).get(name) for name in ("student", "target", "teacher"))
    reached = getattr(method.config, "target", None)
    asked = reached.steps_per_point if isinstance(reached, SolverTarget) else 0
    assert student is not None and teacher is not None

    def run() -> None:
        student(x, t, batch.cond, g).x0.square().mean().backward()
        with torch.no_grad():
            for _ in range(asked):
                teacher(torch.cat([x, x]), torch.cat([t, t]), both)
            if target is not None:
                target(x, t, batch.cond, g)
        student.zero_grad()

    return run


def _bare_dmd2(trainer: Trainer, method: DMD2) -> Callable[[], None]:
    """The same forwards and backwards, with the same numbers of simulated steps as the trainer draws."""
    c, every = method.config, method.config.student_update_every
    stops = []
    for trainer.iteration in range(every):
        batch = trainer.batches.draw(trainer.iteration, 0)
        drawn = torch.randint(len(method.timesteps), (), generator=batch.generator)
        stops.append(int(drawn) if c.inputs == "simulated" else 0)
    shape, cond = (batch.size, *trainer.teacher.latent_shape), batch.cond
    x, t = torch.randn(shape), torch.full((batch.size,), 500)
    twice = torch.cat([x, x]), torch.cat([t, t])
    both, conds = concatenate(cond, batch.uncond), concatenate(cond, cond)
    student, critic, teacher = (_networks(trainer)[name] for name in ("student", "critic", "teacher"))

    def run() -> None:
        for iteration, stop in enumerate(stops):
            learns = iteration % every == 0
            student.requires_grad_(learns)
            critic.requires_grad_(False)
            with torch.no_grad():
                for _ in range(stop + (not learns)):
                    student(x, t, cond)
            if learns:
                with torch.no_grad():
                    teacher(*(twice if c.guidance.scale != 1 else (x, t)), both if c.guidance.scale != 1 else cond)
                    critic(NoisyBatch(x, t, cond))
                x0 = student(x, t, cond).x0
                loss = x0.square().mean()
                if c.adversarial:
                    loss = loss + critic(discriminate=NoisyBatch(x0, t, cond))[1].mean()
                loss.backward()
            student.requires_grad_(False)
            critic.requires_grad_(True)
            prediction, logits = critic(NoisyBatch(x, t, cond), NoisyBatch(*twice, conds) if c.adversarial else None)
            loss = prediction.x0.square().mean()
            (loss if logits is None else loss + logits.mean()).backward()
            student.zero_grad()
            critic.zero_grad()

    return run


def _seconds(f: Callable[[], object]) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
