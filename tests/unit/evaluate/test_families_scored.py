"""`fewstep evaluate` as the papers' protocols ask for it: tiny pipelines of every family, images of a folder, what is missing."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from builders.families import build_dit, build_sd3, build_sdxl
from builders.inception import random_inception
from fewstep.cli.main import main
from fewstep.data.fashion import load_embedded
from fewstep.evaluate.metrics.frechet import warn_few

PROMPTS = ["A bag, red.", "", "ein Kleid 👗", 'the "coat"']


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A protocol in the manner of coco2014_30k, in features that come with the package, and its data where they belong."""
    root = tmp_path_factory.mktemp("families")
    view = {"crop": "square", "size": 16, "filter": "lanczos"}
    settings = {
        "about": "a small coco2014_30k",
        "images": 6,
        "uint8": "truncate",
        "conditions": {"source": "prompts", "file": "captions.txt", "count": 3},
        "comparisons": [
            {"features": "fashion", "view": view, "reference": "val.npz", "metrics": ["fid", "kid"]},
            {
                "name": "patch",
                "features": "fashion",
                "view": {"crop": 12},
                "reference": "patch.npz",
                "metrics": ["fid"],
            },
        ],
        "clip": {"model": "fashion", "prefix": "A photo depicts ", "scale": 1.0, "clamp": False, "view": view},
    }
    (root / "small.yaml").write_text(yaml.safe_dump(settings))
    labels = {**settings, "conditions": {"source": "labels", "num_labels": 10, "draw": "random"}, "clip": None}
    (root / "labels.yaml").write_text(yaml.safe_dump(labels))
    real = root / "real"
    real.mkdir()
    for i, image in enumerate(load_embedded()[0][::100]):
        Image.fromarray(image.transpose(1, 2, 0)).save(real / f"{i:02d}.png")
    for name in ("small", "labels"):
        data = root / "data" / name
        data.mkdir(parents=True)
        (data / "captions.txt").write_text("\n".join(p for p in PROMPTS if p) + "\n", encoding="utf-8")
        made = ["reference", str(real), "--protocol", str(root / f"{name}.yaml")]
        main([*made, "--output", str(data / "val.npz")])
        main([*made, "--comparison", "patch", "--output", str(data / "patch.npz")])
    return root


def scored(folder: Path, source: str, *options: str, protocol: str = "small") -> dict[str, Any]:
    output = folder / "e.json"
    main(["evaluate", source, "--protocol", str(folder / f"{protocol}.yaml"), "--output", str(output), *options])
    report: dict[str, Any] = json.loads(output.read_text())
    return report


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "dit"])
def test_a_folder_of_every_family_is_scored(
    family: str,
    folder: Path,
    tiny_sd: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("FEWSTEP_DATA", str(folder / "data"))
    warn_few.cache_clear()
    source = tiny_sd
    more = {"num_labels": 1000} if family == "dit" else {}  # DiTPipeline guides by class 1000, however many there are
    if family != "sd":
        source = {"sdxl": build_sdxl, "sd3": build_sd3, "dit": build_dit}[family](tmp_path / family, **more)
    protocol = "labels" if family == "dit" else "small"
    report = scored(folder, str(source), "--steps", "1", "2", "--batch-size", "4", protocol=protocol)
    assert report["protocol"]["name"] == protocol and report["protocol"]["uint8"] == "truncate"
    for count in (6, 20):  # generated and real
        assert caplog.text.count(f"covariance: found {count} images; expected more than the 128 dimensions") == 1
    rows = report["results"]
    assert [row["steps"] for row in rows] == [1, 2] and all(row["images"] == 6 for row in rows)
    for row in rows:
        assert all(np.isfinite(row[key]) for key in ("fid", "kid", "fid_patch")) and row["fid"] > 0
        assert (row["clip_score"] is None) == (family == "dit")
        # Guidance by default, two evaluations a step; a pipeline may itself leave it out at one step.
        assert row["network_evaluations"] in (row["steps"], 2 * row["steps"]) and row["peak_memory_gib"] > 0


def test_a_wrong_reference_and_missing_data_are_reported(
    folder: Path, tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEWSTEP_DATA", raising=False)
    with pytest.raises(
        SystemExit, match=r"protocol small: found no .*\. Put it into a folder small/ under the one that"
    ):
        scored(folder, str(tiny_sd))
    shutil.copytree(folder / "data", tmp_path / "data")
    data = tmp_path / "data" / "small"
    monkeypatch.setenv("FEWSTEP_DATA", str(tmp_path / "data"))
    (data / "captions.txt").write_text("one caption\n")
    with pytest.raises(SystemExit, match=r"prompts: found 1 in .*; expected 3, by protocol small"):
        scored(folder, str(tiny_sd), "--steps", "1")
    (data / "captions.txt").write_text("a\nb\nc\n")
    np.savez(data / "val.npz", mu=np.zeros(12), sigma=np.eye(12), features=np.zeros((20, 12), np.float32))
    with pytest.raises(SystemExit, match="found 128 dimensions of 'fashion'; expected 12"):
        scored(folder, str(tiny_sd), "--steps", "1")
    np.savez(data / "val.npz", mu=np.zeros(128), sigma=np.eye(128))
    with pytest.raises(
        SystemExit, match=r"found only moments in .*; expected the features of the real images, for kid"
    ):
        scored(folder, str(tiny_sd), "--steps", "1")
    with pytest.raises(SystemExit, match=r"prompts: found none .*; expected prompts for this pipeline"):
        scored(folder, str(tiny_sd), "--steps", "1", protocol="labels")


@pytest.mark.slow
def test_the_protocol_of_coco2014_30k_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On images of 512 pixels with random weights of Inception: its distance from themselves, and what it says is missing."""
    images, data = tmp_path / "images", tmp_path / "data" / "coco2014_30k"
    images.mkdir()
    data.mkdir(parents=True)
    rng = np.random.RandomState(0)
    for i in range(3):
        small = Image.fromarray(rng.randint(0, 256, (8, 8, 3), dtype=np.uint8))
        small.resize((512, 512), Image.Resampling.BICUBIC).save(images / f"{i}.png")
    for variable in ("TORCH_HOME", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.setenv(variable, str(tmp_path / "cache"))
    monkeypatch.setenv("FEWSTEP_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("FEWSTEP_INCEPTION", raising=False)
    call = ["evaluate", str(images), "--protocol", "coco2014_30k", "--output", str(tmp_path / "e.json")]
    with pytest.raises(SystemExit, match=r"coco2014_30k needs (captions\.txt|val2014\.npz) \("):
        main(call)
    (data / "captions.txt").write_text("".join(f"caption {i}\n" for i in range(30_000)))
    made = ["reference", str(images), "--protocol", "coco2014_30k", "--output", str(data / "val2014.npz")]
    with pytest.raises(SystemExit, match=r"need weights-inception-2015-12-05-6726825d\.pth .*put it into .*cache"):
        main(made)
    monkeypatch.setenv("FEWSTEP_INCEPTION", str(random_inception(tmp_path / "weights" / "inception.pth")))
    main(made)
    with pytest.raises(SystemExit, match=r"images: found 3 in .*; expected at least 30000"):
        main([*call, "--clip", "none"])
    main([*call, "--clip", "none", "--num-images", "3"])
    report = json.loads((tmp_path / "e.json").read_text())
    assert report["protocol"]["name"] == "coco2014_30k, changed: images, clip"
    mean = np.abs(np.load(data / "val2014.npz")["mu"]).mean()
    assert mean > 0 and report["results"][0]["fid"] == pytest.approx(0, abs=1e-3 * mean * 2048)
