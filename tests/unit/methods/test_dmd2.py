"""Distribution matching against closed forms, and what a turn of student and critic may and may not touch."""

import json
import math
import os
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn

from builders import ROOT
from builders.dmd2 import GAN, Recorder, config, make
from builders.families import build_edm
from builders.preparation import placeholder_preparation
from fewstep.diffusion.losses import (
    descend,
    discriminator_loss,
    divergence_weights,
    generator_loss,
    gradient_penalty,
    matching_gradient,
)
from fewstep.diffusion.prediction import Prediction, add_noise, output_of, read
from fewstep.diffusion.schedule import RectifiedFlow, VariancePreserving, like
from fewstep.methods.base import Batch
from fewstep.methods.discriminator import Head, noised
from fewstep.methods.distribution_matching.diagnostics import alarms, prompt_distances
from fewstep.methods.distribution_matching.dmd2 import DMD2
from fewstep.teachers import load_teacher
from fewstep.teachers.denoiser import Denoiser


def batch_for(teacher, size=3):
    x0 = torch.randn(size, *teacher.latent_shape, generator=torch.Generator().manual_seed(3))
    prompts = ["a coat", "a bag", "a shirt"][:size]
    cond = teacher.condition(prompts)
    return Batch(size, cond, teacher.null_condition(size), torch.device("cpu"), latents=x0)


def nets_for(method, perturb=0.02):
    nets = {name: role.net for name, role in method.roles().items()}
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name in ("student", "critic"):
            for p in nets[name].parameters():
                p.add_(perturb * torch.randn(p.shape, generator=g))
    return nets


@pytest.fixture(scope="module")
def teacher(tiny_sd):
    return load_teacher(str(tiny_sd))


# Losses -----------------------------------------------------------------------------------------------------------------


def triple(size=4):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(size, 4, 8, 8, generator=g, dtype=torch.float64) for _ in range(3)]


def test_gradient_is_the_formula_sample_by_sample():
    x, real, fake = triple()
    gradient = matching_gradient(x, real, fake)
    for i in range(4):
        size = (x[i] - real[i]).abs().sum() / 256
        torch.testing.assert_close(gradient[i], (fake[i] - real[i]) / size, rtol=1e-12, atol=0)
        alone = matching_gradient(x[i : i + 1], real[i : i + 1], fake[i : i + 1])
        torch.testing.assert_close(alone[0], gradient[i], rtol=1e-12, atol=0)


def test_gradient_is_blind_to_scale_and_zero_where_critic_and_teacher_agree():
    x, real, fake = triple()
    scaled = matching_gradient(7 * x, 7 * real, 7 * fake)
    torch.testing.assert_close(scaled, matching_gradient(x, real, fake), rtol=1e-12, atol=1e-14)
    assert matching_gradient(x, real, real).abs().max() == 0


def test_gradient_has_no_hole_for_infinities():
    x, real, fake = triple()
    real[0], fake[1], fake[2] = x[0], float("inf"), float("nan")
    gradient = matching_gradient(x, real, fake)
    assert torch.isfinite(gradient).all()
    assert all(gradient[i].abs().max() == 0 for i in (0, 1, 2)) and gradient[3].abs().max() > 0


def test_surrogate_has_the_gradient_divided_by_the_elements():
    x, g, _ = triple()
    x.requires_grad_()
    loss = descend(x, g)
    loss.backward()
    torch.testing.assert_close(x.grad, g / g.numel(), rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(loss.detach(), 0.5 * g.square().mean())


def test_adversarial_losses_at_known_logits():
    zero, two = torch.zeros(3, 1), torch.full((3, 1), 2.0)
    assert discriminator_loss("softplus", zero, zero).item() == pytest.approx(2 * math.log(2))
    assert generator_loss("softplus", two).item() == pytest.approx(math.log(1 + math.exp(-2)))
    assert discriminator_loss("hinge", two, -two).item() == 0
    assert discriminator_loss("hinge", zero, two).item() == pytest.approx(4)
    assert generator_loss("hinge", two).item() == -2


def test_penalty_of_a_linear_discriminator():
    w = torch.arange(6.0)
    x = torch.randn(5, 2, 3, requires_grad=True)
    w.requires_grad_()
    penalty = gradient_penalty((x.flatten(1) @ w)[:, None], x)
    penalty.backward()
    assert penalty.item() == pytest.approx(0.5 * 55)
    torch.testing.assert_close(w.grad, torch.arange(6.0))


def test_weights_of_divergences():
    logits = torch.tensor([0.0, 1.0, 50.0, -50.0])[:, None].double()
    r = torch.tensor([1, math.e, 20, 0.1])
    assert divergence_weights("reverse_kl", logits).tolist() == [1, 1, 1, 1]
    torch.testing.assert_close(divergence_weights("forward_kl", logits), r / r.mean())
    h = r / (1 + r)
    torch.testing.assert_close(divergence_weights("jensen_shannon", logits), h / h.mean())


# Closed forms -----------------------------------------------------------------------------------------------------------


def gaussian_x0(schedule, x_t, t, mean, std):
    """E[x0 | x_t] for data N(mean, std^2), element by element."""
    alpha, sigma = (like(v, x_t) for v in schedule(t))
    return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x_t - alpha * mean)


class Gaussian(nn.Module):
    """The exact denoiser of Gaussian data, as a network of any prediction type behind a Denoiser."""

    def __init__(self, schedule, kind, mean, std):
        super().__init__()
        self.schedule, self.kind, self.mean, self.std = schedule, kind, mean, std

    def forward(self, x_t, t):
        x0 = gaussian_x0(self.schedule, x_t, t, self.mean, self.std)
        alpha, sigma = (like(v, x_t) for v in self.schedule(t))
        return output_of(self.schedule, self.kind, Prediction(x0, (x_t - alpha * x0) / sigma), t)


def gaussian(schedule, kind, mean, std):
    net = Gaussian(schedule, kind, mean, std)
    return Denoiser(net, lambda net, given: net(given.x_t, given.t), schedule, kind)


class ExactCritic(nn.Module):
    def __init__(self, denoiser):
        super().__init__()
        self.denoiser = denoiser

    def forward(self, noisy):
        return self.denoiser(noisy.x, noisy.t, noisy.cond), None


def test_outputs_invert_readings():
    vp, flow = VariancePreserving(torch.linspace(0.99, 0.01, 10).double()), RectifiedFlow(10)
    x_t, output = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64)
    t = torch.tensor([1, 5, 9])
    for schedule, kind in ((vp, "epsilon"), (vp, "v_prediction"), (vp, "sample"), (flow, "flow")):
        p = read(schedule, kind, output, x_t, t)
        torch.testing.assert_close(output_of(schedule, kind, p, t), output)


@pytest.mark.parametrize("steps_to_run", [400])
def test_gaussian_student_is_driven_to_mean_and_deviation(tiny_ddpm_grey, steps_to_run):
    """G(z) = a z + b with the exact critic of its own distribution ends where the teacher's data are."""
    teacher = load_teacher(str(tiny_ddpm_grey))
    method = DMD2(config(steps=1, x0_dtype="float64"), teacher)
    mean, std = 0.7, 0.4
    a, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.3, -0.5))
    optimizer = torch.optim.Adam([a, b], 0.02)
    torch.manual_seed(0)
    for i in range(steps_to_run):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 - i / steps_to_run)
        x = a * torch.randn(64, 1, 16, 16, dtype=torch.float64) + b
        nets = {
            "teacher": gaussian(teacher.schedule, "epsilon", mean, std),
            "critic": ExactCritic(gaussian(teacher.schedule, "epsilon", b.item(), a.abs().item())),
        }
        loss = method.distribution_matching_loss(nets, Batch(64, {}, {}, torch.device("cpu")), x).losses["dm"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert a.item() == pytest.approx(std, abs=1e-3) and b.item() == pytest.approx(mean, abs=1e-3)


def test_every_parametrisation_gives_the_same_gradient(tiny_ddpm_grey):
    teacher = load_teacher(str(tiny_ddpm_grey))
    method = DMD2(config(steps=1, x0_dtype="float64"), teacher)
    batch = Batch(4, {}, {}, torch.device("cpu"))
    t = torch.tensor([25, 300, 700, 975])
    vp = VariancePreserving(teacher.schedule.alphas_cumprod.double())
    for schedule, kinds in ((vp, ("epsilon", "v_prediction", "sample")), (RectifiedFlow(1000), ("flow", "sample"))):
        teacher.schedule = schedule
        found = []
        for kind in kinds:
            x = torch.randn(4, 1, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            noise = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
            nets = {
                "teacher": gaussian(schedule, kind, 0.7, 0.4),
                "critic": ExactCritic(gaussian(schedule, kind, 0.1, 0.9)),
            }
            method.distribution_matching_loss(nets, batch, x.requires_grad_(), t, noise).losses["dm"].backward()
            found.append(x.grad)
        assert found[0].abs().max() > 1e-4
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-9)


def test_decoupled_matching_with_the_same_noise_is_the_coupled_one_up_to_normalisers(teacher):
    """Unnormalised, guided - critic is the sum of the two parts."""
    c, u, f = triple(2)
    s = 3.0
    g = u + s * (c - u)
    torch.testing.assert_close((f - c) + (c - g), f - g)
    method = DMD2(config(guidance={"scale": 3.0, "noise_range": (0.3, 0.9)}), teacher)
    nets, batch = nets_for(method), batch_for(teacher)
    x = batch.x0.clone().requires_grad_()
    method.distribution_matching_loss(nets, batch, x).losses["dm"].backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().max() > 0


def test_divergences_weigh_the_same_gradient(teacher):
    """forward_kl: each sample's gradient times its share of exp(logit), of the critic's own heads at the same x_t."""
    t, noise = torch.tensor([100, 500, 900]), torch.randn(3, *teacher.latent_shape)
    found = {}
    for kind in ("reverse_kl", "forward_kl"):
        method = DMD2(config(matching={"divergence": kind}, **GAN), teacher)
        torch.manual_seed(0)  # of the head
        nets, batch = nets_for(method), batch_for(teacher)
        x = batch.x0.clone().requires_grad_()
        method.distribution_matching_loss(nets, batch, x, t, noise).losses["dm"].backward()
        found[kind] = x.grad
    with torch.no_grad():
        _, logits = nets["critic"](discriminate=noised(teacher, batch.x0, (0.0, 1.0), batch.cond, t, noise))
    weights = divergence_weights("forward_kl", logits)
    assert weights.std() > 1e-3
    torch.testing.assert_close(
        found["forward_kl"], found["reverse_kl"] * weights.view(3, 1, 1, 1), rtol=1e-4, atol=1e-9
    )


def test_terms_that_are_off_cost_nothing(teacher):
    method = DMD2(config(matching=None, **GAN), teacher)
    nets, batch = nets_for(method), batch_for(teacher)
    del nets["teacher"]
    assert set(method.generator_loss(nets, batch).losses) == {"gan"}
    method = DMD2(config(), teacher)
    nets, batch = nets_for(method), batch_for(teacher)
    batch = replace(batch, latents=None)
    assert set(method.generator_loss(nets, batch).losses) == {"dm"} and set(method.critic_loss(nets, batch).losses) == {
        "denoising"
    }
    assert not list(nets["critic"].heads) and not method.needs_images


# Sampling ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("steps", "timesteps"),
    [
        (4, [999, 749, 499, 249]), (1, [999]), ([399], [399]), (3, [998, 665, 332]), ([599, 399, 199], [599, 399, 199]),
        (6, [995, 829, 663, 497, 331, 165]), (7, [993, 851, 709, 567, 425, 283, 141]), (2, [999, 499]),
        (5, [999, 799, 599, 399, 199]), (8, [999, 874, 749, 624, 499, 374, 249, 124]),
    ],
)  # fmt: skip
def test_training_samples_as_the_stock_scheduler_does(tiny_sd_path, monkeypatch, kind, steps, timesteps):
    teacher = load_teacher(str(tiny_sd_path(kind)))
    method = DMD2(config(steps=steps), teacher)
    student, batch = nets_for(method, 0.01)["student"], batch_for(teacher)
    count = len(timesteps)
    last = torch.randn(batch.x0.shape, generator=torch.Generator().manual_seed(9))
    torch.manual_seed(4)
    with torch.no_grad():
        x = method.sample(student, batch, stop=count - 1, noise=last)
    torch.manual_seed(4)
    noises = [torch.randn_like(last) for _ in range(count - 1)] + [last]
    import diffusers.schedulers.scheduling_lcm as lcm

    fresh = iter(noises[1:])
    monkeypatch.setattr(lcm, "randn_tensor", lambda *_, **__: next(fresh))
    scheduler = lcm.LCMScheduler.from_config(json.loads(method.scheduler().to_json_string()))
    scheduler.set_timesteps(count)
    assert scheduler.timesteps.tolist() == timesteps
    z = noises[0]
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = student.net(z, t, **batch.cond).sample
            z = scheduler.step(output, t, z).prev_sample
    assert (x - z).abs().max() <= 1e-6 * z.abs().max()
    with pytest.raises(ValueError):
        scheduler.set_timesteps(count + 1)


def test_counts_that_are_allowed_were_matched(teacher):
    found = {n: DMD2(config(steps=n), teacher).allowed_steps() for n in (1, 2, 3, 4, 8)}
    assert found == {1: (1,), 2: (1, 2), 3: (1, 2, 3), 4: (1, 3, 4), 8: (1, 7, 8)}


def test_only_the_last_simulated_step_has_a_graph(teacher):
    method = DMD2(config(), teacher)
    batch, noise = batch_for(teacher), torch.randn(3, *teacher.latent_shape)
    student = Recorder(nets_for(method)["student"])
    x = method.sample(student, batch, stop=0, noise=noise)
    assert [s[1:] for s in student.seen] == [(999, True)] and torch.equal(student.seen[0][0], noise) and x.requires_grad
    student.seen.clear()
    method.sample(student, batch, stop=2, noise=noise)
    assert [s[1:] for s in student.seen] == [(999, False), (749, False), (499, True)]
    assert not torch.equal(student.seen[0][0], noise)


def test_stop_index_is_uniform_and_follows_the_shared_generator(teacher):
    method = DMD2(config(), teacher)
    net = nn.Module()
    net.forward = lambda x_t, t, cond: Prediction(x_t, x_t)
    drawn = []
    for rank in (0, 1):
        torch.manual_seed(rank)  # what processes do not share
        student, generator = Recorder(net), torch.Generator().manual_seed(1)
        for _ in range(400):
            batch = Batch(1, {}, {}, torch.device("cpu"), generator=generator)
            method.sample(student, batch)
        drawn.append([seen[1] for seen in student.seen if seen[2]])
    assert drawn[0] == drawn[1]
    counts = [drawn[0].count(t) for t in (999, 749, 499, 249)]
    assert sum(counts) == 400
    assert sum((n - 100) ** 2 / 100 for n in counts) < 16.3  # chi-squared with 3 degrees, p = 0.001


def test_noised_data_as_inputs(teacher):
    method = DMD2(config(inputs="noised_data"), teacher)
    assert method.needs_images
    batch, noise = batch_for(teacher), torch.randn(3, *teacher.latent_shape)
    student = Recorder(nets_for(method)["student"])
    for stop in (0, 2):
        method.sample(student, batch, stop=stop, noise=noise)
    assert torch.equal(student.seen[0][0], noise)
    expected = add_noise(teacher.schedule, batch.x0, noise, torch.full((3,), 499))
    assert torch.equal(student.seen[1][0], expected)


def test_autocast_does_not_cut_the_last_step_off(teacher):
    """Weights that autocast has cast without gradient, in the simulated steps, must not be used again."""
    method = DMD2(config(), teacher)
    student, batch = nets_for(method)["student"], batch_for(teacher)
    with torch.autocast("cpu", torch.bfloat16):
        loss = method.sample(student, batch, stop=3).square().mean()
    loss.backward()
    without = [name for name, p in student.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert not [name for name in without if name.endswith("conv_in.weight") or "to_q" in name or "proj" in name]


# Critic -----------------------------------------------------------------------------------------------------------------


def test_head_is_the_papers():
    """SDXL's and Stable Diffusion 1.5's heads have 105 and 52 million parameters."""
    with torch.device("meta"):
        assert sum(p.numel() for p in Head(1280, 32, 32).parameters()) == pytest.approx(105e6, rel=0.01)
        assert sum(p.numel() for p in Head(1280, 8, 8).parameters()) == pytest.approx(52e6, rel=0.01)
    assert Head(1280, 8, 8)[1].num_groups == 32
    for shape in ((64, 4, 4), (48, 2, 2), (48, 9, 5), (7, 16, 16)):
        assert Head(*shape)(torch.randn(2, *shape)).shape == (2, 1)


def test_logits_stop_at_the_features(teacher):
    method = DMD2(config(**GAN), teacher)
    nets, batch = nets_for(method), batch_for(teacher)
    critic = nets["critic"]
    after = []
    handle = critic.denoiser.net.up_blocks[0].register_forward_hook(lambda *_: after.append(1))
    at = noised(teacher, batch.x0, (0.0, 1.0), batch.cond)
    heard = []
    inner = critic.denoiser.net.mid_block.register_forward_hook(lambda m, i, o: heard.append(o))
    prediction, logits = critic(discriminate=at)
    assert prediction is None and logits.shape == (3, 1) and not after
    torch.testing.assert_close(logits, critic.heads[0](heard[0]))
    critic(denoise=at, discriminate=at)
    assert len(after) == 1
    inner.remove()
    handle.remove()
    assert not critic.denoiser.net.mid_block._forward_hooks


@pytest.mark.parametrize("source", ["critic", "teacher"])
def test_several_layers_and_either_source(teacher, source):
    method = DMD2(
        config(
            adversarial={
                "weight": 0.1,
                "feature_source": source,
                "layers": ["down_blocks.0", "mid_block"],
                "r1_weight": 1.0,
            }
        ),
        teacher,
    )
    nets, batch = nets_for(method), batch_for(teacher)
    nets["student"].requires_grad_(False)
    losses = method.critic_loss(nets, batch).losses
    assert set(losses) == {"denoising", "discriminator", "r1"} and losses["r1"] > 0
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None for p in nets["critic"].heads.parameters())
    assert all(p.grad is None for p in teacher.denoiser.parameters())
    nets["critic"].requires_grad_(False)
    nets["student"].requires_grad_(True)
    gan = method.adversarial_loss(nets, batch, method.sample(nets["student"], batch))
    gan.backward()
    assert nets["student"].net.conv_in.weight.grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_critic_descends_the_networks_own_error(tiny_sd_path, kind):
    teacher = load_teacher(str(tiny_sd_path(kind)))
    method = DMD2(config(), teacher)
    nets, batch = nets_for(method), batch_for(teacher)
    t, noise = torch.tensor([0, 400, 999]), torch.randn_like(batch.x0)
    found = method.critic_loss(nets, batch, {"sample": batch.x0}, t=t, noise=noise).losses["denoising"]
    stock = teacher.pipeline.scheduler
    x_t = stock.add_noise(batch.x0, noise, t)
    wanted = noise if kind == "epsilon" else stock.get_velocity(batch.x0, noise, t)
    output = nets["critic"].denoiser.net(x_t, t, **batch.cond).sample
    assert found.item() == pytest.approx((output - wanted).square().mean().item(), rel=1e-4)


def test_critic_of_edm_descends_its_networks_own_error(tmp_path):
    """(net - (x0 - c_skip x) / c_out)^2, the stock scheduler's c_skip and c_out: (D - x0)^2 (1 / sigma^2 + 1 / sigma_data^2)."""
    teacher = load_teacher(str(build_edm(tmp_path / "edm")))
    method = DMD2(config(steps=1), teacher)
    nets = nets_for(method)
    x0 = torch.randn(3, *teacher.latent_shape, generator=torch.Generator().manual_seed(3))
    batch = Batch(3, teacher.condition([0, 4, 9]), teacher.null_condition(3), torch.device("cpu"), latents=x0)
    t, noise = torch.tensor([20, 500, 999]), torch.randn_like(x0)
    found = method.critic_loss(nets, batch, {"sample": x0}, t=t, noise=noise).losses["denoising"]
    k = teacher.schedule.level(t).float().view(-1, 1, 1, 1)
    x, c_skip, c_out = x0 + k * noise, 0.25 / (k**2 + 0.25), 0.5 * k / (k**2 + 0.25).sqrt()
    output = nets["critic"].denoiser.net(x / (k**2 + 0.25).sqrt(), 250 * k.flatten().log(), **batch.cond).sample
    assert found.item() == pytest.approx((output - (x0 - c_skip * x) / c_out).square().mean().item(), rel=1e-3)


def test_matching_is_zero_while_the_critic_is_the_teacher(teacher):
    method = DMD2(config(guidance={"scale": 1.0}), teacher)
    nets = {name: role.net for name, role in method.roles().items()}
    batch = batch_for(teacher)
    output = method.distribution_matching_loss(nets, batch, batch.x0)
    assert output.losses["dm"].item() == 0 and output.logs["dm_norm"] == 0


# Turns ------------------------------------------------------------------------------------------------------------------


def snapshot(net):
    return {k: v.clone() for k, v in net.state_dict().items()}


def same(net, before):
    return all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_turn_touches_its_own_network_only(tiny_sd, tmp_path):
    trainer = make(tiny_sd, tmp_path, {"guidance": {"scale": 2.0}, **GAN})
    student, critic = trainer.method.steps()
    assert (student.role, student.every, critic.role, critic.every) == ("student", 5, "critic", 1)
    turn = [trainer.batches.draw(trainer.iteration, 0)], [{}]
    before = {name: snapshot(net) for name, net in trainer.networks().items()}
    trainer.update(student, *turn)
    assert same(trainer.roles["teacher"].net, before["teacher"]) and same(trainer.roles["critic"].net, before["critic"])
    assert not same(trainer.roles["student"].net, before["student"])
    assert all(p.grad is None for p in trainer.roles["critic"].net.parameters())
    before = {name: snapshot(net) for name, net in trainer.networks().items()}
    trainer.update(critic, *turn)
    assert same(trainer.roles["teacher"].net, before["teacher"]) and same(
        trainer.roles["student"].net, before["student"]
    )
    after = trainer.roles["critic"].net.state_dict()
    assert all(not torch.equal(after[k], v) for k, v in before["critic"].items())
    assert not any(p.requires_grad for p in trainer.roles["teacher"].net.parameters())


def test_the_critic_learns_on_the_students_sample(teacher):
    method = DMD2(config(), teacher)
    nets, batch = nets_for(method), batch_for(teacher)
    student = Recorder(nets["student"])
    carry = method.generator_loss(nets | {"student": student}, batch).carry
    drawn = len(student.seen)
    assert drawn >= 1 and not carry["sample"].requires_grad
    method.critic_loss(nets | {"student": student}, batch, carry)
    assert len(student.seen) == drawn


@pytest.mark.parametrize("shared", [False, True])
def test_forwards_are_the_floor(teacher, shared):
    """Per sample: student k + 1, teacher 2 and critic 1 + e; then, without another rollout, critic 1 + 2 e.

    With `adversarial.share_noise`: critic 1; then 1 + e. On the critic's own iterations the student's k + 1 come before it,
    no teacher's.
    """
    method = DMD2(config(guidance={"scale": 2.0}, adversarial={"weight": 0.1, "share_noise": shared}), teacher)
    nets = {name: role.net for name, role in method.roles().items()}
    begun, ended = dict.fromkeys(nets, 0), dict.fromkeys(nets, 0)
    unets = {"teacher": nets["teacher"].net, "student": nets["student"].net, "critic": nets["critic"].denoiser.net}
    for name, unet in unets.items():

        def count(into, name=name):
            return lambda _m, _i, output: into.__setitem__(name, into[name] + len(output))

        unet.conv_in.register_forward_hook(count(begun))
        unet.conv_out.register_forward_hook(count(ended))
    batch = batch_for(teacher)
    k = int(torch.randint(4, (), generator=torch.Generator().manual_seed(7)))
    batch.generator.manual_seed(7)
    carry = method.generator_loss(nets, batch).carry
    assert ended == {"teacher": 6, "student": 3 * (k + 1), "critic": 3}
    assert begun == ended | {"critic": 3 if shared else 6}
    method.critic_loss(nets, batch, carry)
    assert ended == {"teacher": 6, "student": 3 * (k + 1), "critic": 6}
    assert begun == ended | {"critic": 9 if shared else 15}
    before = begun.copy()
    batch.generator.manual_seed(7)
    method.critic_loss(nets, batch)
    assert begun["critic"] - before["critic"] == (6 if shared else 9) and begun["teacher"] == before["teacher"]
    assert begun["student"] - before["student"] == 3 * (k + 1)


def test_shared_noise_gives_the_same_terms(teacher):
    """Given the same noise apart: the terms, and their gradients in the sample and in the critic's weights and heads."""
    t, g = torch.tensor([30, 400, 970]), torch.Generator().manual_seed(8)
    noise, x = (torch.randn(3, *teacher.latent_shape, generator=g) for _ in range(2))
    method, apart = (
        DMD2(config(guidance={"scale": 2.0}, adversarial={"weight": 0.1, "share_noise": v}), teacher)
        for v in (True, False)
    )
    nets, batch = nets_for(method), batch_for(teacher)
    found, wanted = (x.clone().requires_grad_() for _ in range(2))
    nets["critic"].requires_grad_(False)
    terms = method.distribution_matching_loss(nets, batch, found, t, noise).losses
    (terms["dm"] + terms["gan"]).backward()
    expected = apart.distribution_matching_loss(nets, batch, wanted, t, noise).losses | {
        "gan": 0.1 * apart.adversarial_loss(nets, batch, wanted, t, noise)
    }
    (expected["dm"] + expected["gan"]).backward()
    torch.testing.assert_close(terms, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-4, atol=1e-8)
    nets["critic"].requires_grad_(True)
    torch.manual_seed(0)
    losses = method.critic_loss(nets, batch, {"sample": x}, t=t, noise=noise).losses
    torch.manual_seed(0)
    real = noised(teacher, batch.x0, (0.0, 1.0), batch.cond)
    on_real, on_fake = (
        nets["critic"](discriminate=at)[1] for at in (real, noised(teacher, x, (0.0, 1.0), batch.cond, t, noise))
    )
    expected = 0.01 * discriminator_loss("softplus", on_real, on_fake)
    torch.testing.assert_close(losses["discriminator"], expected, rtol=1e-5, atol=1e-7)
    heads = list(nets["critic"].heads.parameters())
    for a, b in zip(*(torch.autograd.grad(v, heads) for v in (losses["discriminator"], expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-8)


def test_regression_alone_has_no_critic(teacher):
    method = DMD2(config(matching=None, steps=1, regression={"weight": 1.0}, pairs={"count": 4}), teacher)
    method.prepare(placeholder_preparation())
    nets, batch = {name: role.net for name, role in method.roles().items()}, batch_for(teacher)
    assert set(nets) == {"teacher", "student"} and [step.role for step in method.steps()] == ["student"]
    student = Recorder(nets["student"])
    assert set(method.generator_loss({"student": student}, batch).losses) == {"regression"} and len(student.seen) == 1


def test_updates_cadence_and_resume_in_the_middle_of_it(tiny_sd, tmp_path):
    method = {"guidance": {"scale": 2.0}, "student_update_every": 4, **GAN}
    trainer = make(tiny_sd, tmp_path / "whole", method)
    assert trainer.fit()
    assert {name: trainer.roles[name].updates for name in ("student", "critic")} == {"student": 2, "critic": 6}
    again = make(tiny_sd, tmp_path / "again", method)
    again.resume(str(tmp_path / "whole" / "checkpoints" / "3"))
    assert again.fit() and all(role.updates == trainer.roles[name].updates for name, role in again.roles.items())
    for name in ("student", "critic", "ema", "student_optimizer", "critic_optimizer"):
        a, b = (load_file(tmp_path / run / "checkpoints" / "6" / f"{name}.safetensors") for run in ("whole", "again"))
        assert a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items()), name
    line = json.loads((tmp_path / "whole" / "log.jsonl").read_text().splitlines()[0])
    expected = {
        "dm",
        "gan",
        "denoising",
        "discriminator",
        "dm_norm",
        "student_to_critic",
        "real_accuracy",
        "student_std",
    }
    assert expected <= line.keys()


def test_prompts_are_enough_without_a_discriminator(tiny_sd, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a coat\na bag\n")
    data = {"source": "prompts", "path": str(prompts)}
    assert make(tiny_sd, tmp_path / "run", {"guidance": {"scale": 2.0}}, data=data, max_iterations=1).fit()
    with pytest.raises(ValueError, match=r"data\.source: found prompts, which has no images"):
        make(tiny_sd, tmp_path / "run", GAN, data=data)


TWO = """
import json, sys
sys.path.insert(0, {tests!r})
import torch
from builders.dmd2 import GAN, Recorder, make
settings = (GAN | {{"student_update_every": 2}},)
trainer = make({teacher!r}, {folder!r}, *settings, max_iterations=4)
assert trainer.accelerator.num_processes == 2
sample, stops = trainer.method.sample, []
def recorded(student, batch, stop=None, noise=None):
    recorder = Recorder(student)
    x = sample(recorder, batch, stop, noise)
    stops.append(len(recorder.seen) - 1)
    return x
trainer.method.sample = recorded
trainer.fit()
weights = [float(sum(p.double().sum() for p in trainer.roles[name].net.parameters())) for name in ("student", "critic")]
found = {{"stops": stops, "weights": weights, "noise": torch.rand(()).item()}}
again = make({teacher!r}, {folder!r} + "/again", *settings, max_iterations=4)
again.resume({folder!r} + "/checkpoints/3")  # amid the cadence
assert again.iteration == 3 and again.fit()
nets = [(trainer.roles[r].net, again.roles[r].net) for r in ("student", "critic", "ema")]
pairs = [(p, q) for a, b in nets for p, q in zip(a.parameters(), b.parameters())]
found["resumed"] = all(torch.equal(p, q) for p, q in pairs)
open({folder!r} + f"/{{trainer.accelerator.process_index}}.json", "w").write(json.dumps(found))
"""


def test_two_processes(tiny_sd, tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO.format(tests=str(ROOT / "tests"), teacher=str(tiny_sd), folder=str(tmp_path)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {
        "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT),
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    # As the launcher starts them, without its own imports.
    processes = [
        subprocess.Popen(
            [sys.executable, str(script)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert not any(process.returncode for process in processes), errors[0][-3000:] + errors[1][-3000:]
    a, b = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert a["stops"] == b["stops"] and len(set(a["stops"])) > 1
    assert a["weights"] == b["weights"] and a["noise"] != b["noise"]
    assert a["resumed"] and b["resumed"]


# Export, config, alarms -------------------------------------------------------------------------------------------------


def test_a_grid_that_ends_early_is_exported(tiny_sd, tmp_path):
    """The one-step recipe of SDXL: one evaluation, told that it is timestep 399, of pure noise."""
    from fewstep.export.pipeline import export

    teacher = load_teacher(str(tiny_sd))
    method = DMD2(config(steps=[399]), teacher)
    student = nets_for(method, 0.005)["student"]
    folder = export(
        teacher, student, method.scheduler(), tmp_path / "pipeline",
        allowed_steps=method.allowed_steps(), card={"prompt": "a bag"},
    )  # fmt: skip
    from diffusers import DiffusionPipeline

    stock = DiffusionPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    latents = stock(
        "a bag", num_inference_steps=1, generator=torch.Generator().manual_seed(3), output_type="latent"
    ).images
    assert stock.scheduler.timesteps.tolist() == [399]
    noise = torch.randn(1, *teacher.latent_shape, generator=torch.Generator().manual_seed(3))
    batch = Batch(1, teacher.condition(["a bag"]), {}, torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(latents, method.sample(student, batch, 0, noise), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": [999, 937, 833, 624]}, r"steps: found .*k = 625"),
        ({"steps": 9}, "steps"),
        ({"matching": None}, "expected one of them to learn from"),
        ({"matching": {"range": [0.9, 0.1]}}, "expected an interval, its lower end first"),
        ({"matching": {"divergence": "forward_kl"}}, "matching.divergence.*adversarial.weight"),
        (
            {"matching": {"divergence": "forward_kl"}, "adversarial": {"weight": 0.1, "loss": "hinge"}},
            "divergence.*softplus",
        ),
        ({"adversarial": {"share_noise": True}}, "adversarial.weight"),
        ({"adversarial": {"weight": 0.1, "share_noise": True, "range": [0.0, 0.5]}}, "share_noise.*leave range out"),
        ({"adversarial": {"r1_weight": 1.0}}, "adversarial.weight"),
        ({"guidance": {"noise_range": [0.5, 1.0]}}, "noise_range.*Set scale above 1"),
        ({"regression": {"weight": 0.25}}, "regression.*found steps 4; expected 1"),
        ({"regression": {"weight": 0.25}, "steps": 1}, r"pairs.*for regression.*pairs\.count"),
        ({"adversarial": {"weight": 0.1, "real": "teacher"}}, r"pairs.*for adversarial.real.*pairs\.count"),
        ({"pairs": {"count": 10}}, "pairs: found 10 unused samples"),
    ],
)
def test_impossible_configs(changes, message):
    with pytest.raises(ValidationError, match=message):
        config(**changes)


def test_what_the_teacher_cannot_do(teacher, tiny_ddpm):
    with pytest.raises(ValueError, match=r"method\.adversarial\.layers.*'middle'.*mid_block"):
        DMD2(config(adversarial={"weight": 0.1, "layers": ["middle"]}), teacher)
    with pytest.raises(ValueError, match="a grid from timestep 1199"):
        DMD2(config(steps=[1199, 599]), teacher)
    with pytest.raises(ValueError, match=r"method\.guidance\.scale"):
        DMD2(config(guidance={"scale": 2.0}), load_teacher(str(tiny_ddpm)))


def test_distance_between_samples_of_one_prompt(teacher):
    """Of 0 to 2 and 2 to 3; the sample without another of its prompt does not count."""
    x = torch.tensor([0.0, 5.0, 1.0, 3.0]).view(4, 1, 1, 1).expand(4, 2, 3, 3)
    found = prompt_distances(x, 2 * x, ["a", "b", "a", "a"])
    assert {k: v.item() for k, v in found.items()} == {"student_prompt_distance": 1.5, "teacher_prompt_distance": 3.0}
    assert prompt_distances(x, x, ["a", "b", "c", "d"]) == {} == prompt_distances(x, x, [])
    method, batch = DMD2(config(), teacher), batch_for(teacher)
    output = method.generator_loss(nets_for(method), replace(batch, raw=["a coat"] * 3))
    assert output.logs["student_prompt_distance"] > 0


def test_alarms_name_keys():
    healthy = {
        "student_std": 1.0, "teacher_std": 0.9, "student_diversity": 0.8, "teacher_diversity": 0.7,
        "student_to_critic": 0.3,
        "student_to_teacher": 0.3, "real_accuracy": 0.7, "fake_accuracy": 0.8,
    }  # fmt: skip
    assert alarms(healthy) == [] and alarms({}) == []
    for changes, key in (
        ({"student_std": 3.0}, "method.student_update_every"), ({"student_diversity": 0.1}, "method.adversarial.weight"),
        ({"student_to_critic": 0.9}, "method.critic_optim.lr"),
        ({"student_prompt_distance": 0.2, "teacher_prompt_distance": 0.5}, "for each prompt"),
        ({"real_accuracy": 1.0, "fake_accuracy": 1.0}, "method.adversarial.r1_weight"),
    ):  # fmt: skip
        (sentence,) = alarms(healthy | changes)
        assert key in sentence


def test_an_exported_consistency_student_is_a_start(tiny_sd, tmp_path):
    """Its guidance is folded, so the zeros where it was embedded are no loss; a live embedding would be one."""
    from fewstep.training.init_from import start_from

    teacher = load_teacher(str(tiny_sd))
    earlier = teacher.students.new(guidance_embedding=True)
    with torch.no_grad():
        for p in earlier.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(5)))
    for name, scale in (("folded", 2.0), ("live", None)):
        teacher.students.pipeline(earlier, teacher.samplers.renoise(4), scale).save_pretrained(tmp_path / name)
    roles = DMD2(config(), teacher).roles()
    start_from(roles, tmp_path / "folded")
    x, t = torch.randn(2, *teacher.latent_shape), torch.tensor([999, 249])
    cond = teacher.condition(["a coat", "a bag"])
    with torch.no_grad():
        expected = earlier(x, t, cond, torch.full((2,), 2.0)).x0
        torch.testing.assert_close(roles["student"].net(x, t, cond).x0, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(expected, roles["critic"].net.denoiser(x, t, cond).x0, atol=1e-2)
    with pytest.raises(ValueError, match=r"train.init_from: .*where 1 weights differ, first .*cond_proj"):
        start_from(roles, tmp_path / "live")


def test_a_second_stage_starts_from_the_first_with_a_fresh_head(tiny_sd, tmp_path):
    make(tiny_sd, tmp_path / "first", {}, max_iterations=1).fit()
    second = make(tiny_sd, tmp_path / "second", GAN, train={"init_from": str(tmp_path / "first" / "checkpoints" / "1")})
    for role in ("student", "critic"):
        earlier = load_file(tmp_path / "first" / "checkpoints" / "1" / f"{role}.safetensors")
        own = second.roles[role].net.state_dict()
        assert all(torch.equal(own[key], value) for key, value in earlier.items())
        assert any(key.startswith("heads") for key in own) == (role == "critic")
