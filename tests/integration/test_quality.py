"""A short training on the embedded teacher improves what it is meant to improve, far outside the noise of seeds."""

import json
import os
import subprocess
import sys

import pytest

from builders import ROOT


@pytest.mark.slow
def test_the_student_beats_its_teacher_at_few_steps(tmp_path):
    done = subprocess.run(
        [
            sys.executable, "train/consistency.py", "--config", "configs/fashion/trajectory.yaml",
            f"output_dir={tmp_path}", "method.trajectories.count=1000", "max_iterations=300", "evaluate.num_images=500",
            "evaluate.steps=[1,2,4]", "evaluate.teacher_steps=[1,2,50]",
        ],
        cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "evaluation.json").read_text())["results"]
    fid = {(row["model"], row["steps"]): row["fid"] for row in results}
    gap = fid["teacher", 1] - fid["teacher", 50]
    assert fid["teacher", 1] - fid["student", 1] > 0.25 * gap
    assert fid["student", 4] < fid["student", 1]
