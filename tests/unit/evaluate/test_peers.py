"""The libraries that people compare with, on the same features, images and models."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.assets import asset_path
from fewstep.data.fashion import load_embedded
from fewstep.evaluate import ClipScore, load_clip
from fewstep.evaluate.metrics.distances import kernel_distance
from fewstep.evaluate.metrics.frechet import frechet_distance, frechet_infinity
from fewstep.evaluate.models.inception import clean_resize
from fewstep.evaluate.protocol import ClipScoring
from fewstep.evaluate.statistics import Moments, moments


def features(n: int, d: int, seed: int, decay: float = 1.0) -> Tensor:
    """Of a spectrum that falls as Inception's does, about a mean of its own, as float32 features are given."""
    g = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(d, d, generator=g))
    scales = (torch.arange(d) + 1.0) ** (-decay / 2)
    return ((torch.randn(n, d, generator=g) * scales) @ basis.T + 0.1 * torch.rand(d, generator=g)).float()


def theirs(name: str) -> Callable[[Moments, Moments], float]:
    def arrays(a: Moments, b: Moments) -> list[Any]:
        return [v.numpy() for v in (a.mean, a.covariance, b.mean, b.covariance)]

    match name:
        case "torchmetrics":
            fid: Any = pytest.importorskip("torchmetrics.image.fid")
            return lambda a, b: float(fid._compute_fid(a.mean, a.covariance, b.mean, b.covariance))
        case "torch-fidelity":
            tf: Any = pytest.importorskip("torch_fidelity.metric_fid")
            keys = ("mu", "sigma")

            def fidelity(a: Moments, b: Moments) -> float:
                x = arrays(a, b)
                pair = [dict(zip(keys, part, strict=True)) for part in (x[:2], x[2:])]
                return float(tf.fid_statistics_to_metric(*pair, verbose=False)[tf.KEY_METRIC_FID])

            return fidelity
    sqrtm_takes_disp()
    if name == "clean-fid":
        clean: Any = pytest.importorskip("cleanfid.fid")
        return lambda a, b: float(clean.frechet_distance(*arrays(a, b)))
    pytorch_fid: Any = pytest.importorskip("pytorch_fid.fid_score")
    return lambda a, b: float(pytorch_fid.calculate_frechet_distance(*arrays(a, b)))


def sqrtm_takes_disp() -> None:
    """clean-fid and pytorch-fid call scipy's root with an argument that SciPy 1.18 no longer has."""
    scipy: Any = pytest.importorskip("scipy")
    if tuple(map(int, scipy.__version__.split(".")[:2])) >= (1, 18):
        pytest.skip("SciPy 1.18 took away what they call")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["torchmetrics", "torch-fidelity", "clean-fid", "pytorch-fid"])
@pytest.mark.parametrize("d", [3, 64])
def test_frechet_distance_equals(name: str, d: int) -> None:
    peer = theirs(name)
    a, b = moments(features(10 * d, d, 0)), moments(1.1 * features(8 * d, d, 1, decay=1.2))
    assert frechet_distance(a, b) == pytest.approx(peer(a, b), rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(peer(a, b), rel=1e-6)


def test_clean_fids_kernel_distance_and_resizing() -> None:
    clean: Any = pytest.importorskip("cleanfid.fid")
    resize: Any = pytest.importorskip("cleanfid.resize")
    x, y = features(90, 16, 0).double(), features(90, 16, 1, decay=0.5).double()
    # Subsets of all images: nothing is left to chance.
    wanted = clean.kernel_distance(x.numpy(), y.numpy(), num_subsets=1, max_subset_size=90)
    assert kernel_distance(x, y, subsets=1, subset_size=90) == pytest.approx(wanted, rel=1e-9)
    image = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    theirs = resize.make_resizer("PIL", False, "bicubic", (299, 299))(image[0].permute(1, 2, 0).numpy())
    assert np.abs(clean_resize(image)[0].permute(1, 2, 0).numpy() - theirs).max() < 0.01


def test_clip_score_equals_torchmetrics_on_a_local_model() -> None:
    """torchmetrics 1.9 with the folder's model and processor; under transformers 5 it needs the embeddings handed out."""
    peer: Any = pytest.importorskip("torchmetrics.multimodal.clip_score")
    from transformers import CLIPImageProcessorPil, CLIPProcessor

    clip = load_clip("fashion")
    images = torch.from_numpy(load_embedded()[0])[::100].contiguous()
    prompts = ["a photo of a bag", "a photo of a dress"] * 10

    class Bare(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = clip.model.config

        def get_image_features(self, pixels: Tensor) -> Tensor:
            return clip.model.get_image_features(pixel_values=pixels).pooler_output

        def get_text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
            return clip.model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output

    pixels = CLIPImageProcessorPil.from_pretrained(asset_path("fashion") / "clip")
    metric = peer.CLIPScore(lambda: (Bare(), CLIPProcessor(image_processor=pixels, tokenizer=clip.tokenizer)))
    # Without a clamp: torchmetrics clamps the mean of all, here each.
    ours = ClipScore(clip, ClipScoring(model="fashion", clamp=False))
    for part in (slice(0, 7), slice(7, 20)):
        metric.update(images[part], prompts[part])
        ours.update(images[part], prompts[part])
    assert float(ours.compute()) == pytest.approx(float(metric.compute()), rel=1e-6)
    assert float(ours.compute()) > 1


def test_fid_infinity_takes_away_the_bias_of_few_images() -> None:
    """A reference that is the truth, images from the same Gaussian: the distance of N images falls as 1 / N towards nothing."""
    d = 16
    scales = (torch.arange(d) + 1.0).double() ** -0.5
    truth = Moments(torch.zeros(d).double(), scales.square().diag(), None)
    drawn = torch.randn(3000, d, generator=torch.Generator().manual_seed(0)).double() * scales
    plain, extrapolated = frechet_distance(moments(drawn), truth), frechet_infinity(drawn, truth)
    assert plain > 2e-3 and abs(extrapolated) < 0.25 * plain
    assert frechet_infinity(drawn, truth) == extrapolated
    shifted = frechet_infinity(drawn + 0.5, truth)
    assert shifted == pytest.approx(16 * 0.25, rel=0.03)
    with pytest.raises(ValueError, match="found 19 images; expected at least 20"):
        frechet_infinity(drawn[:19], truth)
