"""Shared by the tests: from test_pretrain."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from fewstep.data import fashion


def read_few_images(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """The data set becomes 64 training and test images of noise, in files like its own."""
    idx = folder / "idx"
    idx.mkdir()
    rng = np.random.default_rng(0)
    for prefix in ("train", "t10k"):
        images = rng.integers(0, 256, 64 * 28 * 28, dtype=np.uint8).tobytes()
        labels = (np.arange(64) % 10).astype(np.uint8).tobytes()
        (idx / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + images))
        (idx / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + labels))
    monkeypatch.setattr(fashion.load_idx, "__defaults__", (idx,))
