"""The program of `verify.run_isolated`: without fewstep, with the code of the card, and with no option that it does not need.

Run as `python -I _isolated.py TASK RESULT`: a JSON object of `Task`, and the .npz file to write.
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import torch

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from numpy.typing import NDArray

Found = dict[str, "NDArray[np.generic]"]


class Task(TypedDict):
    """folder, steps, arguments, options: of the pipeline and its calls. adapted, merges: see `run_isolated`."""

    folder: str
    steps: list[int]
    arguments: list[object]
    options: dict[str, object]
    adapted: str | None
    merges: bool
    threads: int


def open_by_card() -> "DiffusionPipeline":
    """The pipeline of the card's code in this folder, which must end in a PIL image."""
    code = re.search(r"```python\n(.*?)```", Path("README.md").read_text(encoding="utf-8"), re.S)
    assert code is not None, "the card has no code"
    scope: dict[str, DiffusionPipeline] = {}
    exec(code[1], scope)
    assert scope["image"].size
    return scope["pipeline"]


def sample(pipeline: "DiffusionPipeline", task: Task, prefix: str = "") -> Found:
    found: Found = {}
    for steps in task["steps"]:
        generator = torch.Generator().manual_seed(steps)
        torch.manual_seed(steps)  # some pipelines draw a step's noise from here
        images = pipeline(
            *task["arguments"], num_inference_steps=steps, generator=generator, output_type="np", **task["options"]
        ).images
        found[f"{prefix}timesteps_{steps}"] = np.asarray(pipeline.scheduler.timesteps.tolist(), dtype=np.float64)
        found[f"{prefix}images_{steps}"] = np.asarray(images, dtype=np.float32)
    return found


def one_step_more_raises(pipeline: "DiffusionPipeline", task: Task) -> bool:
    try:
        pipeline(*task["arguments"], num_inference_steps=max(task["steps"]) + 1, **task["options"])
    except Exception:
        return True
    return False


def main(task: Task, result: str) -> None:
    torch.set_num_threads(task["threads"])
    os.chdir(task["folder"])
    pipeline = open_by_card()
    found: Found = {}
    layers = []
    if task["adapted"] is not None:
        from peft.tuners.lora import LoraLayer

        pipeline = pipeline.to(torch.float32)
        modules = pipeline.components[task["adapted"]].modules()
        layers = [module for module in modules if isinstance(module, LoraLayer)]
        found["adapted"] = np.asarray(len(layers))
    found |= sample(pipeline, task)
    found["too_many_raised"] = np.asarray(one_step_more_raises(pipeline, task))
    if task["merges"]:
        for layer in layers:
            layer.merge()
        found |= sample(pipeline, task, "merged_")
    np.savez(result, allow_pickle=False, **found)


if __name__ == "__main__":
    sys.modules["fewstep"] = None  # type: ignore[assignment]  # from here on `import fewstep` fails
    main(json.loads(sys.argv[1]), sys.argv[2])
