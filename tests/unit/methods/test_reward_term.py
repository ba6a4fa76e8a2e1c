"""The reward beside the consistency loss: of the student's own samples, through one step, up to a ceiling."""

import json
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from builders.consistency import batch_for, config, consistency, nets_for
from builders.trainer import make
from fewstep.evaluate.rewards.load import load_reward
from fewstep.methods.base import Preparation
from fewstep.teachers import load_teacher

PROMPTS = ["a coat", "a bag", "", "a shirt"]


def preparation(tmp_path):
    return Preparation(tmp_path, list, 1, 0, torch.device("cpu"), 0, 1, lambda: None, load_reward)


def rewarding(teacher, tmp_path, **changes):
    values = {
        "solver_steps": 40, "steps": 8, "endpoint": "x0_plain", "states": "trajectory", "guidance_range": (1.0, 3.0),
        "target_decay": None, "reward": "clip@fashion", "reward_weight": 0.5, "reward_samples": 3,
    }  # fmt: skip
    method = consistency(config(**values | changes), teacher)
    method.prepare(preparation(tmp_path))
    nets = nets_for(method)
    nets["ema"] = nets["student"].clone().requires_grad_(False)
    batch = replace(batch_for(teacher), latents=None, raw=PROMPTS)
    return method, nets, batch


@pytest.mark.parametrize("stop", [0, 2])
def test_reward_is_that_of_the_last_step_of_a_rollout(tiny_sd, tmp_path, stop, monkeypatch):
    teacher = load_teacher(str(tiny_sd))
    method, nets, batch = rewarding(teacher, tmp_path)
    seen: list[torch.Tensor] = []
    nets["student"].net.register_forward_hook(lambda net, args, out: seen.append(args[1]))
    nets["ema"].net.register_forward_hook(lambda net, args, out: seen.append(args[1]))
    (term,) = method.stages[0].parts.terms
    monkeypatch.setattr(term, "times", term.times[: stop + 1])
    wanted = torch.randint(stop + 1, (), generator=batch.generator.clone_state()).item()
    output = method.loss(nets, batch)
    times = [999, 749, 499, 249]
    own, student = seen[:wanted], seen[wanted]
    assert [t.tolist() for t in own] == [[t] * 3 for t in times[:wanted]]
    assert student.tolist()[4:] == [times[wanted]] * 3  # one call for both halves, the target's comes after it
    assert output.losses["reward"].item() == pytest.approx(-0.5 * output.logs["reward_value"].item(), rel=1e-5)


def test_a_step_down_the_loss_raises_the_reward(tiny_sd, tmp_path):
    teacher = load_teacher(str(tiny_sd))
    method, nets, batch = rewarding(teacher, tmp_path)
    parameters = list(nets["student"].parameters())

    def value():
        torch.manual_seed(3)
        batch.generator.manual_seed(3)
        output = method.loss(nets, batch)
        return output.losses["reward"], output.logs["reward_value"].item()

    loss, before = value()
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    norm = torch.stack([g.square().sum() for g in gradients if g is not None]).sum().sqrt()
    with torch.no_grad():
        for p, g in zip(parameters, gradients, strict=True):
            if g is not None:
                p.sub_(0.02 * g / norm)
    assert value()[1] > before
    assert all(p.grad is None for p in teacher.pipeline.vae.parameters())


def test_the_ceiling_ends_it(tiny_sd, tmp_path):
    teacher = load_teacher(str(tiny_sd))
    method, nets, batch = rewarding(teacher, tmp_path, reward_ceiling=-1000.0)
    loss = method.loss(nets, batch).losses["reward"]
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in nets["student"].parameters())


def test_only_its_stage_rewards(tiny_sd, tmp_path):
    teacher = load_teacher(str(tiny_sd))
    stages = ({"iterations": 2}, {"reward_weight": 0.1, "lr": 1e-5})
    method, nets, batch = rewarding(teacher, tmp_path, reward_weight=0.0, stages=stages)
    assert set(method.loss(nets, batch).losses) == {"consistency"}
    assert set(method.loss(nets, replace(batch, iteration=2)).losses) == {"consistency", "reward"}


def test_a_reward_of_ones_own_teaches_and_is_reported_before_training_where_it_cannot(tiny_sd, tmp_path, monkeypatch):
    """In the trainer, and though its stage is never reached."""
    text = "def dark(images, prompts):\n    assert len(prompts) == len(images)\n    return 1 - images.mean((1, 2, 3))\n"
    (tmp_path / "fewstep_mine.py").write_text(text + "def flat(images, prompts):\n    return images.mean()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    method = {"reward": "fewstep_mine:dark", "reward_weight": 0.5, "reward_samples": 2}
    assert make(tiny_sd, tmp_path / "a", max_iterations=1, method=method).fit()
    (line,) = (tmp_path / "a" / "log.jsonl").read_text().splitlines()
    assert 0 < json.loads(line)["reward_value"] < 1
    late = {
        "reward": "fewstep_mine:flat",
        "endpoint": "x0_plain",
        "stages": [{"iterations": 5}, {"reward_weight": 0.5}],
    }
    with pytest.raises(
        ValueError,
        match=r"^method\.reward\.name: found fewstep_mine:flat with a result torch\.float32 \[\]; expected floats \[2\]",
    ):
        make(tiny_sd, tmp_path / "b", max_iterations=1, method=late).fit()


def test_impossible(tiny_sd, tmp_path):
    with pytest.raises(ValidationError, match="without a reward"):
        config(endpoint="x0_plain", stages=({"reward_weight": 0.1},))
    method = consistency(config(reward="clip@nowhere", reward_weight=0.1, steps=10), load_teacher(str(tiny_sd)))
    with pytest.raises(ValueError, match=r"method\.reward\.name: "):
        method.prepare(preparation(tmp_path))
