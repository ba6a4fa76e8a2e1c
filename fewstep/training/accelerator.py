"""The accelerator of a run: precision, tracker, threads of the CPU."""

import os

import torch
from accelerate import Accelerator

from fewstep.config import MethodConfig, RunConfig


def new_accelerator(config: RunConfig[MethodConfig]) -> Accelerator:
    """The accelerator that the settings ask for; on a CPU, the processes share its cores."""
    accelerator = Accelerator(
        mixed_precision=_precision(config.train.mixed_precision),
        log_with=config.log.tracker,
        project_dir=config.output_dir,
    )
    if accelerator.device.type == "cpu":
        # `accelerate launch` gives every process one thread, which leaves the other cores idle.
        share = max(1, (os.cpu_count() or 1) // accelerator.num_processes)
        torch.set_num_threads(config.train.cpu_threads or share)
    return accelerator


def _precision(name: str) -> str:
    return ("bf16" if torch.cuda.is_available() else "no") if name == "auto" else name
