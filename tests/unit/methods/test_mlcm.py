"""States without images: trajectories of the teacher, samples of the student; stages, resuming, costs."""

import json
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from builders import changed
from builders.consistency import OPTIM, batch_for, config, consistency, grid_of, nets_for
from builders.states import FREE, MEAN, SCHEDULE, STD, TIMES, advance, exact, fresh, imageless, onwards
from fewstep.config import DataConfig, RunConfig
from fewstep.data import load_source
from fewstep.diffusion.grids import Grid
from fewstep.diffusion.guidance import GuidedDenoiser
from fewstep.diffusion.prediction import Prediction, add_noise, ode_step
from fewstep.diffusion.rollout import jump, renoise, rollout
from fewstep.methods.consistency.points import FixedPoints
from fewstep.methods.consistency.pool import Pool
from fewstep.methods.consistency.states import Draw, SampledTrajectories
from fewstep.methods.consistency.targets import SolverStep
from fewstep.teachers import load_teacher
from fewstep.training.trainer import Trainer


def flow_map(x, t, s):
    """The ODE's own solution: x keeps its place in the marginal's distribution."""
    (at, st), (a, b) = ((v.view(-1, 1) for v in SCHEDULE(u)) for u in (t, s))
    deviation = [(alpha**2 * STD**2 + sigma**2).sqrt() for alpha, sigma in ((at, st), (a, b))]
    return a * MEAN + deviation[1] / deviation[0] * (x - at * MEAN)


# Trajectories -------------------------------------------------------------------------------------------------------------


def test_trajectories_are_in_every_segment_once_and_restart():
    torch.manual_seed(0)
    pool, size = Pool(8), 18
    seen: list[list[int]] = [[] for _ in range(size)]
    for turn in range(19):
        pool.draw(advance, TIMES, fresh(size, turn))
        assert sorted((pool.visit.unique()).tolist()) == list(range(9))  # all segments in every batch
        for i, index in enumerate(pool.index.tolist()):
            seen[i].append(index)
        born = (pool.visit == 0).nonzero().flatten()
        assert (pool.index[born] == 39).all()
        pool.move(onwards(pool), fresh(size, turn + 1))
        again = (pool.visit == 0).nonzero().flatten()
        assert pool.held is not None and pool.held.guidance_scale is not None
        assert pool.held.cond["tag"][again].tolist() == (again + 100 * (turn + 1)).tolist()  # new prompts, noise, scale
        assert torch.equal(pool.held.x[again], fresh(size, turn + 1).x[again])
        assert (pool.held.guidance_scale[again] == turn + 1).all()
    for i, indices in enumerate(seen):
        start = (9 - i % 9) % 9
        ring = indices[start : start + 9]
        assert ring[0] == 39
        assert [index // 5 for index in ring[1:]] == [7, 6, 5, 4, 3, 2, 1, 0]


def test_states_lie_on_the_teachers_trajectories():
    """Where the teacher is exact and its steps are many, marginals are those of the noised data."""
    torch.manual_seed(0)
    size = 20_000
    pool = Pool(40)  # a step for every grid point
    at = pool.draw(advance, TIMES, fresh(size))
    for index in (5, 20, 38):
        x = at.x[pool.index == index]
        alpha, sigma = SCHEDULE(TIMES[index : index + 1])
        assert x.mean().item() == pytest.approx(float(alpha) * MEAN, abs=0.1)
        assert x.std().item() == pytest.approx(float((alpha**2 * STD**2 + sigma**2).sqrt()), rel=0.12)


def test_the_solvers_trajectories_go_through_every_point_as_exactly_as_targets(tiny_sd, monkeypatch):
    """The states of an iteration are, point for point, the x_s of the one before; and no evaluation is added."""
    teacher = load_teacher(str(tiny_sd))
    settings = FREE | {
        "target_decay": None,
        "rollout": "solver",
        "solver_steps": 5,
        "steps": 5,
        "phases": 1,
        "teacher_steps": 3,
    }
    method = consistency(config(**settings), teacher)
    nets, batch = nets_for(method), imageless(teacher)
    torch.manual_seed(0)
    solved: list[torch.Tensor] = []
    pool, solve = method.make.pool, SolverStep.__call__

    def watched(*given):
        found = solve(*given)
        solved.append(found.x_s)
        return found

    monkeypatch.setattr(SolverStep, "__call__", watched)
    calls: list[int] = []
    handle = nets["teacher"].net.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        method.loss(nets, batch)
        for _ in range(12):
            held = pool.held
            before, visit = held.x.clone(), pool.visit.clone()
            solved.clear(), calls.clear()
            method.loss(nets, batch)
            assert len(solved) == 1 and len(calls) == 3  # three steps of the guided teacher, both sides in one call
            after, goes_on = pool.held, visit < 4
            assert torch.equal(after.x[goes_on], solved[0][goes_on])
            assert torch.equal(pool.visit, torch.where(goes_on, visit + 1, 0))
            assert torch.equal(pool.index, 4 - pool.visit)
            assert not torch.equal(after.x, before)
    handle.remove()


def test_each_states_own_trajectory_takes_the_papers_steps():
    counted: list[int] = []

    def counting(x, t, cond):
        counted.append(len(t))
        return exact(x, t)

    index = torch.tensor([39, 38, 35, 34, 17, 4, 0])
    teacher: Any = SimpleNamespace(schedule=SCHEDULE)
    points = FixedPoints(Grid(TIMES, TIMES - 25, 0 * TIMES))
    start = fresh(7).with_x(fresh(7).x, TIMES[index])
    states = SampledTrajectories(Draw(teacher, points, None), 8)
    x = states.roll(GuidedDenoiser(counting, start.cond, start.cond), index, start)
    assert counted == [6, 4, 3, 3, 3, 2, 2, 2]  # L = 0, 1, 1, 2, 5, 8, 8
    assert torch.equal(x[0], start.x[0])
    one = exact(start.x[1:3], torch.tensor([999, 999]))
    assert torch.allclose(x[1:3], ode_step(SCHEDULE, one, TIMES[index[1:3]]))
    two = ode_step(SCHEDULE, exact(start.x[3:4], torch.tensor([999])), torch.tensor([936]))  # halfway to 874
    assert torch.allclose(x[3:4], ode_step(SCHEDULE, exact(two, torch.tensor([936])), torch.tensor([874])))


def test_student_rollout_is_the_samplers_loop(tiny_sd):
    teacher = load_teacher(str(tiny_sd))
    noise, times = torch.randn(2, 4, 8, 8), torch.tensor([999, 749, 499, 249])
    cond = teacher.condition(["a coat", "a bag"])

    def predict(x, t):
        return teacher.denoiser(x, t, cond)

    with torch.no_grad():
        drawn = rollout(predict, teacher.schedule, noise, times, jump)
        scheduler, x = teacher.samplers.jump(4), noise
        scheduler.set_timesteps(4)
        for t in scheduler.timesteps[:3]:
            x = scheduler.step(teacher.denoiser.net(x, t, **cond).sample, int(t), x, eta=0.0).prev_sample
        assert torch.allclose(drawn, x, atol=1e-4)
        torch.manual_seed(4)
        drawn = rollout(predict, teacher.schedule, noise, times, renoise)
        torch.manual_seed(4)
        x = noise
        for t, s in pairwise(times):
            x = add_noise(teacher.schedule, predict(x, t.expand(2)).x0, torch.randn_like(x), s.expand(2))
        assert torch.allclose(drawn, x)


# The loss at them ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher_steps", [1, 3])
def test_the_prediction_that_moves_a_trajectory_is_that_of_the_loss(tiny_sd, teacher_steps):
    """By hand: the same states, the teacher's step, the jumps of both."""
    teacher = load_teacher(str(tiny_sd))
    method = consistency(config(**FREE, target_decay=None, teacher_steps=teacher_steps), teacher)
    nets, batch = nets_for(method), imageless(teacher)
    noise, g = torch.randn(4, 4, 8, 8), torch.tensor([3.0, 4.0, 5.0, 8.0])
    with torch.no_grad():
        method.loss(nets, batch, noise=noise, guidance_scale=g)
        pool = method.make.pool
        held = pool.held
        at = grid_of(method).at(pool.index)

        def guided(x, t):
            c, u = (nets["teacher"](x, t, side) for side in (held.cond, batch.uncond))
            w = held.guidance_scale.view(-1, 1, 1, 1)
            return Prediction(*(b + w * (a - b) for a, b in zip(c, u, strict=True)))

        times = [(at.t + (at.s - at.t) * i / teacher_steps).round().long() for i in range(teacher_steps + 1)]
        x_s = held.x
        for t, s in pairwise(times):
            x_s = ode_step(teacher.schedule, guided(x_s, t), s)
        target = ode_step(teacher.schedule, nets["student"](x_s, at.s, held.cond, held.guidance_scale), at.end)
        target = torch.where((at.s == at.end).view(-1, 1, 1, 1), x_s, target)
        own = ode_step(teacher.schedule, nets["student"](held.x, at.t, held.cond, held.guidance_scale), at.end)
        loss = method.loss(nets, batch, noise=noise, guidance_scale=g).losses["consistency"]
        assert loss.item() == pytest.approx((own - target).square().mean().item(), rel=1e-4)
        moved = pool.held
        on = pool.visit > 0
        x = ode_step(teacher.schedule, guided(held.x, at.t), TIMES[pool.index])
        assert torch.allclose(moved.x[on], x[on], atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "forwards"),
    [
        ({"states": "noised_data"}, 6),
        ({}, 6),  # shared trajectories cost nothing: MLCM at LCM's price
        ({"teacher_steps": 3}, 10),
        ({"states": "student_rollout"}, 10),
        ({"guidance_range": None, "embed_guidance": False}, 5),
    ],
)
def test_forwards_per_sample(tiny_sd, changes, forwards):
    """In units of one forward of the network; the backward pass is two."""
    teacher = load_teacher(str(tiny_sd))
    method = consistency(config(**FREE | {"target_decay": None} | changes), teacher)
    nets = {name: role.net for name, role in method.roles().items()}
    nets["ema"] = nets["student"].clone().requires_grad_(False)
    batch = batch_for(teacher)
    x, t = torch.randn(4, 4, 8, 8), torch.full((4,), 999)
    with FlopCounterMode(display=False) as one, torch.no_grad():
        teacher.denoiser(x, t, batch.cond)
    method.loss(nets, batch)  # trajectories are spread over their segments once
    with FlopCounterMode(display=False) as counted:
        method.loss(nets, batch).losses["consistency"].backward()
    assert counted.get_total_flops() / one.get_total_flops() == pytest.approx(forwards, abs=0.15)


def test_own_trajectories_cost_nine_evaluations_more(tiny_sd):
    """Mean over states and the doubled batch of guidance: 2 (M + 1) / 2 = 9 for M = 8 (the paper's)."""
    teacher = load_teacher(str(tiny_sd))
    method = consistency(config(**FREE | {"target_decay": None, "rollout": "sample"}), teacher)
    nets = nets_for(method)
    rows: list[int] = []
    teacher.denoiser.net.register_forward_hook(lambda net, args, out: rows.append(len(args[0])))
    batch = imageless(teacher, 4)
    with torch.no_grad():
        for index in torch.arange(40).view(10, 4):
            method.loss(nets, batch, index=index)
    assert sum(rows) / 40 == 2 + 2 * (sum(8 - i // 5 for i in range(39))) / 40
    assert not method.state()


# Training -----------------------------------------------------------------------------------------------------------------


def run_config(path, folder, prompts, **changes):
    stages = (
        dict(phases=8, iterations=3),
        dict(phases=2, iterations=3, lr=5e-5, solver_steps=80),
        dict(phases=1, states="student_rollout", endpoint="x0_plain", solver_steps=8, teacher_steps=3),
    )
    method = config(**FREE | {"stages": stages, "guidance_range": (1.0, 3.0)})
    values = {
        "teacher": str(path), "method": method, "data": DataConfig(source="prompts", path=prompts),
        "output_dir": folder,
        "max_iterations": 8, "batch_size": 5, "checkpoint": {"every": 4}, "log": {"every": 1},
        "train": {"mixed_precision": "no"},
    }  # fmt: skip
    return RunConfig[type(method)](**changed(values, changes))


def trainer_for(run):
    teacher = load_teacher(run.teacher)
    method = consistency(run.method, teacher)
    assert not method.needs_images
    return Trainer(run, method, teacher, load_source(run.data, teacher.image_size))


def test_runs_without_images_and_resumes_within_a_stage(tiny_sd, tmp_path):
    """Three stages, no image anywhere, each with its learning rate; going on in the middle of the second changes no weight."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a coat\na bag\na shirt\na boot\na dress\na hat\n")
    whole = trainer_for(run_config(tiny_sd, tmp_path / "whole", prompts))
    rates: list[float] = []
    optimizer = whole.roles["student"].optimizer
    whole.method.warnings = lambda figures: rates.append(optimizer.param_groups[0]["lr"]) or []  # type: ignore[method-assign]
    assert whole.fit()
    (step,) = whole.method.steps()
    assert [step.lr_scale(i) * OPTIM["lr"] for i in range(8)] == pytest.approx([1e-4] * 3 + [5e-5] * 3 + [1e-4] * 2)
    assert rates == pytest.approx([1e-4] * 3 + [5e-5] * 3 + [1e-4] * 2)
    rest = trainer_for(run_config(tiny_sd, tmp_path / "rest", prompts))
    rest.resume(str(tmp_path / "whole" / "checkpoints" / "4"))
    assert rest.fit()
    for name in ("student", "ema", "target", "student_optimizer"):
        a, b = (load_file(tmp_path / run / "checkpoints" / "8" / f"{name}.safetensors") for run in ("whole", "rest"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in log] == [0, 0, 0, 1, 1, 1, 2, 2]


def test_stages_of_adapters(tiny_sd, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a coat\na bag\n")
    trainer = trainer_for(run_config(tiny_sd, tmp_path / "run", prompts, train={"student": {"kind": "lora"}}))
    before = {key: value.clone() for key, value in trainer.teacher.denoiser.state_dict().items()}
    assert trainer.fit()
    after = trainer.teacher.denoiser.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items() if "lora" not in key)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in log] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert all(torch.isfinite(torch.tensor(line["consistency"])) for line in log)
