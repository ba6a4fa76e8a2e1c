"""The teacher's trajectories: what its own scheduler draws, the same for any number of processes, and kept."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from safetensors.torch import load_file

from builders.dmd2 import make
from fewstep.diffusion.grids import milestone_timesteps, trailing_timesteps
from fewstep.diffusion.prediction import Prediction, ode_step
from fewstep.diffusion.schedule import VariancePreserving
from fewstep.diffusion.solvers import second_order
from fewstep.methods.trajectories import TrajectorySettings, draw_trajectories, read_trajectories, solve
from fewstep.teachers import load_teacher

PROMPTS = ["a coat", "a bag", "a shirt"]
CPU = torch.device("cpu")
GRID = trailing_timesteps(4, 1000)
SETTINGS = TrajectorySettings(5, 2, timesteps=GRID, kept=GRID[::2], solver="ddim", guidance_range=(2.0, 2.0))
SEED = 1


def prompts(indices):
    return [PROMPTS[i] for i in indices]


def test_timesteps():
    assert trailing_timesteps(4, 1000) == (999, 749, 499, 249)
    assert trailing_timesteps(3, 1000) == (999, 666, 332)
    assert milestone_timesteps((999, 749, 499), 2, 1000) == (999, 874, 749, 624, 499, 249, 124, 61, 30, 14, 6)
    assert milestone_timesteps((9, 7, 5), 1, 10) == (9, 7, 5, 2)
    with pytest.raises(ValueError, match="found 3 between timesteps 9 and 7; expected at most 2"):
        milestone_timesteps((9, 7), 3, 10)


def starts(teacher, guidance_scale=2.0):
    noise = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(3))
    cond, uncond = teacher.condition(["a coat", "a bag"]), teacher.null_condition(2)
    return noise, cond, uncond, torch.full((2,), guidance_scale)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("solver", ["ddim", "dpm"])
def test_samples_are_those_of_the_stock_pipeline(tiny_sd_path, kind, solver):
    """DDIMScheduler and DPMSolverMultistepScheduler at the same timesteps."""
    teacher = load_teacher(str(tiny_sd_path(kind)))
    noise, cond, uncond, scale = starts(teacher)
    found = solve(teacher, noise, cond, uncond, scale, replace(SETTINGS, solver=solver))
    assert found.shape == (2, 3, *teacher.latent_shape)
    assert torch.equal(found[:, 0], noise)
    pipeline, own = teacher.pipeline, teacher.pipeline.scheduler.config
    pipeline.scheduler = (
        type(pipeline.scheduler).from_config(own, set_alpha_to_one=True)
        if solver == "ddim"
        else DPMSolverMultistepScheduler.from_config(own, timestep_spacing="trailing", final_sigmas_type="zero")
    )
    states = []
    drawn = pipeline(
        ["a coat", "a bag"], latents=noise, num_inference_steps=4, guidance_scale=2.0, output_type="latent",
        callback_on_step_end=lambda _, i, t, kwargs: states.append(kwargs["latents"]) or {},
    )  # fmt: skip
    assert pipeline.scheduler.timesteps.tolist() == list(GRID)
    # After the second step it is at 499, which is kept.
    for ours, theirs in ((found[:, -1], drawn.images), (found[:, 1], states[1])):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def test_second_order_is_more_exact():
    """Gaussian data of deviation c: the ODE keeps x over its deviation sqrt(alpha^2 c^2 + sigma^2)."""
    c, schedule = 0.5, VariancePreserving(torch.linspace(0.9999, 0.005, 1000, dtype=torch.float64))

    def deviation(t):
        alpha, sigma = schedule(t)
        return (alpha**2 * c**2 + sigma**2).sqrt()

    def error(grid, order):
        grid = torch.tensor([*grid, -1])
        x, before = torch.ones(1, dtype=torch.float64) * deviation(grid[:1]), None
        for i in range(len(grid) - 1):
            alpha, sigma = schedule(grid[i : i + 1])
            x0 = alpha * c**2 / deviation(grid[i : i + 1]) ** 2 * x
            now = step = Prediction(x0, (x - alpha * x0) / sigma)
            if order == 2 and before is not None:
                step = second_order(schedule, x, now, before, grid[i - 1 : i + 2])
            x, before = ode_step(schedule, step, grid[i + 1 : i + 2]), now
        return abs(float(x) - c)

    few = milestone_timesteps((999, 749, 499, 249), 2, 1000)
    assert error(few, 2) < error(few, 1) / 4
    assert error(few, 2) < error(trailing_timesteps(len(few), 1000), 1) / 10
    many = milestone_timesteps((999, 749, 499, 249), 64, 1000)
    assert error(many, 2) < error(few, 2) / 4


def test_every_trajectory_has_its_own_scale(tiny_sd):
    teacher = load_teacher(str(tiny_sd))
    noise, cond, uncond, _ = starts(teacher)
    spread = replace(SETTINGS, guidance_range=(1.0, 3.0))
    both = solve(teacher, noise, cond, uncond, torch.tensor([1.0, 3.0]), spread)
    for i, scale in enumerate((1.0, 3.0)):
        alone = solve(teacher, noise, cond, uncond, torch.full((2,), scale), spread)
        torch.testing.assert_close(both[i], alone[i], rtol=1e-4, atol=1e-4)
    plain = solve(teacher, noise, cond, uncond, torch.ones(2), replace(SETTINGS, guidance_range=(1.0, 1.0)))
    torch.testing.assert_close(plain[0], both[0], rtol=1e-4, atol=1e-4)


def test_files_are_the_same_for_any_number_of_processes_and_kept(tiny_sd, tmp_path):
    teacher, settings = load_teacher(str(tiny_sd)), replace(SETTINGS, guidance_range=(1.0, 3.0))
    draw_trajectories(teacher, prompts, 3, tmp_path / "one", settings, SEED, CPU)
    for process in (1, 0):
        draw_trajectories(teacher, prompts, 3, tmp_path / "two", settings, SEED, CPU, process, 2)
    one, two = read_trajectories(tmp_path / "one", settings, SEED), read_trajectories(tmp_path / "two", settings, SEED)
    assert torch.equal(one.x, two.x) and torch.equal(one.scale, two.scale) and one.conditions == two.conditions
    assert len(one.x) == len(one.scale.unique()) == 5 and set(one.conditions) <= set(PROMPTS)
    assert one.scale.min() >= 1 and one.scale.max() <= 3
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == [f"00000{i}.safetensors" for i in range(3)]
    lost = tmp_path / "one" / "000001.safetensors"
    stamps = {p.name: p.stat().st_mtime_ns for p in lost.parent.iterdir()}
    before = load_file(lost)
    lost.unlink()
    draw_trajectories(teacher, prompts, 3, tmp_path / "one", settings, SEED, CPU)
    again = {p.name: p.stat().st_mtime_ns for p in lost.parent.iterdir()}
    assert {name for name, stamp in again.items() if stamps[name] != stamp} == {lost.name}
    assert all(torch.equal(v, before[k]) for k, v in load_file(lost).items())


def test_other_settings_are_refused(tiny_sd, tmp_path):
    teacher = load_teacher(str(tiny_sd))
    draw_trajectories(teacher, prompts, 3, tmp_path, SETTINGS, SEED, CPU)
    other = replace(SETTINGS, guidance_range=(3.0, 3.0))
    with pytest.raises(ValueError, match=r"000000\.safetensors: found .*\[2\.0, 2\.0\].*\[3\.0, 3\.0\].*Delete"):
        draw_trajectories(teacher, prompts, 3, tmp_path, other, SEED, CPU)
    with pytest.raises(ValueError, match=r"other settings"):
        read_trajectories(tmp_path, SETTINGS, SEED + 1)


def test_regression_and_teacher_samples_as_real_without_images(tiny_sd, tmp_path):
    text = tmp_path / "prompts.txt"
    text.write_text("\n".join(PROMPTS))
    method = {
        "steps": 1, "student_update_every": 1, "guidance": {"scale": 2.0},
        "regression": {"weight": 0.25, "distance": "huber"}, "adversarial": {"weight": 0.1, "real": "teacher"},
        "pairs": {"count": 4, "solver_steps": 2, "batch_size": 2},
    }  # fmt: skip
    data = {"source": "prompts", "path": str(text)}
    trainer = make(tiny_sd, tmp_path / "run", method, data=data, max_iterations=2, log={"every": 1})
    assert not trainer.method.needs_images and trainer.fit()
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert {"regression", "dm", "gan", "discriminator"} <= line.keys()
    # What is descended is the distance between the student's sample and the teacher's from one noise.
    batch = trainer.batches.draw(trainer.iteration, 0)
    torch.manual_seed(5)
    found = trainer.method.regression_loss(trainer.networks(), batch)
    torch.manual_seed(5)
    index, cond = trainer.method.pairs.pick(2, trainer.teacher)
    noise, x0 = trainer.method.pairs.x[index].unbind(1)
    sample = trainer.roles["student"].net(noise, torch.tensor([999, 999]), cond).x0
    assert found.item() == pytest.approx(torch.nn.functional.huber_loss(sample, x0).item(), rel=1e-6)


def test_lpips_without_its_weights_is_one_sentence(tiny_sd, monkeypatch):
    from fewstep.methods.perceptual import load_lpips

    def unreachable(*_args, **_kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    with pytest.raises(ValueError, match=r"method\.regression\.distance: found lpips without.*set it to l2 or huber"):
        load_lpips()
