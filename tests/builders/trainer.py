"""Shared by the tests: from test_trainer."""

import os

import torch
from safetensors.torch import load_file

from builders import changed
from builders.consistency import consistency, sections
from fewstep.config import RunConfig
from fewstep.data import load_source
from fewstep.methods.registry import settings_class
from fewstep.teachers import load_teacher
from fewstep.training.trainer import Trainer


def make(teacher_path, folder, **changes):
    """method: in short (`builders.consistency`)."""
    short = {"optim": {"lr": 1e-3}, "solver_steps": 40, "steps": 8, "guidance_range": [1.0, 3.0]}
    method = sections(**short | changes.pop("method", {}))
    values = {
        "teacher": str(teacher_path), "output_dir": str(folder), "data": {"source": "fashion", "limit": 64},
        "max_iterations": 6, "train": {"cpu_threads": 1, "mixed_precision": "no"}, "batch_size": 4,
        "checkpoint": {"every": 3}, "log": {"every": 2},
    }  # fmt: skip
    settings = settings_class(method["name"])
    config = RunConfig[settings].model_validate(changed(values, changes) | {"method": method})
    teacher = load_teacher(config.teacher)
    return Trainer(config, consistency(config.method, teacher), teacher, load_source(config.data, teacher.image_size))


def weights(folder, iteration, names=("student", "target", "ema", "student_optimizer")):
    files = [folder / "checkpoints" / str(iteration) / f"{n}.safetensors" for n in names]
    return {f"{f.stem}.{k}": v for f in files for k, v in load_file(f).items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    different = [k for k in a if not torch.equal(a[k], b[k])]
    assert not different, different[:3]


def environment():
    return os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
