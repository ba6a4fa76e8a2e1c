"""Shared by the tests: from test_dmd2."""

import torch
from torch import nn

from builders import changed
from fewstep.config import RunConfig
from fewstep.data import load_source
from fewstep.methods.distribution_matching.config import DMD2Config
from fewstep.methods.distribution_matching.dmd2 import DMD2
from fewstep.teachers import load_teacher
from fewstep.training.trainer import Trainer

GAN = {"adversarial": {"weight": 0.1}}


def config(**changes):
    return DMD2Config.model_validate({"optim": {"lr": 1e-3}} | changes)


def make(teacher_path, folder, method, **changes):
    values = {
        "teacher": str(teacher_path), "output_dir": str(folder), "data": {"source": "fashion", "limit": 32},
        "max_iterations": 6, "train": {"cpu_threads": 1, "mixed_precision": "no"}, "batch_size": 2,
        "checkpoint": {"every": 3}, "log": {"every": 2}, "method": {"optim": {"lr": 1e-3}} | method,
    }  # fmt: skip
    config = RunConfig[DMD2Config].model_validate(changed(values, changes))
    teacher = load_teacher(config.teacher)
    return Trainer(config, DMD2(config.method, teacher), teacher, load_source(config.data, teacher.image_size))


class Recorder(nn.Module):
    """A student that keeps its inputs and whether gradients were on."""

    def __init__(self, net):
        super().__init__()
        self.net, self.seen = net, []

    def forward(self, x_t, t, cond):
        self.seen.append((x_t.detach().clone(), t[0].item(), torch.is_grad_enabled()))
        return self.net(x_t, t, cond)
