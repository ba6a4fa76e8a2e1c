"""The Inception network of FID, as torch-fidelity ports it from TensorFlow, with the resizing of either tradition."""

import io
import os
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.errors import FewstepError, MissingError

VARIABLE = "FEWSTEP_INCEPTION"
FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
"""The same tensors, as torch-fidelity and torchmetrics name their file, and as pytorch-fid does."""
SIDE = 299


def inception_weights(path: str | None) -> Path:
    """The file at `path`, or that of $FEWSTEP_INCEPTION, or the one that torch-fidelity or pytorch-fid downloaded."""
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    given = path or os.environ.get(VARIABLE)
    places = [Path(given).expanduser()] if given else [cache / name for name in FILES]
    for place in places:
        if place.is_file():
            return place
    found = f"{places[0]}, which does not exist" if given else "no weights"
    expected = f"{FILES[0]} (a release file of github.com/toshas/torch-fidelity)"
    raise MissingError("features", found, expected, f"Put it into {cache}, or name its path in ${VARIABLE}")


def clean_resize(images: Tensor) -> Tensor:
    """[B, 3, H, W] in [0, 255] to [B, 3, 299, 299] as clean-fid: antialiased bicubic, not rounded (Parmar et al. 2022).

    float64 stays float64; any other type becomes float32.
    """
    x = images if images.dtype == torch.float64 else images.float()
    if x.shape[-2:] != (SIDE, SIDE):
        x = F.interpolate(x, size=(SIDE, SIDE), mode="bicubic", align_corners=False, antialias=True).clamp(0, 255)
    return x


class Inception(nn.Module):
    """uint8 images [B, 3, H, W] to pooled features [B, 2048] and logits without bias [B, 1008], in its own dtype."""

    def __init__(self, weights: Path, resize: Literal["tensorflow", "clean"]) -> None:
        super().__init__()
        net = _network(weights)
        self.resize = resize
        # torch-fidelity's modules in the order in which its forward calls them; the last one is `fc`.
        modules = list(net.children())
        assert isinstance(modules[-1], nn.Linear)
        self.layers, self.head = nn.Sequential(*modules[:-1]), modules[-1]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        images = images.to(self.head.weight.dtype)
        if self.resize == "clean":
            x = clean_resize(images)
        else:
            from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

            x = interpolate_bilinear_2d_like_tensorflow1x(images, size=(SIDE, SIDE), align_corners=False)
        features = self.layers((x - 128) / 128).flatten(1)
        return features, features @ self.head.weight.T


def _network(weights: Path) -> nn.Module:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise MissingError("features", "inception", "torch-fidelity", "pip install 'fewstep[fid]'") from None
    # torch-fidelity would unpickle whatever the file holds: it gets the tensors of a file that was read without pickle.
    tensors = io.BytesIO()
    try:
        torch.save(torch.load(weights, map_location="cpu", weights_only=True), tensors)
        tensors.seek(0)
        return FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], tensors)
    except Exception as e:
        reason = str(e).strip().splitlines()[0]
        raise FewstepError("features", f"{weights} ({reason})", "the weights of FID's Inception network") from None
