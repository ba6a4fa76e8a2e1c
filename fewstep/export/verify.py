"""Check of an export: a process that cannot import fewstep runs the card's code, and its images are compared."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from fewstep.errors import FewstepError
from fewstep.export.card import Call

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from numpy.typing import NDArray

    from fewstep.teachers import Denoiser

Sampled = dict[str, "NDArray[np.float64]"]
"""Timesteps and pixels [1, H, W, C], as timesteps_<steps> and images_<steps>, and further findings of `run_isolated`."""

PROGRAM = Path(__file__).parent / "_isolated.py"
TOLERANCES = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 4e-2}
"""Largest difference between reloaded and in-memory pixels in [0, 1]: rounding of the dtype, no more."""


class ExportError(FewstepError):
    """The exported folder does not do in plain diffusers what the student does in memory."""


def too_many(steps: Sequence[int]) -> ExportError:
    """The error about a count above those trained that runs."""
    return ExportError(
        f"num_inference_steps={max(steps) + 1}",
        "images",
        f"an error, for at most {max(steps)} steps were trained",
        "The scheduler's grid and allowed_steps do not belong together",
    )


def run_isolated(folder: Path, call: Call, adapted: str | None = None, merges: bool = False) -> Sampled:
    """Sample from a folder by its card's code in a process without fewstep; `too_many_raised`: whether one step more raised.

    adapted: the part of the pipeline whose adapters are counted, as "adapted"; sampling is in float32 then.
    merges: whether to sample again with the adapters merged, under names that begin with merged_.
    Raises ExportError where the process fails.
    """
    with tempfile.TemporaryDirectory() as elsewhere:
        result = Path(elsewhere) / "result.npz"
        task = {
            "folder": str(folder),
            "steps": list(call.steps),
            "arguments": list(call.arguments),
            "options": dict(call.options or {}),
            "adapted": adapted,
            "merges": merges,
            "threads": torch.get_num_threads(),
        }
        run = subprocess.run(
            [sys.executable, "-I", str(PROGRAM), json.dumps(task), str(result)],
            cwd=elsewhere,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
        )
        if run.returncode or not result.exists():
            raise ExportError(
                "pipeline",
                "an error in plain diffusers",
                "a run of the card's code",
                f"It ended with:\n{run.stderr.strip()[-2000:]}",
            )
        with np.load(result) as found:
            return dict(found)


def sample_in_memory(pipeline: "DiffusionPipeline", call: Call, refuses: bool) -> Sampled:
    """The same of the student in memory, under the names that `run_isolated` gives.

    refuses: whether its scheduler has to refuse one step more than the largest count.
    Raises ExportError for a count that does not run, and where one step more runs though it should not.
    """
    sampled: Sampled = {}
    options = call.options or {}
    for count in call.steps:
        generator = torch.Generator().manual_seed(count)
        try:
            with torch.random.fork_rng():
                torch.manual_seed(count)
                images = pipeline(
                    *call.arguments, num_inference_steps=count, generator=generator, output_type="np", **options
                ).images
        except ValueError as error:
            raise ExportError(f"num_inference_steps={count}", f"an error ({error})", "images") from error
        sampled[f"timesteps_{count}"] = np.asarray(pipeline.scheduler.timesteps.tolist(), dtype=np.float64)
        sampled[f"images_{count}"] = np.asarray(images, dtype=np.float32)
    if not refuses:
        return sampled
    try:
        pipeline(*call.arguments, num_inference_steps=max(call.steps) + 1, **options)
    except ValueError:
        return sampled
    raise too_many(call.steps)


def timesteps_of(sampled: Mapping[str, "NDArray[np.float64]"], steps: Sequence[int]) -> dict[int, list[float]]:
    """The timesteps that the stock scheduler ran, by step count."""
    return {count: sampled[f"timesteps_{count}"].tolist() for count in steps}


def compare(memory: Sampled, reloaded: Sampled, steps: Sequence[int], tolerance: float, refuses: bool) -> None:
    """Compare samples. Raises ExportError where timesteps or pixels differ, or where a step too many does not raise."""
    for count in steps:
        expected, found = memory[f"timesteps_{count}"].tolist(), reloaded[f"timesteps_{count}"].tolist()
        if expected != found:
            raise ExportError(
                f"num_inference_steps={count}", f"timesteps {found} in plain diffusers", f"{expected}, as in memory"
            )
        difference = float(np.abs(memory[f"images_{count}"] - reloaded[f"images_{count}"]).max())
        # Not `>`: a NaN must fail too.
        if not difference <= tolerance:
            raise ExportError(
                f"num_inference_steps={count}",
                f"other pixels in plain diffusers than in memory, by {difference:.2g}",
                f"a difference of at most {tolerance:.2g}",
            )
    if refuses and not reloaded["too_many_raised"]:
        raise too_many(steps)


def tolerance_of(student: "Denoiser", last_timestep: int, dtype: str) -> float:
    """The dtype's; for epsilon, times a tenth of sigma / alpha at pure noise, by which x0 enlarges rounding of eps."""
    if student.prediction_type != "epsilon":
        return TOLERANCES[dtype]
    alpha, sigma = student.schedule(torch.tensor([last_timestep]))
    return TOLERANCES[dtype] * max(1.0, 0.1 * float(sigma / alpha))
