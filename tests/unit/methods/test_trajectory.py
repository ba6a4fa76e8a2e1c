"""Trajectories drawn before training: their states, targets, costs, and runs on them."""

import json
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from builders import changed
from builders.consistency import OPTIM, batch_for, config, consistency, nets_for, sections
from builders.preparation import placeholder_preparation
from fewstep.config import DataConfig, RunConfig
from fewstep.data import load_source
from fewstep.methods.base import Preparation
from fewstep.methods.consistency.endpoints import boundary_scalings
from fewstep.methods.registry import settings_class
from fewstep.methods.trajectories import solve
from fewstep.teachers import load_teacher
from fewstep.training.trainer import Trainer

PROMPTS = ["a coat", "a bag", "a shirt"]
STORED = {
    "solver_steps": 8, "steps": 8, "states": "trajectory", "rollout": "stored",
    "stored": dict(count=5, batch_size=3),
    "target_step": "end", "target_decay": None, "guidance_range": (1.0, 3.0),
}  # fmt: skip

NEIGHBOUR = STORED | {"target_step": "solver", "target_decay": 0.95}


def states_of(method):
    return method.states if method.name == "trajectory" else method.stages[0].parts.states


def prepared(path, folder, **changes):
    teacher = load_teacher(str(path))
    method = consistency(config(**STORED | changes), teacher)
    assert not method.needs_images
    method.prepare(
        Preparation(
            folder, lambda indices: [PROMPTS[i] for i in indices], len(PROMPTS), seed=4, device=torch.device("cpu"), process=0,
            processes=1, wait=lambda: None, load_reward=lambda name: pytest.fail(name),
        )
    )  # fmt: skip
    return method, teacher


def test_trajectories_are_the_solvers_through_the_grid(tiny_sd, tmp_path):
    method, teacher = prepared(tiny_sd, tmp_path)
    stored, settings = states_of(method).stored, states_of(method).settings
    assert settings.kept == (999, 874, 749, 624, 499, 374, 249, 124)
    assert settings.timesteps[:4] == (999, 936, 874, 812) and settings.timesteps[-5:] == (124, 61, 30, 14, 6)
    assert stored.x.shape == (5, 9, *teacher.latent_shape)
    assert len(list((tmp_path / "trajectories").iterdir())) == 2
    with torch.no_grad():
        cond, uncond = teacher.condition(stored.conditions), teacher.null_condition(5)
        again = solve(teacher, stored.x[:, 0], cond, uncond, stored.scale, settings)
    torch.testing.assert_close(again, stored.x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("endpoint", ["x0", "x0_plain"])
@pytest.mark.parametrize(("target", "skip"), [("end", 1), ("solver", 1), ("solver", 3)])
def test_loss_by_hand(tiny_sd, tmp_path, target, skip, endpoint):
    """Against the sample itself, or against the target network at a later state of the trajectory."""
    decay = None if target == "end" else 0.95
    method, teacher = prepared(tiny_sd, tmp_path, target_step=target, target_decay=decay, endpoint=endpoint, skip=skip)
    nets, batch = nets_for(method), batch_for(teacher, 4)
    index = torch.tensor([0, 3, 6, 7])
    stored = states_of(method).stored
    torch.manual_seed(11)
    output = method.loss(
        nets, batch, index=index, noise=torch.zeros(4, *teacher.latent_shape), guidance_scale=torch.ones(4)
    )
    torch.manual_seed(11)
    rows, cond = stored.pick(4, teacher)

    def f(net, x, t, scale):
        x0 = net(x, t, cond, scale).x0
        c_skip, c_out = (v.float().view(-1, 1, 1, 1) for v in boundary_scalings(t, 10.0))
        return c_skip * x + c_out * x0 if endpoint == "x0" else x0

    t, scale = 125 * (index + 1) - 1, stored.scale[rows]
    ours = f(nets["student"], stored.x[rows, 7 - index], t, scale)
    if target == "end":
        theirs = stored.x[rows, 8]
    else:
        s = (t - 125 * skip).clamp_min(0)
        x_s = stored.x[rows, (7 - index + skip).clamp_max(8)]
        theirs = torch.where((s == 0).view(-1, 1, 1, 1), x_s, f(nets["target"], x_s, s, scale))
    assert output.losses["consistency"].item() == pytest.approx((ours - theirs).square().mean().item(), rel=1e-4)


@pytest.mark.parametrize(("target", "forwards"), [("end", 3), ("solver", 4)])
def test_an_iteration_asks_no_teacher(tiny_sd, tmp_path, target, forwards):
    """In units of one forward of the network: the student's own and its backward, and the target's."""
    method, teacher = prepared(tiny_sd, tmp_path, target_step=target)
    nets = {name: role.net for name, role in method.roles().items()}
    assert set(nets) == {"teacher", "student"}
    batch = batch_for(teacher)
    with FlopCounterMode(display=False) as one, torch.no_grad():
        teacher.denoiser(torch.randn(4, *teacher.latent_shape), torch.full((4,), 999), batch.cond)
    teacher.denoiser.net.register_forward_hook(lambda *_: pytest.fail("the teacher was asked"))
    with FlopCounterMode(display=False) as counted:
        method.loss(nets, batch).losses["consistency"].backward()
    assert counted.get_total_flops() / one.get_total_flops() == pytest.approx(forwards, abs=0.15)


def test_states_of_all_points_and_scales_are_drawn(tiny_sd, tmp_path):
    method, teacher = prepared(tiny_sd, tmp_path)
    nets, told = nets_for(method), []
    nets["student"].register_forward_pre_hook(lambda net, args: told.append(args))
    for _ in range(12):
        method.loss(nets, batch_for(teacher))
    assert {int(t) for args in told for t in args[1]} == set(range(124, 1000, 125))
    assert {float(w) for args in told for w in args[3]} == set(states_of(method).stored.scale.tolist())


def run_config(path, folder, prompts, **changes):
    method = config(**STORED)
    values = {
        "teacher": str(path), "method": method, "data": DataConfig(source="prompts", path=prompts),
        "output_dir": folder,
        "max_iterations": 6, "batch_size": 4, "checkpoint": {"every": 3}, "log": {"every": 1},
        "train": {"mixed_precision": "no"},
    }  # fmt: skip
    return RunConfig[type(method)](**changed(values, changes))


def trainer_for(run):
    teacher = load_teacher(run.teacher)
    return Trainer(run, consistency(run.method, teacher), teacher, load_source(run.data, teacher.image_size))


def test_runs_without_images_and_resumes_exactly(tiny_sd, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    assert trainer_for(run_config(tiny_sd, tmp_path / "whole", prompts)).fit()
    rest = trainer_for(run_config(tiny_sd, tmp_path / "rest", prompts))
    rest.resume(str(tmp_path / "whole" / "checkpoints" / "3"))
    assert rest.fit()
    for name in ("student", "ema", "student_optimizer"):
        a, b = (load_file(tmp_path / run / "checkpoints" / "6" / f"{name}.safetensors") for run in ("whole", "rest"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert len(log) == 6 and all(line["consistency"] > 0 for line in log)
    # Another seed has other trajectories, which are not mixed with those that are there.
    with pytest.raises(ValueError, match=r"trajectories.*other settings.*Delete the folder"):
        trainer_for(run_config(tiny_sd, tmp_path / "whole", prompts, seed=1)).fit()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("trajectory", {"trajectories": None}, "trajectories"),
        ("trajectory", {"target": {"kind": "solver"}}, "target"),
        ("trajectory", {"trajectories": {"count": 5, "replay": 64}}, "replay"),
        ("trajectory", {"points": 12}, r"steps: found 8; expected a divisor of points \(12\)"),
        ("lcm", {"target": {"kind": "solver"}}, "target: found another kind than next_state with stored trajectories"),
        (
            "lcm",
            {"states": {"kind": "noised_data"}},
            "target: found next_state without stored trajectories",
        ),
        ("lcm", {"guidance": None, "null_share": 0.1}, "null_share"),
        ("cd", {"grid": {"kind": "karras"}}, "grid: found karras with stored trajectories"),
        ("pcm", {}, "stored_trajectories"),
        ("mlcm", {}, "stored_trajectories"),
    ],
)
def test_impossible(name, changes, message):
    """Keys that nothing uses cannot be written; what relates sections is refused."""
    made = sections(**STORED if name == "trajectory" else NEIGHBOUR) | {"name": name} | changes
    if name in ("pcm", "mlcm"):
        made = {"name": name, "optim": OPTIM, "states": made["states"]}
    if name == "cd":
        del made["reward"]
    with pytest.raises(ValidationError, match=message):
        settings_class(name).model_validate(made)


def test_too_many_substeps(tiny_sd):
    with pytest.raises(ValueError, match=r"method\.trajectories\.substeps: found 200 between timesteps 999 and 874"):
        consistency(config(**STORED | {"stored": dict(count=5, substeps=200)}), load_teacher(str(tiny_sd)))


def test_a_plan_needs_no_trajectories(tiny_sd):
    method = consistency(config(**STORED), load_teacher(str(tiny_sd)))
    with pytest.raises(RuntimeError, match="Call prepare first"):
        method.loss(nets_for(method), batch_for(method.teacher))
    method.prepare(placeholder_preparation())
    assert method.loss(nets_for(method), batch_for(method.teacher)).losses["consistency"].isfinite()


def test_without_guidance(tiny_sd, tmp_path):
    method, teacher = prepared(tiny_sd, tmp_path, guidance_range=None, export_guidance_scale=None)
    assert method.states.settings.guidance_range == (1, 1)
    assert method.loss(nets_for(method), replace(batch_for(teacher))).losses["consistency"].isfinite()
