"""Random weights of the network of FID, with which its graph and all around it can be tested without the real ones."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn


def random_inception(file: Path) -> Path:
    """A file of weights as torch-fidelity and torchmetrics download it."""
    tf: Any = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    # Its constructor wants weights; an empty module's come from its own initialisation, under another load_state_dict.
    class Fresh(tf.FeatureExtractorInceptionV3):  # type: ignore[misc, name-defined]
        def load_state_dict(self, *args: Any, **kwargs: Any) -> None:
            pass

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    torch.manual_seed(0)
    net = Fresh("inception", ["2048"], empty)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    file.parent.mkdir(parents=True)
    torch.save(net.state_dict(), file)
    return file
