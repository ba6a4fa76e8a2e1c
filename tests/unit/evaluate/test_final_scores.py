"""A training that is scored against statistics of the user's own."""

import json
from pathlib import Path
from typing import Any

import torch

from fewstep.config import RunConfig
from fewstep.data.fashion import load_embedded
from fewstep.evaluate import load_features
from fewstep.evaluate.references import collect
from fewstep.evaluate.statistics import save_statistics
from fewstep.methods.consistency.lcm import LCM
from fewstep.methods.consistency.method_settings import LcmSettings
from fewstep.training.run import run


def test_a_run_is_scored_by_a_reference_features_and_prompts_of_its_own(tiny_sd: Path, tmp_path: Path) -> None:
    statistics, words, folder = tmp_path / "real.npz", tmp_path / "words.txt", tmp_path / "run"
    images = torch.from_numpy(load_embedded()[0][::100].copy())
    save_statistics(collect(images, load_features("fashion")), statistics)
    words.write_text("a photo of a bag\na photo of a coat\n")
    reference = {"reference": str(statistics), "features": "fashion", "clip": "fashion", "prompts": str(words)}
    values: dict[str, Any] = {
        "teacher": str(tiny_sd), "output_dir": str(folder), "data": {"source": "fashion", "limit": 4},
        "method": {"optim": {"lr": 1e-4}, "grid": {"kind": "even", "points": 40}, "steps": 8},
        "max_iterations": 1, "batch_size": 2,
        "train": {"cpu_threads": 1}, "score": {"every": 1, "num_images": 3, "steps": 1, **reference},
        "evaluate": {"steps": [1], "teacher_steps": [2], "num_images": 3, "batch_size": 2, **reference},
    }  # fmt: skip
    run(RunConfig[LcmSettings].model_validate(values), LCM)
    report = json.loads((folder / "evaluation.json").read_text())
    settings = report["protocol"]
    assert settings["reference"] == str(statistics) and settings["reference_images"] == len(images)
    assert settings["features"] == settings["clip"] == "fashion" and settings["prompts"] == str(words)
    assert [(row["model"], row["steps"]) for row in report["results"]] == [("student", 1), ("teacher", 2)]
    assert all(row["fid"] > 0 and row["clip_score"] >= 0 for row in report["results"])
    (line,) = [json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines() if '"fid"' in x]
    assert line["fid"] > 0 and (folder / "samples" / "comparison.png").exists()
