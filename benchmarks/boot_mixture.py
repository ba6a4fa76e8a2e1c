"""What BOOT's choices do where the teacher's ODE is known: the mixture of Gaussians of tests/test_boot_mixture.py.

    OMP_NUM_THREADS=1 python benchmarks/boot_mixture.py [--seeds 0 1 2] [--iterations 2500] [--only WORD]

Trains every setting once a seed and prints a Markdown table of distances between the students' samples and the ends of the
ODE from the same 4096 initial noises (Heun, 250 steps): root mean square over pairs, and sliced Wasserstein-2.
Rows without a student are what perfect regression would reach on the same grid: the solver's error and nothing else.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from test_boot_mixture import (
    Mixture,
    N,
    noises,
    paired_distance,
    sliced_distance,
    student_samples,
    teacher_samples,
    train,
)

from fewstep.config import OptimConfig
from fewstep.diffusion.prediction import add_noise
from fewstep.diffusion.signal_ode import finite_difference
from fewstep.methods.boot.config import BootConfig
from fewstep.methods.boot.method import Boot
from fewstep.methods.boot.teacher import GuidedTeacher

PAPER = {"form": "paper"}
FOUR = {"steps": 4}
SETTINGS: dict[str, dict[str, Any]] = {
    "1 step: the defaults": {},
    "1 step, `boundary_frac` 0": {"boundary_frac": 0},
    "1 step, `weighting` inv1": {"weighting": "inv1"},
    "1 step, `weighting` inv2": {"weighting": "inv2"},
    "1 step, `solver` heun": {"solver": "heun"},
    "1 step, `m_teacher` 2": {"m_teacher": 2},
    "1 step, `m_teacher` 4": {"m_teacher": 4},
    "1 step, `n_sub` 16": {"n_sub": 16},
    "1 step, `n_sub` 16, `solver` heun": {"n_sub": 16, "solver": "heun"},
    "1 step, `form` paper": PAPER,
    "1 step, `form` paper, `boundary_frac` 0": PAPER | {"boundary_frac": 0},
    "1 step, `form` paper, `boundary_weight` 0": PAPER | {"paper": {"boundary_weight": 0}},
    "1 step, `form` paper, both 0": PAPER | {"boundary_frac": 0, "paper": {"boundary_weight": 0}},
    "1 step, `form` paper, `boundary_weight` 1000": PAPER | {"paper": {"boundary_weight": 1000}},
    "2 steps": {"steps": 2},
    "4 steps (`start` onpolicy)": FOUR,
    "4 steps, `warm_start` 1000": FOUR | {"warm_start": 1000},
    "4 steps, `start` teacher": FOUR | {"start": "teacher"},
    "4 steps, `start` pool": FOUR | {"start": "pool"},
    "4 steps, `start` renoise": FOUR | {"start": "renoise"},
    "8 steps": {"steps": 8},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=2500)
    parser.add_argument("--only", default="", help="settings whose name holds this word")
    args = parser.parse_args()
    torch.set_num_threads(1)
    teacher, z = Mixture(), noises()
    exact = solved("heun", z, teacher.samplers.grid(None, 250))

    def distances(x: Tensor) -> tuple[float, float]:
        return paired_distance(x, exact), sliced_distance(x, exact)

    print("| run | same noise | sliced |\n|---|---:|---:|")
    for steps in (1, 2, 4, 8, 16, N):
        row(f"teacher, DDIM, {steps} step{'s' * (steps > 1)}", [distances(teacher_samples(teacher, z, steps))])
    for n in (16, N):
        row(f"teacher, Heun, {n} steps", [distances(solved("heun", z, teacher.samplers.grid(None, n)))])
    row("teacher, the paper's finite difference", [distances(paper_chain(z))])
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in SETTINGS if args.only in name}
    for seed in args.seeds:
        for name in found:
            given = {"n_sub": N // SETTINGS[name].get("steps", 1)} | SETTINGS[name]
            found[name].append(distances(student_samples(*train(args.iterations, seed=seed, **given), z)))
            print(f"seed {seed}, {name}: {found[name][-1]}", file=sys.stderr, flush=True)
    for name, values in found.items():
        row(name, values, paired=SETTINGS[name].get("start") != "renoise")


def row(name: str, values: list[tuple[float, float]], paired: bool = True) -> None:
    """paired: false for samplers that draw noise of their own, whose samples have no partner."""
    same, sliced = (spread(v) for v in zip(*values, strict=True))
    print(f"| {name} | {same if paired else '-'} | {sliced} |", flush=True)


def spread(values: Sequence[float]) -> str:
    """Mean, and the range over seeds."""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


def solved(solver: str, z: Tensor, times: Tensor) -> Tensor:
    """The teacher's ODE from noise z through `times`, by a solver of the method's."""
    teacher = Mixture()
    guided = GuidedTeacher(teacher, solver=solver)  # type: ignore[arg-type]
    return guided.walk(guided.denoiser(teacher.denoiser, {}, None), z, times[:, None].expand(-1, len(z)))


@torch.no_grad()
def paper_chain(z: Tensor) -> Tensor:
    """y at t_min by the paper's targets with y itself in the student's place."""
    teacher = Mixture()
    method = Boot(BootConfig(optim=OptimConfig(lr=1), n_sub=N, form="paper"), teacher)
    times = method.grid[0, :, None].expand(-1, len(z))
    y = teacher.denoiser(z, times[0], {}).x0
    for t, s in pairwise(times):
        f = teacher.denoiser(add_noise(teacher.schedule, y, z, t), t, {}).x0
        y = finite_difference(teacher.schedule, y, f, t, s)
    return y


if __name__ == "__main__":
    main()
