"""`plan`: memory and operations of a run, before it starts."""

import warnings

import torch

from fewstep.config import MethodConfig, RunConfig, Strict
from fewstep.methods.base import Method
from fewstep.plan.fake_tensors import fake_tensor_fixes
from fewstep.plan.figures import Plan
from fewstep.plan.measure import MeasuredRun
from fewstep.plan.meter import Meter

__all__ = ["Plan", "plan"]


def plan(
    method_class: type[Method],
    config: RunConfig[MethodConfig],
    device: str = "cuda",
    processes: int = 1,
    whole_round: bool = True,
) -> Plan:
    """The plan of a run on "cuda" or "cpu"; only configs and vocabularies are read, nothing is written.

    whole_round: measure a round, which operations need; otherwise the iteration that has all updates, enough for memory.

    Has to be called where accelerate takes the CPU (ACCELERATE_USE_CPU), with one mixed_precision per program.
    """
    precision = config.train.mixed_precision
    precision = ("bf16" if device == "cuda" else "no") if precision == "auto" else precision
    changes: dict[str, Strict] = {
        # Autocast of fp16 keeps as much as that of bf16, which needs no GPU.
        "train": config.train.model_copy(
            update={
                "mixed_precision": "no" if precision == "no" else "bf16",
                "init_from": None, "compile": False, "cpu_threads": torch.get_num_threads(),
            }
        ),
        "log": config.log.model_copy(update={"tracker": None}),
        "checkpoint": config.checkpoint.model_copy(update={"resume": None}),
    }  # fmt: skip
    meter = Meter()
    # torch warns of its own way to copy tensors without values.
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
    with fake_tensor_fixes(cuda=device == "cuda"), meter:
        measured = MeasuredRun(method_class, config.model_copy(update=changes), device, meter)
        measured.run(whole_round)
        return measured.plan(precision, processes)
