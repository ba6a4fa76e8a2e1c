"""The teacher's samples with the noises they come from: drawn before training, on all processes, and kept in files.

File i of a folder is a function of the settings and i alone, whoever draws it; what is there already is not drawn again.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fewstep.process import ode_step
from fewstep.teachers.base import Cond, Teacher
from fewstep.teachers.guidance import guided


@dataclass(frozen=True)
class PairSettings:
    """What the pairs depend on, beside teacher and conditions.

    Attributes:
        count: pairs in all; batch_size: pairs of a file.
        solver_steps: DDIM or Euler steps from noise to sample.
        guidance_scale: of the teacher, 1 = none.
    """

    count: int
    batch_size: int
    solver_steps: int
    guidance_scale: float
    seed: int

    @property
    def files(self) -> int:
        return -(-self.count // self.batch_size)


class Pairs(NamedTuple):
    """N noises and samples [N, C, h, w] on the CPU, and the prompts, labels or Nones they were drawn for."""

    noise: Tensor
    x0: Tensor
    conditions: list[Any]

    def pick(self, size: int, teacher: Teacher, device: torch.device) -> tuple[Tensor, Tensor, Cond]:
        """noise, x0 and conditions of `size` pairs, drawn with replacement."""
        index = torch.randint(len(self.noise), (size,))
        cond = teacher.condition([self.conditions[i] for i in index.tolist()])
        return self.noise[index].to(device), self.x0[index].to(device), cond


def solver_timesteps(steps: int, num_train_timesteps: int) -> Tensor:
    """steps + 1 timesteps from the noisiest to clean data (-1), as even as whole numbers are ("trailing")."""
    return torch.linspace(num_train_timesteps, 0, steps + 1).round().long() - 1


@torch.no_grad()
def solve(teacher: Teacher, noise: Tensor, cond: Cond, uncond: Cond, settings: PairSettings) -> Tensor:
    """The teacher's sample [B, C, h, w] from noise: the end of its guided probability-flow ODE."""
    x, grid = noise, solver_timesteps(settings.solver_steps, teacher.num_train_timesteps)
    for t, s in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
        at, to = (torch.full((len(x),), v, device=x.device) for v in (t, s))
        x = ode_step(teacher.schedule, guided(teacher.denoiser, x, at, cond, uncond, settings.guidance_scale), to)
    return x


def draw_pairs(
    teacher: Teacher,
    conditions: Callable[[list[int]], Sequence[Any]],
    choices: int,
    folder: Path,
    settings: PairSettings,
    device: torch.device,
    process: int = 0,
    processes: int = 1,
) -> None:
    """Write the files that fall to this process and are not there yet; a kill leaves only whole ones.

    conditions: gives the prompts, labels or Nones at some of the indices 0 ... choices - 1.
    Raises ValueError where the folder holds pairs of other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(process, settings.files, processes):
        path = _file(folder, number)
        if path.exists():
            _check(path, settings)
            continue
        size = min(settings.batch_size, settings.count - number * settings.batch_size)
        generator = torch.Generator().manual_seed((settings.seed << 32) + number)
        chosen = list(conditions(torch.randint(choices, (size,), generator=generator).tolist()))
        noise = torch.randn(size, *teacher.latent_shape, generator=generator).to(device)
        x0 = solve(teacher, noise, teacher.condition(chosen), teacher.null_condition(size), settings)
        partial = path.with_name(path.name + ".partial")
        metadata = {"conditions": json.dumps(chosen), "settings": json.dumps(asdict(settings))}
        save_file({"noise": noise.cpu(), "x0": x0.cpu()}, partial, metadata)
        partial.rename(path)


def read_pairs(folder: Path, settings: PairSettings) -> Pairs:
    """All pairs of a folder, in order. Raises ValueError where they are of other settings."""
    noise, x0, conditions = [], [], []
    for number in range(settings.files):
        path = _file(folder, number)
        _check(path, settings)
        with safe_open(path, "pt") as file:
            noise.append(file.get_tensor("noise"))
            x0.append(file.get_tensor("x0"))
            conditions += json.loads(file.metadata()["conditions"])
    return Pairs(torch.cat(noise), torch.cat(x0), conditions)


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.safetensors"


def _check(path: Path, settings: PairSettings) -> None:
    with safe_open(path, "pt") as file:
        found = json.loads(file.metadata()["settings"])
    if found != asdict(settings):
        raise ValueError(
            f"method.pairs: {path} holds pairs of other settings: {found}; wanted: {asdict(settings)}. Delete the folder or "
            "take another output_dir"
        )
