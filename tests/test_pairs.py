"""The teacher's pairs: what its own scheduler draws, the same for any number of processes, and kept."""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_dmd2 import make

from fewstep.pairs import PairSettings, draw_pairs, read_pairs, solve, solver_timesteps
from fewstep.teachers import load_teacher

PROMPTS = ["a coat", "a bag", "a shirt"]
CPU = torch.device("cpu")
SETTINGS = PairSettings(count=5, batch_size=2, solver_steps=4, guidance_scale=2.0, seed=1)


def prompts(indices):
    return [PROMPTS[i] for i in indices]


def test_solver_timesteps():
    assert solver_timesteps(4, 1000).tolist() == [999, 749, 499, 249, -1]
    assert solver_timesteps(3, 1000).tolist() == [999, 666, 332, -1]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_samples_are_those_of_the_stock_pipeline(tiny_sd_path, kind):
    """DDIMScheduler, trailing, as the pipeline's folder has it, but for its last step to clean data."""
    teacher = load_teacher(str(tiny_sd_path(kind)))
    noise = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(3))
    cond, uncond = teacher.condition(["a coat", "a bag"]), teacher.null_condition(2)
    found = solve(teacher, noise, cond, uncond, SETTINGS)
    pipeline = teacher.pipeline
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, set_alpha_to_one=True)
    drawn = pipeline(
        ["a coat", "a bag"], latents=noise, num_inference_steps=4, guidance_scale=2.0, output_type="latent"
    )  # fmt: skip
    torch.testing.assert_close(found, drawn.images, rtol=1e-4, atol=1e-4 * drawn.images.abs().max().item())


def test_files_are_the_same_for_any_number_of_processes_and_kept(tiny_sd, tmp_path):
    teacher = load_teacher(str(tiny_sd))
    draw_pairs(teacher, prompts, 3, tmp_path / "one", SETTINGS, CPU)
    for process in (1, 0):
        draw_pairs(teacher, prompts, 3, tmp_path / "two", SETTINGS, CPU, process, 2)
    one, two = read_pairs(tmp_path / "one", SETTINGS), read_pairs(tmp_path / "two", SETTINGS)
    assert torch.equal(one.noise, two.noise) and torch.equal(one.x0, two.x0) and one.conditions == two.conditions
    assert len(one.noise) == 5 and set(one.conditions) <= set(PROMPTS)
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == [f"00000{i}.safetensors" for i in range(3)]
    lost = tmp_path / "one" / "000001.safetensors"
    stamps = {p.name: p.stat().st_mtime_ns for p in lost.parent.iterdir()}
    before = load_file(lost)
    lost.unlink()
    draw_pairs(teacher, prompts, 3, tmp_path / "one", SETTINGS, CPU)
    again = {p.name: p.stat().st_mtime_ns for p in lost.parent.iterdir()}
    assert {name for name, stamp in again.items() if stamps[name] != stamp} == {lost.name}
    assert all(torch.equal(v, before[k]) for k, v in load_file(lost).items())


def test_other_settings_are_refused(tiny_sd, tmp_path):
    teacher = load_teacher(str(tiny_sd))
    draw_pairs(teacher, prompts, 3, tmp_path, SETTINGS, CPU)
    other = PairSettings(**SETTINGS.__dict__ | {"guidance_scale": 3.0})
    with pytest.raises(ValueError, match=r"method\.pairs.*'guidance_scale': 2\.0.*3\.0.*Delete"):
        draw_pairs(teacher, prompts, 3, tmp_path, other, CPU)
    with pytest.raises(ValueError, match=r"method\.pairs"):
        read_pairs(tmp_path, other)


def test_regression_and_teacher_samples_as_real_without_images(tiny_sd, tmp_path):
    text = tmp_path / "prompts.txt"
    text.write_text("\n".join(PROMPTS))
    method = {
        "steps": 1, "student_update_every": 1, "guidance_scale": 2.0, "regression_weight": 0.25, "regression_distance": "huber",
        "gan_weight": 0.1, "gan_real": "teacher", "pairs": {"count": 4, "solver_steps": 2, "batch_size": 2},
    }  # fmt: skip
    data = {"source": "prompts", "path": str(text)}
    trainer = make(tiny_sd, tmp_path / "run", method, data=data, max_iterations=2, log_every=1)
    assert not trainer.method.needs_images and trainer.fit()
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert {"regression", "dm", "gan", "discriminator"} <= line.keys()
    # What is descended is the distance between the student's sample and the teacher's from one noise.
    batch = trainer.batches.draw(trainer.iteration, 0)
    torch.manual_seed(5)
    found = trainer.method.regression(trainer.raw, batch)
    torch.manual_seed(5)
    noise, x0, cond = trainer.method.pairs.pick(2, trainer.teacher, CPU)
    sample = trainer.raw["student"](noise, torch.tensor([999, 999]), cond).x0
    assert found.item() == pytest.approx(torch.nn.functional.huber_loss(sample, x0).item(), rel=1e-6)


def test_lpips_without_its_weights_is_one_sentence(tiny_sd, monkeypatch):
    from fewstep.methods.perceptual import load_lpips

    def unreachable(*_args, **_kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    with pytest.raises(ValueError, match=r"method\.regression_distance: lpips needs.*take l2 or huber"):
        load_lpips()
