import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from fewstep.assets import asset_path
from fewstep.data.fashion import CLASSES, TEMPLATES, caption, load_embedded, load_idx
from fewstep.pretrain.publish import checksums

FOLDER = asset_path("fashion")


def test_captions() -> None:
    assert caption(CLASSES.index("coat")) == "a photo of a coat"
    assert caption(CLASSES.index("ankle boot")) == "a photo of an ankle boot"
    assert len({caption(c, t) for c in range(10) for t in range(len(TEMPLATES))}) == 10 * len(TEMPLATES)


def test_missing_package(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="dataset-fashion-mnist"):
        load_idx("train", tmp_path)


def test_unknown_asset() -> None:
    with pytest.raises(ValueError, match="fashion"):
        asset_path("fashoin")


def test_embedded_images() -> None:
    images, labels = load_embedded()
    assert images.shape == (2000, 3, 32, 32) and images.dtype == np.uint8
    assert labels.dtype == np.int64 and np.bincount(labels).tolist() == [200] * 10
    assert (images[:, 0] == images[:, 2]).all() and not images[:, :, :2].any()


def test_size_and_formats() -> None:
    files = [f for f in FOLDER.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 14 * 2**20
    assert {f.suffix for f in files} <= {".safetensors", ".json", ".txt", ".md", ".png", ".parquet"}


def test_card_lists_every_file() -> None:
    listed = dict(re.findall(r"^\| (\S+) \| \d+ \| `(\w{64})` \|$", (FOLDER / "README.md").read_text(), re.M))
    assert listed == checksums(FOLDER)


def test_reference() -> None:
    with safe_open(FOLDER / "reference.safetensors", "pt") as file:
        assert file.metadata()["count"] == "60000"
        covariance = file.get_tensor("covariance")
    assert str(covariance.dtype) == "torch.float64" and covariance.shape == (128, 128)


def test_networks() -> None:
    import torch

    from fewstep.pretrain.classifier import features_and_logits, load_classifier
    from fewstep.pretrain.clip import clip_scores, load_clip

    arrays = load_embedded()
    images, labels = (torch.from_numpy(x[::20]) for x in arrays)
    features, logits = features_and_logits(load_classifier(FOLDER), images)
    assert features.shape == (100, 128)
    assert (logits.argmax(1) == labels).double().mean() > 0.85
    similarity = clip_scores(*load_clip(FOLDER), images, [caption(c) for c in range(10)])
    assert (similarity.argmax(1) == labels).double().mean() > 0.6


def test_pipeline() -> None:
    import torch
    from diffusers import StableDiffusionPipeline

    asset = json.loads((FOLDER / "asset.json").read_text())
    pipeline = StableDiffusionPipeline.from_pretrained(FOLDER / "pipeline")
    assert pipeline.scheduler.config.timestep_spacing == "trailing"
    result = pipeline(
        [caption(4)],
        num_inference_steps=2,
        guidance_scale=asset["guidance_scale"],
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
    )
    assert result.images.shape == (1, 3, 32, 32)
