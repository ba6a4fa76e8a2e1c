"""A run from Python: its value, callbacks, and its export once more from the folder."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from fewstep.config import RunConfig
from fewstep.methods.distribution_matching.config import DMD2Config
from fewstep.training.callbacks import Callback
from fewstep.training.run import Run, export_run, run


class Recorder(Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[str, object]] = []

    def on_log(self, record):
        self.seen.append(("log", record["iteration"]))

    def on_checkpoint(self, folder: Path, iteration: int) -> None:
        self.seen.append((folder.name, iteration))

    def on_end(self, run: Run) -> None:
        self.seen.append(("end", run.iteration))


def test_a_run_returns_what_it_left_and_exports_again(tiny_sd: Path, tmp_path: Path) -> None:
    values = {
        "teacher": str(tiny_sd), "output_dir": str(tmp_path), "data": {"source": "fashion", "limit": 4},
        "method": {"name": "dmd2", "optim": {"lr": 1e-3}, "steps": 1, "student_update_every": 1}, "max_iterations": 2,
        "batch_size": 2, "train": {"cpu_threads": 1, "mixed_precision": "no"}, "log": {"every": 1},
        "checkpoint": {"every": 2},
    }  # fmt: skip
    recorder = Recorder()
    found = run(RunConfig[DMD2Config].model_validate(values), callbacks=[recorder])
    assert recorder.seen == [("log", 1), ("log", 2), ("2", 2), ("end", 2)]
    assert found.finished and found.exported is not None and found.scores == ()
    assert type(found.pipeline).__name__ == "LatentConsistencyModelPipeline"
    file = found.exported.pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    before = load_file(file)
    shutil.rmtree(found.exported.pipeline)
    assert export_run(tmp_path).pipeline == found.exported.pipeline
    assert all(torch.equal(value, before[key]) for key, value in load_file(file).items())
