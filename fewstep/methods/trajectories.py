"""The teacher's trajectories from noise to sample: drawn before training, on all processes, and kept in files.

File i of a folder is a function of the settings and i alone, whoever draws it; what is there already is not drawn again.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from fewstep import io
from fewstep.diffusion.guidance import GuidedDenoiser
from fewstep.diffusion.shapes import Counts, Samples, Scales, ScalesOfTrajectories, Trajectory
from fewstep.diffusion.solvers import PATHS
from fewstep.errors import FewstepError
from fewstep.teachers.base import Teacher
from fewstep.teachers.denoiser import Cond

Solver = Literal["ddim", "dpm"]
Condition = str | int | None
"""Condition of a sample: a prompt, a label or nothing."""


@dataclass(frozen=True)
class TrajectorySettings:
    """Settings that trajectories depend on, beside teacher and conditions.

    Attributes:
        count: trajectories in all; batch_size: those of a file.
        timesteps: of the solver, from the noisiest down; after the last it steps to clean data.
        kept: those of them at which states are kept, in the same order; the sample is always kept.
        solver: DDIM (Euler), or DPM-Solver++ of second order.
        guidance_range: scales (1 = none), drawn uniformly, one a trajectory.
    """

    count: int
    batch_size: int
    timesteps: tuple[float, ...]
    kept: tuple[float, ...]
    solver: Solver
    guidance_range: tuple[float, float]

    @property
    def files(self) -> int:
        return -(-self.count // self.batch_size)

    def written(self, seed: int) -> str:
        """The settings as stored in a file."""
        return json.dumps(asdict(self) | {"seed": seed})


class Trajectories(NamedTuple):
    """N trajectories, on the CPU.

    x: states at the kept timesteps, from the noisiest, and the samples; scale: of guidance;
    conditions: the prompts, labels or Nones that they were drawn for.
    """

    x: Trajectory
    scale: ScalesOfTrajectories
    conditions: list[Condition]

    def pick(self, size: int, teacher: Teacher) -> tuple[Counts, Cond]:
        """`size` numbers of trajectories, drawn with replacement, and their conditions, on the teacher's device."""
        index = torch.randint(len(self.x), (size,))
        return index, teacher.condition([self.conditions[i] for i in index.tolist()])


@torch.no_grad()
def solve(
    teacher: Teacher, noise: Samples, cond: Cond, uncond: Cond, scale: Scales, settings: TrajectorySettings
) -> Trajectory:
    """The guided probability-flow ODE from noise: kept states, and samples behind them."""
    plain = settings.guidance_range == (1, 1)
    denoise = GuidedDenoiser(teacher.denoiser, cond, uncond, None if plain else scale)
    times = torch.tensor([*settings.timesteps, -1], device=noise.device)
    path = PATHS[settings.solver](denoise, teacher.schedule, noise, times[:, None].expand(-1, len(noise)))
    kept = [x for t, x in zip(settings.timesteps, chain([noise], path), strict=False) if t in settings.kept]
    return torch.stack([*kept, *path], dim=1)


def draw_trajectories(
    teacher: Teacher,
    conditions: Callable[[list[int]], Sequence[Condition]],
    choices: int,
    folder: Path,
    settings: TrajectorySettings,
    seed: int,
    device: torch.device,
    process: int = 0,
    processes: int = 1,
) -> None:
    """Write the files that fall to this process and are not there yet; a kill leaves only whole ones.

    conditions: gives the prompts, labels or Nones at some of the indices 0 ... choices - 1.
    Raises ValueError where the folder holds trajectories of other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mine, missing = range(process, settings.files, processes), []
    for number in mine:
        if _file(folder, number).exists():
            _check(_file(folder, number), settings, seed)
        else:
            missing.append(number)
    bar = tqdm(missing, desc="teacher's trajectories", unit="batch", disable=process > 0 or not missing)
    for number in bar:
        size = min(settings.batch_size, settings.count - number * settings.batch_size)
        generator = torch.Generator().manual_seed((seed << 32) + number)
        chosen = list(conditions(torch.randint(choices, (size,), generator=generator).tolist()))
        noise = torch.randn(size, *teacher.latent_shape, generator=generator).to(device)
        low, high = settings.guidance_range
        scale = low + (high - low) * torch.rand(size, generator=generator)
        cond, uncond = teacher.condition(chosen), teacher.null_condition(size)
        x = solve(teacher, noise, cond, uncond, scale.to(device), settings)
        metadata = {"conditions": json.dumps(chosen), "settings": settings.written(seed)}
        with io.atomic(_file(folder, number)) as partial:
            save_file({"x": x.cpu(), "scale": scale}, partial, metadata)


def read_trajectories(folder: Path, settings: TrajectorySettings, seed: int) -> Trajectories:
    """All of a folder, in order. Raises ValueError where they are of other settings."""
    x, scale, conditions = [], [], []
    for number in range(settings.files):
        path = _file(folder, number)
        _check(path, settings, seed)
        with safe_open(path, "pt") as file:
            x.append(file.get_tensor("x"))
            scale.append(file.get_tensor("scale"))
            conditions += json.loads(file.metadata()["conditions"])
    return Trajectories(torch.cat(x), torch.cat(scale), conditions)


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.safetensors"


def _check(path: Path, settings: TrajectorySettings, seed: int) -> None:
    with safe_open(path, "pt") as file:
        found = file.metadata()["settings"]
    if found != settings.written(seed):
        raise FewstepError(
            str(path),
            f"trajectories of other settings, {found}",
            settings.written(seed),
            "Delete the folder or set another output_dir",
        )
