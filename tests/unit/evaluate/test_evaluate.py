"""Fréchet distance, CLIP score and the evaluation of pipelines, against closed forms and direct computations."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.assets import asset_path
from fewstep.data.fashion import caption, load_embedded
from fewstep.evaluate import (
    ClipScore,
    FrechetDistance,
    Moments,
    evaluate,
    format_table,
    frechet_distance,
    grid,
    load_clip,
    load_features,
    load_moments,
    protocol,
    recommended_guidance_scale,
    sample,
    save_moments,
    write_report,
)
from fewstep.evaluate.conditions import load_conditions
from fewstep.evaluate.generate import batches, condition_kind, counted, noise_generator
from fewstep.evaluate.references import folder_moments, protocol_of, resolve
from fewstep.evaluate.rows import check_indices
from fewstep.evaluate.statistics import moments

EMBEDDED_REFERENCE = asset_path("fashion") / "reference.safetensors"
needs_reference = pytest.mark.skipif(not EMBEDDED_REFERENCE.exists(), reason="the asset has no reference yet")


@pytest.fixture(scope="module")
def images() -> Tensor:
    """200 real images, 20 per class."""
    return torch.from_numpy(load_embedded()[0])[::10].contiguous()


@pytest.fixture(scope="module")
def labels() -> list[int]:
    return [int(label) for label in load_embedded()[1][::10]]


@pytest.fixture(scope="module")
def features() -> Any:
    return load_features("fashion")


@pytest.fixture(scope="module")
def real(features: Any) -> Moments:
    return moments(features(torch.from_numpy(load_embedded()[0])[1::4].contiguous()))


@pytest.fixture(scope="module")
def reference_file(real: Moments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("reference") / "real.safetensors"
    save_moments(real, file)
    return file


@pytest.fixture(scope="module")
def pipeline() -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(asset_path("fashion") / "pipeline")


def random_moments(seed: int, d: int = 12) -> Moments:
    g = torch.Generator().manual_seed(seed)
    return moments(torch.randn(5 * d, d, generator=g).double() @ torch.randn(d, d, generator=g).double())


def noised(images: Tensor, sigma: float) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + sigma * noise).round().clamp(0, 255).to(torch.uint8)


def test_identical_gaussians_are_at_distance_zero() -> None:
    m = random_moments(0)
    assert frechet_distance(m, m) == pytest.approx(0, abs=1e-9)


def test_commuting_gaussians_have_the_closed_form() -> None:
    basis, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)).double())
    a, b = torch.linspace(0.1, 3, 6).double(), torch.linspace(2, 0, 6).double()
    x = Moments(torch.zeros(6).double(), basis @ a.diag() @ basis.T, None)
    y = Moments(torch.ones(6).double(), basis @ b.diag() @ basis.T, None)
    wanted = float(6 + (a.sqrt() - b.sqrt()).square().sum())
    assert frechet_distance(x, y) == pytest.approx(wanted, rel=1e-7)
    assert frechet_distance(y, x) == pytest.approx(wanted, rel=1e-7)


def test_distance_equals_scipys_matrix_root() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    a, b = random_moments(2), random_moments(3)
    root = np.real(linalg.sqrtm((a.covariance @ b.covariance).numpy()))
    wanted = float((a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace()) - 2 * np.trace(root)
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-8)


def test_streamed_sums_equal_the_moments_of_the_whole(features: Any, real: Moments, images: Tensor) -> None:
    metric = FrechetDistance(features, real)
    for part in images.split(37):
        metric.update(part)
    whole = moments(features(images))
    torch.testing.assert_close(metric.moments().mean, whole.mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(metric.moments().covariance, whole.covariance, rtol=0, atol=1e-6)
    assert float(metric.compute()) == pytest.approx(frechet_distance(whole, real), rel=1e-5)


def test_merged_states_give_the_score_of_one_process(
    features: Any, real: Moments, images: Tensor, labels: list[int]
) -> None:
    fid, scores = FrechetDistance(features, real), ClipScore(load_clip("fashion"))
    fids, clips = [fid.clone() for _ in range(2)], [scores.clone() for _ in range(2)]
    for b, part in enumerate(batches(len(images), 30)):
        shown, prompts = images[list(part)], [caption(labels[i]) for i in part]
        for metric in (fid, fids[b % 2]):
            metric.update(shown)
        for metric in (scores, clips[b % 2]):
            metric.update(shown, prompts)
    fids[0].merge_state(fids[1])
    clips[0].merge_state(clips[1])
    assert int(fids[0].count) == len(images)
    assert float(fids[0].compute()) == pytest.approx(float(fid.compute()), rel=1e-10)
    assert float(clips[0].compute()) == pytest.approx(float(scores.compute()), rel=1e-12)


def test_fid_grows_with_noise(features: Any, real: Moments, images: Tensor) -> None:
    scores = []
    for sigma in (0.0, 10.0, 30.0, 90.0):
        metric = FrechetDistance(features, real)
        metric.update(noised(images, sigma))
        scores.append(float(metric.compute()))
    assert scores == sorted(scores)
    assert scores[-1] > 3 * scores[0]


@needs_reference
def test_embedded_reference_is_that_of_its_images(features: Any, images: Tensor) -> None:
    reference = load_moments(EMBEDDED_REFERENCE)
    assert reference.count is not None and reference.count >= 2000
    real_distance = frechet_distance(moments(features(images)), reference)
    noise = frechet_distance(moments(features(noised(images, 60.0))), reference)
    assert real_distance < 0.2 * noise


def test_features_are_the_classifiers_pooled_output(features: Any, images: Tensor) -> None:
    from transformers import ResNetForImageClassification

    classifier = ResNetForImageClassification.from_pretrained(asset_path("fashion") / "classifier").eval()
    pixels = torch.nn.functional.interpolate(images[:8].float() / 127.5 - 1, size=(64, 64), mode="bilinear")
    with torch.no_grad():
        wanted = classifier.resnet(pixels).pooler_output.flatten(1)
    torch.testing.assert_close(features(images[:8]), wanted, rtol=1e-4, atol=1e-5)


def test_moments_are_read_back_and_npz_too(tmp_path: Path) -> None:
    m = random_moments(4)
    save_moments(m, tmp_path / "m.safetensors")
    np.savez(tmp_path / "m.npz", mu=m.mean.numpy(), sigma=m.covariance.numpy())
    for name, count in (("m.safetensors", 60), ("m.npz", None)):
        back = load_moments(tmp_path / name)
        assert torch.equal(back.mean, m.mean) and torch.equal(back.covariance, m.covariance) and back.count == count


def test_a_reference_of_other_features_is_refused(features: Any, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"found 128 dimensions of .*; expected 12"):
        FrechetDistance(features, random_moments(5)).update(images[:4])


def test_clip_score_equals_the_models_own_similarity(images: Tensor, labels: list[int]) -> None:
    clip = load_clip("fashion")
    prompts = [caption(label) for label in labels]
    metric = ClipScore(clip)
    for start in range(0, len(images), 64):
        metric.update(images[start : start + 64], prompts[start : start + 64])
    tokens = clip.tokenizer(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = clip.model(pixel_values=images.float() / 127.5 - 1, **tokens)
    wanted = (100 * (output.image_embeds * output.text_embeds).sum(1)).clamp(min=0).double().mean()
    assert float(metric.compute()) == pytest.approx(float(wanted), abs=1e-3)
    shuffled = ClipScore(clip)
    shuffled.update(images, prompts[100:] + prompts[:100])
    assert float(metric.compute()) > float(shuffled.compute()) + 20


def test_a_long_prompt_keeps_its_end_token() -> None:
    clip = load_clip("fashion")
    ids: list[int] = []
    clip.model.text_model.embeddings.register_forward_pre_hook(
        lambda module, args, kwargs: ids.extend(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    clip.text_embeddings(["a photo of a bag " * 9])
    assert len(ids) == 16 and ids[-1] == clip.tokenizer.eos_token_id


def test_images_depend_on_seed_and_index_only(pipeline: Any) -> None:
    prompts = [caption(i) for i in range(6)]
    whole = sample(pipeline, prompts, range(6), steps=2, seed=3)
    parts = [sample(pipeline, [prompts[i] for i in part], part, steps=2, seed=3) for part in ([5, 1], [0, 3, 2], [4])]
    assert whole.dtype == torch.uint8 and whole.shape == (6, 3, 32, 32)
    # Convolutions of another batch size may round differently: at most one level.
    for part, got in zip(([5, 1], [0, 3, 2], [4]), parts, strict=True):
        assert (whole[list(part)].int() - got.int()).abs().max() <= 1
    assert not torch.equal(sample(pipeline, prompts, range(6), steps=2, seed=4), whole)
    draws = {float(torch.rand((), generator=noise_generator(s, i))) for s in range(5) for i in range(5)}
    assert len(draws) == 25


def test_batches_do_not_depend_on_the_world() -> None:
    whole = batches(103, 10)
    for world in (2, 3, 20):
        assert sorted((b for r in range(world) for b in batches(103, 10, r, world)), key=lambda b: b[0]) == whole
    with pytest.raises(RuntimeError, match="1 missing and 1 repeated"):
        check_indices([0, 1, 1], 3)


def test_every_kind_of_pipeline_is_sampled() -> None:
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        DDPMPipeline,
        DDPMScheduler,
        DiTPipeline,
        DiTTransformer2DModel,
        UNet2DModel,
    )

    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    pixel = DDPMPipeline(unet, DDPMScheduler())
    assert condition_kind(pixel) == "none"
    assert sample(pixel, [None] * 3, range(3), steps=2, seed=0).shape == (3, 3, 8, 8)
    with pytest.raises(ValueError, match="expected none, for DDPMPipeline takes none"):
        sample(pixel, [None], [0], steps=1, seed=0, guidance_scale=2.0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=4,
        patch_size=2, num_embeds_ada_norm=1000, norm_num_groups=4,
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    dit = DiTPipeline(transformer, vae, DDIMScheduler())
    assert condition_kind(dit) == "label"
    with counted(dit) as evaluations:
        assert sample(dit, [1, 2], [0, 1], steps=3, seed=0, guidance_scale=2.0).shape[0] == 2
    assert evaluations.count == 2 * 3 * 2


@pytest.mark.parametrize(("scale", "per_step"), [(1.0, 1), (2.0, 2)])
def test_rows_count_guidance_and_steps(
    pipeline: Any, reference_file: Path, tmp_path: Path, scale: float, per_step: int
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of a bag\na photo of a dress\n")
    state = torch.get_rng_state()
    rows = evaluate(
        pipeline, name="teacher", reference=str(reference_file), steps=(1, 2), num_images=7, batch_size=4,
        guidance_scale=scale, features="fashion", clip="fashion", prompts=prompts,
    )  # fmt: skip
    assert torch.equal(torch.get_rng_state(), state)
    assert [r["network_evaluations"] for r in rows] == [per_step, 2 * per_step]
    assert set(rows[0]) == {
        "model", "steps", "guidance_scale", "fid", "clip_score", "images", "seconds_per_image", "network_evaluations",
        "peak_memory_gib",
    }  # fmt: skip
    assert rows[0]["fid"] > 0 and 0 <= rows[0]["clip_score"] <= 100 and rows[0]["seconds_per_image"] > 0


def score_in_process(rank: int, world: int, reference: str, out: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    from accelerate import Accelerator
    from diffusers import StableDiffusionPipeline

    accelerator = Accelerator(cpu=True)
    torch.set_num_threads(1)  # an Accelerator sets them anew, and another count rounds float32 otherwise
    pipeline = StableDiffusionPipeline.from_pretrained(asset_path("fashion") / "pipeline")
    prompts = Path(out).with_suffix(".txt")
    rows = evaluate(
        pipeline, name="x", reference=reference, steps=(1,), num_images=11, batch_size=4, guidance_scale=1.0,
        accelerator=accelerator, features="fashion", clip="fashion", prompts=prompts,
    )  # fmt: skip
    Path(out).with_suffix(f".{rank}.json").write_text(json.dumps(rows))
    accelerator.end_training()


@pytest.mark.slow
def test_two_processes_give_the_scores_of_one(
    pipeline: Any, reference_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(s.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    prompts = tmp_path / "rows.txt"
    prompts.write_text("a photo of a bag\na photo of a dress\na photo of a coat\n")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    (alone,) = evaluate(
        pipeline, name="x", reference=str(reference_file), steps=(1,), num_images=11, batch_size=4, guidance_scale=1.0,
        features="fashion", clip="fashion", prompts=prompts,
    )  # fmt: skip
    torch.set_num_threads(threads)
    torch.multiprocessing.spawn(score_in_process, (2, str(reference_file), str(tmp_path / "rows")), nprocs=2)
    first, second = (json.loads((tmp_path / f"rows.{rank}.json").read_text())[0] for rank in (0, 1))
    assert first == second
    assert first["fid"] == pytest.approx(alone["fid"], rel=1e-9)
    assert first["clip_score"] == pytest.approx(alone["clip_score"], rel=1e-9)
    assert first["network_evaluations"] == alone["network_evaluations"] == 1


def test_a_folder_of_images_is_a_reference(features: Any, images: Tensor, tmp_path: Path) -> None:
    from PIL import Image

    for i, image in enumerate(images[:10]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i:02d}.png")
    got, wanted = folder_moments(tmp_path, features), moments(features(images[:10]))
    assert got.count == 10
    torch.testing.assert_close(got.covariance, wanted.covariance)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="images: found none in"):
        folder_moments(empty, features)


def test_missing_sources_are_reported_in_a_sentence(reference_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reference: found 'coco'; expected fashion, a path of statistics"):
        resolve("coco")
    with pytest.raises(ValueError, match="features: found none for"):
        resolve(str(reference_file))
    with pytest.raises(ValueError, match=r"prompts: found .*; expected a file"):
        resolve(str(reference_file), "fashion", prompts=tmp_path / "none.txt")
    with pytest.raises(ValueError, match="expected prompts for this pipeline"):
        load_conditions(protocol_of(resolve(str(reference_file), "fashion"), num_images=4, seed=0), "prompt", None)
    with pytest.raises(ValueError, match="features: found 'nowhere'"):
        load_features("nowhere")
    with pytest.raises(ValueError, match="clip: found 'nowhere'"):
        load_clip("nowhere")


@needs_reference
def test_fashion_is_balanced_over_its_classes() -> None:
    fashion = protocol_of(resolve("fashion"), num_images=20, seed=0)
    what = load_conditions(fashion, "prompt", None)
    assert what.conditions == what.prompts == [caption(i % 10) for i in range(20)]
    assert load_conditions(fashion, "label", 1000).conditions == [i % 10 for i in range(20)]
    assert load_conditions(fashion, "none", None).prompts is None
    assert protocol(reference="fashion", num_images=20)["clip"] == "fashion"


def test_report_table_and_grid(reference_file: Path, images: Tensor, tmp_path: Path) -> None:
    settings = protocol(reference=str(reference_file), num_images=4, features="fashion")
    assert settings["reference_images"] == 500 and settings["clip"] is None
    row = {"model": "student", "steps": 4, "guidance_scale": None, "fid": 12.345, "clip_score": None, "images": 4,
           "seconds_per_image": 0.01, "network_evaluations": 4.0}  # fmt: skip
    write_report(tmp_path / "a" / "evaluation.json", settings, [row])
    assert json.loads((tmp_path / "a" / "evaluation.json").read_text()) == {"protocol": settings, "results": [row]}
    assert [f.name for f in (tmp_path / "a").iterdir()] == ["evaluation.json"]
    assert "| student |     4 |  default |" in format_table([row])
    picture = grid([images[:3], images[3:5]], ["teacher, 50 steps", "student"])
    assert picture.height == 2 * 64 + 2 and picture.width > 3 * 64
    assert recommended_guidance_scale("some/model") is None
    assert isinstance(recommended_guidance_scale("fashion"), float)
