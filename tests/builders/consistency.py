"""Shared by the tests: from test_consistency."""

import torch

from fewstep.config import OptimConfig
from fewstep.methods.base import Batch
from fewstep.methods.consistency.method import ConsistencyConfig

OPTIM = {"lr": 1e-4}


def config(**changes):
    values = {"optim": OPTIM, "solver_steps": 50, "steps": 10, "guidance_range": (3.0, 8.0)} | changes
    return ConsistencyConfig(**{**values, "optim": OptimConfig(**values["optim"])})


def batch_for(teacher, size=4):
    g = torch.Generator().manual_seed(3)
    x0 = torch.randn(size, *teacher.latent_shape, generator=g)
    prompts = ["a coat", "a bag", "", "a shirt"][:size]
    return Batch(size, teacher.condition(prompts), teacher.null_condition(size), torch.device("cpu"), latents=x0)


def nets_for(method, perturb=0.02):
    nets = {name: role.net for name, role in method.roles().items()}
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name in ("student", "target"):
            if name in nets:
                for p in nets[name].parameters():
                    p.add_(perturb * torch.randn(p.shape, generator=g))
    return nets
