"""Shared by the tests: short trainings on pixels."""

from pathlib import Path
from typing import Any

import torch

from builders.consistency import sections
from fewstep.config import RunConfig
from fewstep.data import load_source
from fewstep.diffusion.prediction import ode_step
from fewstep.methods.registry import method_class, settings_class
from fewstep.teachers import load_teacher
from fewstep.training.trainer import Trainer


def trained(trained_pixels: tuple[Path, Path], output: Path, method: dict[str, Any], iterations: int) -> Trainer:
    """method: settings with a name, or those of a consistency method in short (`builders.consistency`)."""
    pipeline, images = trained_pixels
    method = {"optim": {"lr": 2e-3, "decay": "cosine"}} | method
    if "name" not in method:
        method = sections(**{"guidance_range": None} | method)
    settings: Any = settings_class(method["name"])
    run = RunConfig[settings].model_validate(
        {
            "teacher": str(pipeline), "output_dir": str(output), "data": {"source": "folder", "path": str(images)},
            "method": method,
            "max_iterations": iterations, "batch_size": 16, "train": {"ema_decay": 0.9, "cpu_threads": 1},
            "log": {"every": iterations}, "evaluate": None,
            }
    )  # fmt: skip
    teacher = load_teacher(str(pipeline))
    trainer = Trainer(run, method_class(run.method.name)(run.method, teacher), teacher, load_source(run.data, 8))
    assert trainer.fit()
    return trainer


def missed(trainer: Trainer, name: str) -> float:
    """Mean squared distance of one step of a network from the teacher's 50 DDIM steps, of the same 64 noises."""
    teacher = trainer.teacher
    noise = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        x = noise
        for t in range(999, -1, -20):
            x = ode_step(teacher.schedule, teacher.denoiser(x, torch.full((64,), t), {}), torch.full((64,), t - 20))
        return (trainer.roles[name].net(noise, torch.full((64,), 999), {}).x0 - x).square().mean().item()
