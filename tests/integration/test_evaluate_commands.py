"""`fewstep evaluate`, `reference` and `compare` as a user calls them, and what they say when something does not fit."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from fewstep.cli.main import main
from fewstep.data.fashion import load_embedded
from fewstep.evaluate import load_features
from fewstep.evaluate.compare import paired


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty real images as PNG files."""
    from PIL import Image

    path = tmp_path_factory.mktemp("images")
    for i, image in enumerate(load_embedded()[0][::33][:60]):
        Image.fromarray(image.transpose(1, 2, 0)).save(path / f"{i:03d}.png")
    return path


@pytest.fixture(scope="module")
def protocol(folder: Path) -> Path:
    """A protocol of eight images with every score that needs no weights but the package's."""
    settings: dict[str, Any] = {
        "about": "a test",
        "images": 8,
        "resolution": 32,
        "conditions": {"source": "prompts", "file": "words.jsonl"},
        "comparisons": [
            {
                "features": "fashion",
                "reference": "real.npz",
                "metrics": ["fid", "kid", "precision_recall", "density_coverage", "diversity"],
                "nearest_k": 3,
            },
            {
                "name": "patch",
                "features": "fashion",
                "view": {"crop": 16},
                "reference": "patch.npz",
                "metrics": ["fid"],
            },
        ],
        "clip": {"model": "fashion"},
    }
    file = folder.parent / "tiny.yaml"
    file.write_text(yaml.safe_dump(settings))
    words = ["a photo of a bag", "", "ein Kleid, rot 👗", 'a "quoted", dress']
    (folder.parent / "words.jsonl").write_text("".join(json.dumps(w) + "\n" for w in words), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def data(folder: Path, protocol: Path) -> list[str]:
    """Options with the statistics that the protocol needs, made by `fewstep reference`."""
    real, patch = folder.parent / "real.npz", folder.parent / "patch.npz"
    main(["reference", str(folder), "--protocol", str(protocol), "--output", str(real)])
    main(["reference", str(folder), "--protocol", str(protocol), "--comparison", "patch", "--output", str(patch)])
    words = str(folder.parent / "words.jsonl")
    return ["--reference", str(real), "--reference", f"patch={patch}", "--prompts", words]


def test_a_protocol_gives_every_score_and_stands_in_the_report(
    protocol: Path, data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "e.json"
    main(["evaluate", "fashion", "--protocol", str(protocol), *data, "--steps", "1", "--output", str(output)])
    report = json.loads(output.read_text())
    assert report["protocol"]["name"] == "tiny" and len(report["protocol"]["hash"]) == 12
    assert report["protocol"]["definition"]["comparisons"][1]["view"]["crop"] == 16
    assert report["protocol"]["reference_features"] == "those of this evaluation"
    (row,) = report["results"]
    scores = {"fid", "kid", "precision", "recall", "density", "coverage", "diversity", "fid_patch", "clip_score"}
    assert scores <= set(row) and all(np.isfinite(row[key]) for key in scores)
    assert 0 <= row["precision"] <= 1 and row["fid_patch"] != row["fid"] and row["peak_memory_gib"] > 0.1
    assert "FID patch" in capsys.readouterr().out


def test_a_folder_of_images_is_scored_like_a_pipeline(
    folder: Path, protocol: Path, data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "e.json"
    arguments = ["--protocol", str(protocol), *data, "--output", str(output)]
    main(["evaluate", str(folder), *arguments, "--num-images", "60"])
    assert "|     - |        - |           - |" in capsys.readouterr().out  # steps, guidance, evaluations
    report = json.loads(output.read_text())
    assert report["protocol"]["name"] == "tiny, changed: images"
    (row,) = report["results"]
    # The images of the reference themselves.
    assert row["fid"] == pytest.approx(0, abs=1e-4) and row["precision"] == row["recall"] == 1
    assert row["steps"] is None and row["images"] == 60
    with pytest.raises(SystemExit, match=r"images: found 60 in .*; expected at least 61"):
        main(["evaluate", str(folder), *arguments, "--num-images", "61"])
    with pytest.raises(SystemExit, match="For images, leave out --keep and --guidance-scale"):
        main(["evaluate", str(folder), *arguments, "--keep", str(tmp_path / "kept")])


def test_a_pipeline_and_features_of_the_hub_are_found_in_its_cache(
    tiny_ddpm: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    from fewstep.evaluate.models.clip import clip_folder

    small = tmp_path / "small"
    small.mkdir()
    for i in range(4):
        Image.open(folder / f"{i:03d}.png").resize((16, 16)).save(small / f"{i}.png")
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(f"huggingface_hub.constants.{variable}", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, source in (("pixels", tiny_ddpm), ("clip", clip_folder("fashion"))):
        repository = tmp_path / f"models--somebody--{name}"
        shutil.copytree(source, repository / "snapshots" / "0123")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0123")
    call = ["evaluate", "--num-images", "4", "--steps", "1", "--output", str(tmp_path / "e.json"), "--reference"]
    main([*call, str(small), "somebody/pixels", "--features", "somebody/clip"])
    report = json.loads((tmp_path / "e.json").read_text())
    assert report["protocol"]["pipeline"] == "somebody/pixels" and report["results"][0]["fid"] > 0
    assert report["protocol"]["features"] == "somebody/clip" and len(report["protocol"]["features_sha256"]) == 64
    with pytest.raises(
        SystemExit, match=r"pipeline: found 'nobody/pixels'; expected a local folder, .*hf download nobody/pixels"
    ):
        main([*call, str(small), "nobody/pixels", "--features", "somebody/clip"])
    with pytest.raises(SystemExit, match=r"found images of 32 pixels in .*; expected 16"):
        main([*call, str(folder), "somebody/pixels", "--features", "somebody/clip"])


def test_the_distance_to_a_teacher_is_zero_for_the_teacher(protocol: Path, data: list[str], tmp_path: Path) -> None:
    teacher, output = tmp_path / "teacher.safetensors", tmp_path / "e.json"
    draw = ["--steps", "1", "--num-images", "6", "--guidance-scale", "1"]
    words = data[-2:]
    main(["reference", "fashion", *draw, *words, "--protocol", str(protocol), "--output", str(teacher)])
    options = ["--protocol", str(protocol), *data, "--teacher-statistics", str(teacher), "--output", str(output)]
    main(["evaluate", "fashion", *draw, *options])
    report = json.loads(output.read_text())
    assert report["results"][0]["fid_to_teacher"] == pytest.approx(0, abs=1e-3)
    assert report["results"][0]["fid"] > 0.01
    assert report["protocol"]["name"] == "tiny, changed: images and fid_to_teacher"


class Brightness(torch.nn.Module):
    """Features and class logits that can be written out: a bright image is of class 1 for certain, a dark one of class 0."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        mean = images.double().mean((1, 2, 3))[:, None] / 255
        return {"features": mean.expand(-1, 2), "logits": 1e4 * torch.cat([0.3 - mean, mean - 0.3], 1)}


def brightness() -> torch.nn.Module:
    return Brightness()


def test_inception_score_and_cmmd_by_a_protocol(folder: Path, tmp_path: Path) -> None:
    from fewstep.evaluate.metrics.distances import cmmd
    from fewstep.evaluate.metrics.frechet import frechet_distance
    from fewstep.evaluate.models.clip import clip_folder
    from fewstep.evaluate.real_images import real_images
    from fewstep.evaluate.statistics import moments

    clip = str(clip_folder("fashion"))
    settings: dict[str, Any] = {
        "about": "a test",
        "images": 40,
        "conditions": {"source": "none"},
        "comparisons": [
            {"features": f"{__name__}:brightness", "metrics": ["inception_score"], "splits": 1},
            {"name": "clip", "features": clip, "reference": "fashion", "metrics": ["cmmd", "fid"]},
        ],
    }
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(settings))
    arguments = ["evaluate", str(folder), "--protocol", str(tmp_path / "p.yaml"), "--output", str(tmp_path / "e.json")]
    main([*arguments, "--batch-size", "7"])
    (row,) = json.loads((tmp_path / "e.json").read_text())["results"]
    images = torch.stack(list(real_images(str(folder)))[:40])
    bright = float((images.double().mean((1, 2, 3)) / 255 > 0.3).double().mean())
    assert 0 < bright < 1
    # Certain classes: the entropy of their shares.
    entropy = -(bright * np.log(bright) + (1 - bright) * np.log(1 - bright))
    assert row["inception_score"] == pytest.approx(np.exp(entropy), rel=1e-6) and row["fid"] is None
    seen = load_features(clip)
    real = torch.cat([seen(part) for part in torch.from_numpy(load_embedded()[0]).split(64)])
    assert row["cmmd_clip"] == pytest.approx(cmmd(seen(images), real), rel=1e-4)
    # The moments in the package are of another network: those of the package's images in this one are taken.
    wanted = frechet_distance(moments(seen(images)), moments(real))
    assert row["fid_clip"] == pytest.approx(wanted, rel=1e-3)
    settings["comparisons"][0]["features"] = "fashion"
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(
        SystemExit, match="found 'fashion' without class logits; expected features with them, for inception_score"
    ):
        main(arguments)


@pytest.mark.slow
def test_processes_share_a_folder_of_images(folder: Path, tmp_path: Path) -> None:
    """One of the three has no batch at all."""
    rows = []
    for processes in (1, 3):
        launch = ["--num_processes", str(processes), "--main_process_port", "0"]
        output = tmp_path / f"{processes}.json"
        done = subprocess.run(
            [
                sys.executable, "-m", "accelerate.commands.launch", *launch, *(["--multi_gpu"] if processes > 1 else []),
                "-m", "fewstep", "evaluate", str(folder), "--num-images", "58", "--batch-size", "30",
                "--output", str(output),
            ],
            env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        rows += json.loads(output.read_text())["results"]
    for score in ("fid", "clip_score"):
        assert rows[0].pop(score) == pytest.approx(rows[1].pop(score), rel=1e-9)
    assert rows[0] == rows[1]


def test_mismatches_are_reported_in_one_sentence(
    folder: Path, protocol: Path, data: list[str], tiny_ddpm: Path, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=r"found no real\.npz; .*\. Put it into"):
        main(["evaluate", "fashion", "--protocol", str(protocol), "--prompts", data[-1]])
    with pytest.raises(SystemExit, match=r"--features: found .*; expected nothing with protocol tiny"):
        main(["evaluate", "fashion", "--protocol", str(protocol), "--features", "fashion"])
    with pytest.raises(SystemExit, match="found 'pach'; expected a comparison"):
        main(["evaluate", "fashion", "--protocol", str(protocol), *data, "--reference", "pach=x"])
    with pytest.raises(SystemExit, match="found images of 16 pixels; expected 32, by protocol"):
        main(["evaluate", str(tiny_ddpm), "--protocol", str(protocol), *data, "--steps", "1"])
    with pytest.raises(SystemExit, match="expected a file or one of cifar10_50k"):
        main(["evaluate", "fashion", "--protocol", "nothing"])
    run = tmp_path / "run"
    shutil.copytree(tiny_ddpm, run / "pipeline")
    with pytest.raises(SystemExit, match="the folder of a run; expected its pipeline"):
        main(["evaluate", str(run)])
    (run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"broken")
    with pytest.raises(SystemExit, match="which cannot be loaded"):
        main(["evaluate", str(run / "pipeline"), "--steps", "1"])
    (run / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"without a model_index\.json and without images"):
        main(["evaluate", str(run / "empty")])
    # Statistics of the whole images where those of patches are wanted.
    wrong = [*data[:2], "--reference", f"patch={data[1]}", *data[-2:]]
    with pytest.raises(SystemExit, match=r"of view {}; expected"):
        main(["evaluate", "fashion", "--protocol", str(protocol), *wrong, "--steps", "1"])
    with pytest.raises(SystemExit, match=r"ends in \.npz or \.safetensors"):
        main(["reference", str(folder), "--output", str(tmp_path / "x.pt")])


def test_pairs_are_drawn_from_the_same_initial_noise(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    calls = ["compare", "fashion", "fashion", "--pairs", "4", "--teacher", "fashion", "--teacher-steps", "2"]
    main([*calls, "--steps", "2", "1", "--output", str(tmp_path / "same")])
    result = json.loads((tmp_path / "same.json").read_text())
    # A is the teacher itself.
    assert result["to_teacher"]["pixels"]["a"] == result["to_teacher"]["features"]["a"] == 0
    assert result["to_teacher"]["pixels"]["a_closer"] == 1 and result["to_teacher"]["pixels"]["b"] > 0
    assert result["between"]["pixels"] == pytest.approx(result["to_teacher"]["pixels"]["b"])
    assert Image.open(tmp_path / "same.png").height == 3 * 66 - 2
    assert "A closer in 100 % of 4 pairs" in capsys.readouterr().out


def test_paired_differences_have_their_standard_error() -> None:
    a, b = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([2.0, 2.0, 5.0]).double()
    got = paired(a, b)
    assert got["difference"] == pytest.approx(-1) and got["standard_error"] == pytest.approx(1 / np.sqrt(3))
    assert got["a_closer"] == pytest.approx((1 + 0.5 + 1) / 3)
