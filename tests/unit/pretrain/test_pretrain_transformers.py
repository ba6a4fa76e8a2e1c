"""Transformers beside the embedded teacher: trained for two iterations, then distilled by every recipe of theirs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from builders import ROOT
from builders.pretrain import read_few_images
from fewstep.config import RunConfig, load_config
from fewstep.data import fashion
from fewstep.errors import FewstepError
from fewstep.methods.boot.method import Boot, BootConfig
from fewstep.methods.consistency.lcm import LCM
from fewstep.methods.consistency.method_settings import LcmSettings
from fewstep.methods.distribution_matching.dmd2 import DMD2, DMD2Config
from fewstep.pretrain import dit, sd3
from fewstep.pretrain.config import DiTTraining, SD3Training, load_training
from fewstep.pretrain.loop import stratified
from fewstep.pretrain.transformer import Latents, load_vae
from fewstep.teachers import load_teacher
from fewstep.training import run as job

CONFIGS = ROOT / "configs"
METHODS: dict[str, tuple[Any, Any]] = {
    "consistency": (LCM, LcmSettings),
    "dmd2": (DMD2, DMD2Config),
    "boot": (Boot, BootConfig),
}


def settings(name: str, *changes: str) -> Any:
    return load_training(CONFIGS / "teachers" / f"fashion_{name}.yaml", ["layers=2", "head_width=8", *changes])


@pytest.fixture(scope="module", params=["dit", "flow"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Its name, and the folder of its run."""
    folder = tmp_path_factory.mktemp(request.param)
    config = settings(
        request.param, f"output_dir={folder / 'run'}", "denoiser.iterations=2", "denoiser.batch_size=4",
        "measure.guidance_scales=[1.0,2.0]", "measure.sweep_samples=10", "measure.samples=10", "measure.steps=2",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        read_few_images(patch, folder)
        (dit if isinstance(config, DiTTraining) else sd3).run(config)
    return request.param, folder / "run"


def test_pipeline_and_figures(trained: tuple[str, Path]) -> None:
    name, folder = trained
    figures = json.loads((folder / "figures.json").read_text())
    assert figures["guidance_scale"] in (1.0, 2.0) and figures["fid"] > 0 and 0 <= figures["class_accuracy"] <= 1
    assert figures["guidance_sweep"].keys() == {"samples", "1.0", "2.0"}
    assert (folder / "samples.png").exists()
    teacher: Any = load_teacher(str(folder / "pipeline"))
    assert (teacher.latent_shape, teacher.image_size) == ((4, 8, 8), 32)
    assert teacher.conditions == {"dit": "label", "flow": "prompt"}[name]
    if name == "dit":
        assert teacher.pipeline.labels == {name: label for label, name in enumerate(fashion.CLASSES)}


def test_a_run_goes_on_from_what_there_is(trained: tuple[str, Path]) -> None:
    name, folder = trained
    files = [file for file in folder.rglob("*") if file.is_file()]
    times = [file.stat().st_mtime_ns for file in files]
    config = settings(name, f"output_dir={folder}")
    with pytest.MonkeyPatch.context() as patch:
        # Whatever was to be trained would need the images.
        patch.setattr(fashion.load_idx, "__defaults__", (folder / "nowhere",))
        (dit if isinstance(config, DiTTraining) else sd3).run(config)
    assert [file.stat().st_mtime_ns for file in files] == times


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_recipe_trains_exports_and_evaluates(method: str, trained: tuple[str, Path], tmp_path: Path) -> None:
    name, folder = trained
    kind, config_kind = METHODS[method]
    argv = [
        f"teacher={folder / 'pipeline'}",
        f"output_dir={tmp_path / 'run'}", "max_iterations=3", "batch_size=4", "checkpoint.every=3", "log.samples_every=0",
        "train.cpu_threads=1", "train.mixed_precision=no", "score.every=0", "evaluate.num_images=10",
        "evaluate.teacher_steps=[1]",
    ]  # fmt: skip
    # Sixty thousand images to encode would be the better part of the test.
    argv += ["data.limit=8", *([] if method == "boot" else ["data.cache_latents=false"])]
    recipe = CONFIGS / f"fashion_{name}" / f"{'lcm' if method == 'consistency' else method}.yaml"
    job.run(kind, load_config(RunConfig[config_kind], recipe, argv))
    results = json.loads((tmp_path / "run" / "evaluation.json").read_text())["results"]
    assert {row["model"] for row in results} == {"student", "teacher"}
    assert all(row["network_evaluations"] == row["steps"] for row in results if row["model"] == "student")
    assert "guidance_scale=1.0" in (tmp_path / "run" / "pipeline" / "README.md").read_text()


def test_one_text_token_stands_for_all_that_are_equal() -> None:
    """The training's network is the stock pipeline's, which is given all 256 of the T5's tokens."""
    torch.manual_seed(0)
    pipeline = sd3.build_pipeline(settings("flow"), load_vae())
    net = pipeline.transformer.double()
    with torch.no_grad():
        for p in net.parameters():  # which start at zero in part
            p.add_(torch.randn(p.shape, dtype=p.dtype), alpha=0.1)
    texts = [0, 33, len(sd3.CAPTIONS)]
    prompts = [[*sd3.CAPTIONS, ""][i] for i in texts]
    every, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
    states, pooled_states = sd3.caption_states(pipeline)
    assert every.shape[1] == sd3.MAX_TOKENS + sd3.T5_TOKENS and not every[:, sd3.MAX_TOKENS :].any()
    torch.testing.assert_close(pooled_states[texts], pooled)
    common = {
        "hidden_states": torch.randn(3, 4, 8, 8, dtype=torch.float64),
        "timestep": torch.tensor([999.0, 500.0, 3.0], dtype=torch.float64),
        "pooled_projections": pooled.double(),
    }
    with torch.no_grad():
        stock = net(encoder_hidden_states=every.double(), **common).sample
        net.set_attn_processor(sd3.LastTextToken(sd3.T5_TOKENS))
        short = net(encoder_hidden_states=states[texts].double(), **common).sample
        net.set_attn_processor(sd3.LastTextToken(1))
        alone = net(encoder_hidden_states=states[texts].double(), **common).sample
    torch.testing.assert_close(short, stock, rtol=1e-4, atol=1e-4)
    assert (alone - stock).abs().max() > 1e-2


def test_transformers_start_as_zero() -> None:
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([999, 3])
    of_labels = dit.build_dit(settings("dit"))(x, timestep=t, class_labels=torch.tensor([0, dit.NULL_LABEL])).sample
    of_text = sd3.build_sd3(settings("flow"))(
        x, timestep=t, encoder_hidden_states=torch.randn(2, 3, sd3.WIDTH), pooled_projections=torch.randn(2, sd3.WIDTH)
    ).sample
    assert not of_labels.any() and not of_text.any()


def test_draws() -> None:
    """Latents are mean + std noise of one image and its label; stratified numbers fall one into each share."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.arange(5.0)[:, None, None, None].expand(5, 4, 8, 8)
    x0, labels = Latents(mean, torch.full_like(mean, 1e-3), torch.arange(5)).draw(50, generator)
    assert (x0.mean((1, 2, 3)) - labels).abs().max() < 1e-3 and len(labels.unique()) == 5
    assert 0.8e-3 < (x0 - labels[:, None, None, None]).std() < 1.2e-3
    assert (stratified(8, generator) * 8).long().tolist() == list(range(8))


def test_stratified_numbers_stay_below_one() -> None:
    """One draw in four of this size rounds to n / n in float32, one in hundreds of thousands of a batch's."""
    generator = torch.Generator().manual_seed(0)
    assert [int(stratified(2**22, generator).max() * 1000) for _ in range(16)] == [999] * 16


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("dit", "prediction_type=sample", r"prediction_type.*epsilon"),
        ("dit", "shift=3", "shift"),
        ("flow", "prediction_type=epsilon", "prediction_type"),
        ("flow", "shift=0", "shift"),
        ("flow", "patch_size=3", r"patch_size.*1"),
    ],
)
def test_settings_that_do_not_fit_the_network(name: str, change: str, message: str) -> None:
    with pytest.raises(FewstepError, match=message):
        settings(name, change)


def test_network_tells_the_settings() -> None:
    assert isinstance(settings("dit"), DiTTraining) and isinstance(settings("flow"), SD3Training)
