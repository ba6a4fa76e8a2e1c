"""A stranger's process: it cannot import fewstep, runs the code of a folder's card, and draws with nothing but a step count."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch


class ExportError(RuntimeError):
    """The exported folder does not do in plain diffusers what the student does in memory."""


PROGRAM = """
import json, os, re, sys
sys.modules["fewstep"] = None  # from here on `import fewstep` fails
import numpy as np, torch
task = json.loads(sys.argv[1])
torch.set_num_threads(task["threads"])
os.chdir(task["folder"])
code = re.search(r"```python\\n(.*?)```", open("README.md").read(), re.S).group(1)
scope = {}
exec(code, scope)
scope["image"].size  # the card's code must end in a PIL image
pipeline, found, layers = scope["pipeline"], {}, []
if task["adapted"] is not None:
    from peft.tuners.lora import LoraLayer
    pipeline = pipeline.to(torch.float32)
    layers = [module for module in getattr(pipeline, task["adapted"]).modules() if isinstance(module, LoraLayer)]
    found["adapted"] = np.asarray(len(layers))
def draw(name):
    for steps in task["steps"]:
        generator = torch.Generator().manual_seed(steps)
        torch.manual_seed(steps)  # some pipelines draw a step's noise from here
        images = pipeline(
            *task["arguments"], num_inference_steps=steps, generator=generator, output_type="np", **task["options"]
        ).images
        found[f"{name}timesteps_{steps}"] = np.asarray(pipeline.scheduler.timesteps.tolist(), dtype=np.float64)
        found[f"{name}images_{steps}"] = np.asarray(images, dtype=np.float32)
draw("")
try:
    pipeline(*task["arguments"], num_inference_steps=max(task["steps"]) + 1, **task["options"])
    found["too_many_raised"] = np.asarray(False)
except Exception:
    found["too_many_raised"] = np.asarray(True)
if task["merges"]:
    for layer in layers:
        layer.merge()
    draw("merged_")
np.savez(task["result"], **found)
"""
"""What the process does: no fewstep, the card's own code, a step count and nothing else that the card does not ask for."""


def ask_stranger(
    folder: Path,
    steps: Sequence[int],
    arguments: list[Any],
    options: dict[str, Any],
    adapted: str | None = None,
    merges: bool = False,
) -> dict[str, np.ndarray]:
    """Timesteps and pixels [1, H, W, C] of the folder, each under its name and step count, and whether one step more raised.

    adapted: the part of the pipeline whose adapters are counted; drawn in float32 then.
    merges: whether to draw again with the adapters merged, under names that begin with merged_.
    Raises ExportError where the process fails.
    """
    with tempfile.TemporaryDirectory() as elsewhere:
        result = Path(elsewhere) / "result.npz"
        task = {
            "folder": str(folder),
            "steps": list(steps),
            "arguments": arguments,
            "options": options,
            "adapted": adapted,
            "merges": merges,
            "result": str(result),
            "threads": torch.get_num_threads(),
        }
        run = subprocess.run(
            [sys.executable, "-I", "-c", PROGRAM, json.dumps(task)],
            cwd=elsewhere,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
        )
        if run.returncode or not result.exists():
            raise ExportError(f"the exported pipeline does not run in plain diffusers:\n{run.stderr.strip()[-2000:]}")
        with np.load(result) as found:
            return dict(found)
