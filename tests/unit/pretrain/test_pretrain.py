from pathlib import Path

import numpy as np
import pytest
import torch

from builders import ROOT
from builders.pretrain import read_few_images
from fewstep.evaluate.metrics.frechet import frechet_distance
from fewstep.evaluate.statistics import Moments, moments
from fewstep.pretrain.config import (
    AutoencoderConfig,
    DenoiserConfig,
    MeasureConfig,
    StageConfig,
    TeacherTraining,
)
from fewstep.pretrain.data import as_uint8, scaled, shifted
from fewstep.pretrain.loop import fit
from fewstep.pretrain.measure import blurred
from fewstep.pretrain.publish import publish
from fewstep.pretrain.run import STAGES, run


def test_frechet_distance_of_gaussians() -> None:
    a = Moments(torch.zeros(2).double(), torch.diag(torch.tensor([1.0, 4.0]).double()), 2)
    b = Moments(torch.tensor([3.0, 0.0]).double(), torch.diag(torch.tensor([4.0, 9.0]).double()), 2)
    # Diagonal covariances: squared distance of the means plus that of the standard deviations.
    assert frechet_distance(a, b) == pytest.approx(9 + 1 + 1)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_statistics_match_numpy() -> None:
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    assert np.allclose(moments(x).covariance, np.cov(x.numpy(), rowvar=False))


def test_pixels_round_trip() -> None:
    images = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    assert torch.equal(as_uint8(scaled(images)), images)


def test_shift_keeps_the_content() -> None:
    images = torch.zeros(20, 3, 32, 32, dtype=torch.uint8)
    images[:, :, 2:-2, 2:-2] = torch.randint(1, 255, (20, 3, 28, 28), dtype=torch.uint8)
    moved = shifted(images, 2, torch.Generator().manual_seed(0))
    assert torch.equal(moved.flatten(1).sort(1).values, images.flatten(1).sort(1).values)
    inner = images[0, :, 2:-2, 2:-2]
    assert any(torch.equal(moved[0, :, y : y + 28, x : x + 28], inner) for y in range(5) for x in range(5))


def test_blur_keeps_a_flat_interior() -> None:
    images = torch.full((1, 3, 32, 32), 100, dtype=torch.uint8)
    assert (blurred(images, 1.0)[:, :, 8:-8, 8:-8] == 100).all()


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_fit_goes_on_where_it_was_interrupted(tmp_path: Path, ema_decay: float | None) -> None:
    config = StageConfig(iterations=8, lr=0.1)

    def train(folder: Path, stop_at: int | None) -> torch.Tensor:
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)
        calls = 0

        def loss(generator: torch.Generator) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == stop_at:
                raise Interrupted
            x = torch.randn(4, 3, generator=generator)
            return (model(x) - x.sum(1, keepdim=True)).square().mean()

        # Zero seconds between checkpoints: one per iteration.
        fit("linear", model, loss, config, folder, 0, 0.0, ema_decay)
        return model.weight.detach()

    whole = train(tmp_path / "whole", None)
    with pytest.raises(Interrupted):
        train(tmp_path / "halved", 5)
    assert torch.equal(train(tmp_path / "halved", None), whole)


def test_all_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_few_images(monkeypatch, tmp_path)
    stage = {"iterations": 2, "batch_size": 8}
    config = TeacherTraining(
        output_dir=tmp_path / "run",
        limit_images=64,
        classifier=StageConfig(**stage),
        clip=StageConfig(**stage),
        autoencoder=AutoencoderConfig(**stage),
        denoiser=DenoiserConfig(**stage),
        measure=MeasureConfig(guidance_scales=(1.0, 2.0), sweep_samples=10, samples=10, steps=2),
    )
    run(config)
    times = {output: (config.output_dir / output).stat().st_mtime_ns for output in STAGES}
    publish(config.output_dir, tmp_path / "asset")
    assert "fid_teacher" in (tmp_path / "asset" / "README.md").read_text()
    run(config)
    assert times == {output: (config.output_dir / output).stat().st_mtime_ns for output in STAGES}


def test_digits_teacher(tmp_path: Path) -> None:
    """A few iterations from the command line's config to a pipeline that the teachers' loader takes."""
    from fewstep.config import read
    from fewstep.errors import FewstepError
    from fewstep.pretrain import digits
    from fewstep.pretrain.config import DigitsTraining, load_training, training_class
    from fewstep.teachers import load_teacher

    path = ROOT / "configs" / "teachers" / "digits.yaml"
    assert training_class(read(path)) is DigitsTraining
    assert training_class(read(path.with_stem("fashion"))) is TeacherTraining
    for raw in ({}, {"kind": "flux"}):
        with pytest.raises(FewstepError, match=r"kind: found .*; expected one of sd, ddpm, dit, sd3"):
            training_class(raw)
    config = load_training(
        path, [f"output_dir={tmp_path}", "denoiser.iterations=2", "denoiser.batch_size=4", "channels=[16,16]"]
    )
    assert isinstance(config, DigitsTraining)
    digits.run(config)
    images = digits.load_digits(16)
    assert images.shape == (1797, 1, 16, 16) and images.min() == -1 and images.max() <= 1
    assert len(list((tmp_path / "images").iterdir())) == 1797
    teacher = load_teacher(str(tmp_path / "pipeline"))
    assert (teacher.image_size, teacher.latent_shape, teacher.conditions) == (16, (1, 16, 16), "none")
