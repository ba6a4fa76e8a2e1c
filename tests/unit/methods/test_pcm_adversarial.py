"""PCM's adversarial loss: the exact kernel, what the heads are shown, a short training."""

import json

import pytest
import torch
from diffusers import DDPMScheduler
from pydantic import ValidationError
from safetensors.torch import load_file

from builders.consistency import batch_for, config, consistency, nets_for
from fewstep.config import DataConfig, RunConfig
from fewstep.data import load_source
from fewstep.diffusion.prediction import more_noise
from fewstep.diffusion.schedule import RectifiedFlow, ShiftedFlow, VariancePreserving
from fewstep.methods.consistency.adversarial import Ends, judge, times_in_phase
from fewstep.methods.discriminator import features
from fewstep.methods.noisy_batch import NoisyBatch
from fewstep.methods.registry import settings_class
from fewstep.teachers import load_teacher
from fewstep.training.trainer import Trainer

PHASED = {"solver_steps": 40, "steps": 4, "endpoint": "phase", "phases": 4, "sampling": "jump", "gan_weight": 0.1}
ALPHAS = DDPMScheduler().alphas_cumprod.double()


@pytest.mark.parametrize(
    "schedule", [VariancePreserving(ALPHAS), RectifiedFlow(), ShiftedFlow(3.0)], ids=["vp", "rf", "sd3"]
)
def test_more_noise_is_what_the_process_adds(schedule):
    """Moments: mean alpha(t) x0 and deviation sigma(t), from a state of a known x0 and from clean data (-1)."""
    t = torch.tensor([999, 750, 400, 300, 250])
    for s in (torch.tensor([500, 500, 250, 250, 250]), torch.full((5,), -1)):
        (alpha_s, sigma_s), (alpha_t, sigma_t) = ((a.double(), b.double()) for a, b in (schedule(s), schedule(t)))
        one, zero = torch.ones(5, 1, dtype=torch.float64), torch.zeros(5, 1, dtype=torch.float64)
        mean = more_noise(schedule, alpha_s[:, None] * one, zero, s, t)
        added = more_noise(schedule, zero, one, s, t)
        kept = more_noise(schedule, sigma_s[:, None] * one, zero, s, t)
        assert torch.allclose(mean[:, 0], alpha_t, atol=1e-6)
        assert torch.allclose((added**2 + kept**2)[:, 0].sqrt(), sigma_t, atol=1e-6)
    assert not added.isnan().any()


def test_the_flow_kernel_that_pcm_released_is_not_copied():
    """At an end of 0.5 and a time of 0.75 its noise is 0.5 strong; the process's is 0.707."""
    x, one = torch.zeros(1, 1), torch.ones(1, 1)
    added = more_noise(RectifiedFlow(), x, one, torch.tensor([500]), torch.tensor([750]))
    assert added.item() == pytest.approx(0.5**0.5, rel=1e-4)


def test_the_heads_see_the_teachers_features_of_noised_ends(tiny_sd):
    teacher = load_teacher(str(tiny_sd))
    layers, g = ("net.mid_block",), torch.Generator().manual_seed(0)
    fake, real = torch.randn(2, 3, 4, 8, 8, generator=g)
    ends = Ends(fake, real, torch.tensor([0, 249, 749]), teacher.condition(["a coat", "a bag", ""]))
    torch.manual_seed(1)
    t = torch.tensor([100, 249, 999])
    given = judge(teacher, layers, fake, ends, t)
    torch.manual_seed(1)
    x_t = more_noise(teacher.schedule, fake, torch.randn_like(fake), ends.t, t)
    assert torch.equal(x_t[1], fake[1])  # nothing is added at the end itself
    expected = features(teacher.denoiser, layers, NoisyBatch(x_t, t, ends.cond))
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))


def test_drawn_times_stay_within_the_phase():
    end = torch.tensor([0, 249, 499, 749]).repeat(500)
    t = times_in_phase(end, 250, 1000)
    assert ((t >= end) & (t < end + 250)).all() and len((t - end).unique()) > 200
    assert t.dtype == end.dtype and times_in_phase(torch.tensor([999]), 250, 1000).item() == 999


def test_real_and_fake_share_a_timestep_and_not_the_noise(tiny_sd):
    teacher = load_teacher(str(tiny_sd))
    method = consistency(config(**PHASED), teacher)
    nets, batch = nets_for(method), batch_for(teacher)
    carry = method.loss(nets, batch).carry
    carry = {**carry, "real": carry["fake"].clone()}  # so that nothing but the noise differs
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    teacher.denoiser.net.register_forward_pre_hook(lambda net, args: seen.append(args[:2]))
    method.steps()[1].loss(nets, batch, carry)
    (real, t), (fake, u) = seen
    assert torch.equal(t, u) and len(t.unique()) > 1
    assert not (real == fake).flatten(1).any(1)[t > carry["end"]].any()


def test_a_head_on_every_block_of_the_unet(tiny_sd):
    """As PCM has them, and configs/sd15/pcm_adv.yaml: down, in the middle, up."""
    teacher = load_teacher(str(tiny_sd))
    blocks = ("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1")
    method = consistency(config(**PHASED, gan_layers=blocks), teacher)
    nets, batch = nets_for(method), batch_for(teacher)
    output = method.loss(nets, batch)
    loss, ends = output.losses["gan"], Ends.from_carried(output.carry)
    heard = judge(teacher, method.stages[0].parts.terms[0].layers, ends.fake, ends, ends.t)
    assert [f.shape[1] for f in heard] == [32, 64, 64, 64, 32]
    assert nets["discriminator"](heard).shape == (4, 5) and loss.isfinite()


def test_gradients_go_to_the_student_and_not_to_teacher_or_heads(tiny_sd):
    teacher = load_teacher(str(tiny_sd))
    method = consistency(config(**PHASED), teacher)
    nets, batch = nets_for(method), batch_for(teacher)
    assert list(nets) == ["teacher", "student", "target", "discriminator"]
    nets["discriminator"].requires_grad_(False)
    output = method.loss(nets, batch)
    output.losses["gan"].backward()
    assert any(p.grad is not None and p.grad.any() for p in nets["student"].parameters())
    assert all(p.grad is None for p in teacher.denoiser.parameters())
    nets["discriminator"].requires_grad_(True)
    method.steps()[1].loss(nets, batch, output.carry).losses["discriminator"].backward()
    assert all(p.grad is not None for p in nets["discriminator"].parameters())
    assert all(p.grad is None for p in teacher.denoiser.parameters())


@pytest.mark.parametrize("name", ["cd", "lcm", "ect", "mlcm"])
def test_needs_phases(name):
    """The loss is on the ends of phases: only PCM has it."""
    with pytest.raises(ValidationError, match=r"adversarial\n.*Extra inputs"):
        settings_class(name).model_validate({"optim": {"lr": 1.0}, "adversarial": {"weight": 0.1}})


def test_trains_and_resumes(tiny_sd, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a coat\na bag\na shirt\na boot\na dress\na hat\n")

    def trained(folder, resume=None):
        method = config(**PHASED, states="trajectory")
        run = RunConfig[type(method)](
            teacher=str(tiny_sd), method=method, output_dir=tmp_path / folder,
            data=DataConfig(source="prompts", path=prompts), max_iterations=4, batch_size=4,
            checkpoint={"every": 2}, log={"every": 1}, train={"mixed_precision": "no", "cpu_threads": 1},
        )  # fmt: skip
        teacher = load_teacher(run.teacher)
        trainer = Trainer(run, consistency(run.method, teacher), teacher, load_source(run.data, teacher.image_size))
        if resume:
            trainer.resume(str(resume))
        assert trainer.fit()

    trained("whole")
    trained("half", resume=tmp_path / "whole" / "checkpoints" / "2")
    for name in ("student", "discriminator", "discriminator_optimizer"):
        a, b = (load_file(tmp_path / run / "checkpoints" / "4" / f"{name}.safetensors") for run in ("whole", "half"))
        assert all(torch.equal(a[key], b[key]) for key in a), name
    line = json.loads((tmp_path / "whole" / "log.jsonl").read_text().splitlines()[-1])
    assert {"consistency", "gan", "discriminator", "real_accuracy", "fake_accuracy"} <= set(line)
