"""BOOT: its loss against formulas written out, its start, its starts of segments, what it exports, what it never opens."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from builders import ROOT, changed
from fewstep import io
from fewstep.config import OptimConfig, RunConfig
from fewstep.data import load_source
from fewstep.data.fashion import Fashion
from fewstep.data.folder import Folder
from fewstep.data.parquet import Parquet
from fewstep.diffusion.prediction import ode_step, read
from fewstep.diffusion.schedule import like
from fewstep.export.pipeline import export
from fewstep.methods.base import Batch
from fewstep.methods.boot.config import BootConfig
from fewstep.methods.boot.method import Boot
from fewstep.methods.boot.starts import Pool
from fewstep.methods.noisy_batch import NoisyBatch
from fewstep.teachers import Denoiser, load_teacher
from fewstep.training import checkpoint as ckpt
from fewstep.training.trainer import Trainer

PROMPTS = ["a bag", "a coat", "a shoe", "a shirt"]


def config(**changes):
    return BootConfig.model_validate({"optim": OptimConfig(lr=1e-3), "n_sub": 8} | changes)


def build(path, **changes):
    teacher = load_teacher(str(path))
    return Boot(config(**changes), teacher), teacher


def batch_for(teacher, size=4, iteration=0):
    raw = PROMPTS[:size] if teacher.conditions == "prompt" else [None] * size
    return Batch(size, teacher.condition(raw), teacher.null_condition(size), torch.device("cpu"), iteration)


def nets_for(method, perturb=0.02):
    """The roles, the student moved away from its teacher, its target embedding too."""
    nets = {name: role.net for name, role in method.roles().items()}
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in nets["student"].parameters():
            p.add_(perturb * torch.randn(p.shape, generator=g))
    nets["ema"] = nets["student"]
    return nets


def noise_for(teacher, size=4):
    return torch.randn(size, *teacher.latent_shape, generator=torch.Generator().manual_seed(9))


# The student's target time ----------------------------------------------------------------------------------------------


@pytest.fixture(params=["tiny_sd", "tiny_sd_epsilon", "tiny_ddpm_grey"])
def teacher(request):
    return load_teacher(str(request.getfixturevalue(request.param)))


def test_student_starts_as_the_teacher_for_every_target_time(teacher):
    student, batch, x = teacher.students.new(progress_embedding=True), batch_for(teacher), noise_for(teacher)
    t = torch.tensor([999, 700, 300, 10])
    expected = teacher.denoiser(x, t, batch.cond)
    for progress in (0.0, 0.3, 1.0):
        found = student(x, t, batch.cond, progress=torch.full((4,), progress))
        assert torch.equal(found.x0, expected.x0)


def test_folded_equals_unfolded_at_the_end_of_a_segment(teacher):
    method = Boot(config(), teacher)
    student, batch, x = nets_for(method)["student"].eval().double(), batch_for(teacher), noise_for(teacher)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    unet = teacher.students.pipeline(student, method.scheduler()).unet
    folded = Denoiser(unet, student.call, student.schedule, student.prediction_type)
    scale = torch.ones(4) if teacher.conditions == "prompt" else None
    t = torch.tensor([999, 700, 300, 10])
    with torch.no_grad():
        end, half = (student(x, t, batch.cond, progress=torch.full((4,), p)) for p in (1.0, 0.5))
        found = folded(x, t, batch.cond, scale)
    torch.testing.assert_close(found.eps, end.eps, atol=1e-7, rtol=0)
    assert (half.eps - end.eps).abs().max() > 1e-3
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())


def test_a_taken_place_is_refused(tiny_sd):
    teacher = load_teacher(str(tiny_sd))
    teacher.denoiser.net.class_embedding = torch.nn.Embedding(10, 128)
    with pytest.raises(ValueError, match="class labels"):
        teacher.students.new(progress_embedding=True)


# The loss ---------------------------------------------------------------------------------------------------------------


def written_out(method, teacher, nets, batch, z, segment, index, scale, uncond=None, bound=lambda x0: x0):
    """The loss for one sample at a time: jump, the teacher's steps there, and the x0 whose jump from z lands where they do."""
    schedule, grid, n, m = teacher.schedule, method.grid, method.config.n_sub, method.config.m_teacher
    uncond = batch.uncond if uncond is None else uncond
    embedded = torch.tensor([scale]) if method.embedded else None

    def coefficients(t):
        return [v.double().item() for v in schedule(torch.tensor([int(t)]))]

    total = []
    for i in range(batch.size):
        x, tau, first = z[i : i + 1], grid[segment[i], 0], m * int(index[i])
        aa, sa = coefficients(tau)
        own_cond, null = ({k: v[i : i + 1] for k, v in c.items()} for c in (batch.cond, uncond))

        def student(step, x=x, tau=tau, cond=own_cond):
            return nets["student"](x, tau[None], cond, embedded, progress=torch.tensor([step / n])).x0

        def f(x, t, cond=own_cond, null=null):
            found = nets["teacher"](x, t[None], cond).x0
            if scale != 1:
                without = nets["teacher"](x, t[None], null).x0
                found = without + scale * (found - without)
            return bound(found)

        at, st = coefficients(grid[segment[i], first])
        x_t = x if first == 0 else at * student(first) + st * (x - aa * student(first)) / sa
        for t, s in pairwise(grid[segment[i], first : first + m + 1]):
            (at, st), (as_, ss) = coefficients(t), coefficients(s)
            x0 = f(x_t, t)
            if method.config.solver == "heun" and s >= 0:
                x0 = (x0 + f(as_ * x0 + ss * (x_t - at * x0) / st, s)) / 2
            x_t = as_ * x0 + ss * (x_t - at * x0) / st
        target = (x_t - ss / sa * x) / (as_ - aa * ss / sa)
        total.append(((student(first + m) - target) / sa).square().mean())
    return torch.stack(total).mean()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scale", [2.0, 1.0])
def test_loss_equals_the_formulas(tiny_sd_path, kind, scale):
    method, teacher = build(tiny_sd_path(kind), guidance={"scale": scale})
    nets, batch, z = nets_for(method), batch_for(teacher), noise_for(teacher)
    segment, index = torch.zeros(4, dtype=torch.long), torch.tensor([0, 3, 5, 7])
    with torch.no_grad():
        loss = method.loss(nets, batch, noise=z, segment=segment, index=index).losses["boot"]
        expected = written_out(method, teacher, nets, batch, z, segment, index, scale)
    assert loss.item() == pytest.approx(expected.item(), rel=2e-3 if kind == "epsilon" else 1e-4)


@pytest.mark.parametrize("family", ["tiny_sd", "tiny_ddpm_grey"])
@pytest.mark.parametrize(("solver", "m"), [("heun", 1), ("ddim", 2), ("heun", 4)])
def test_loss_of_solvers_equals_the_formulas(request, family, solver, m):
    """The pixel model's last sub-step ends at clean data, where there is no teacher for Heun's second evaluation."""
    method, teacher = build(request.getfixturevalue(family), solver=solver, m_teacher=m)
    assert (method.grid[0, -1] == -1) == (family == "tiny_ddpm_grey")
    nets, batch, z = nets_for(method), batch_for(teacher), noise_for(teacher)
    segment, index = torch.zeros(4, dtype=torch.long), torch.tensor([0, 3, 5, 7]) // m
    with torch.no_grad():
        loss = method.loss(nets, batch, noise=z, segment=segment, index=index).losses["boot"]
        expected = written_out(method, teacher, nets, batch, z, segment, index, 1)
    assert loss.item() == pytest.approx(expected.item(), rel=2e-3)


@pytest.mark.parametrize(
    "changes", [{"guidance": {"scale": 3.0, "negative_prompt": "a shoe"}}, {"guidance": {"scale": [1.0, 3.0]}}]
)
def test_loss_of_guidance_equals_the_formulas(tiny_sd, changes):
    """A negative prompt in the null condition's place; and a scale out of a range, which the student is told."""
    method, teacher = build(tiny_sd, **changes)
    nets, batch, z = nets_for(method), batch_for(teacher), noise_for(teacher)
    segment, index = torch.zeros(4, dtype=torch.long), torch.tensor([0, 3, 5, 7])
    uncond = teacher.condition(["a shoe"] * 4) if method.config.guidance.negative_prompt else None
    found = {}
    with torch.no_grad():
        for scale in (1.5, 3.0):
            given = torch.full((4,), scale) if method.embedded else None
            loss = (
                method.loss(nets, batch, noise=z, segment=segment, index=index, guidance_scale=given)
                .losses["boot"]
                .item()
            )
            wanted = scale if method.embedded else 3.0
            expected = written_out(method, teacher, nets, batch, z, segment, index, wanted, uncond).item()
            assert loss == pytest.approx(expected, rel=1e-3)
            found[scale] = loss
    assert (found[1.5] != found[3.0]) == method.embedded


def dynamically(x0):
    """One sample's x0 by dynamic thresholding at the quantile 0.9, written out."""
    size = x0.abs().flatten().sort().values
    place = 0.9 * (len(size) - 1)
    low, high = size[int(place)], size[int(place) + 1]
    s = max(1.0, (low + (place - int(place)) * (high - low)).item())
    return x0.clamp(-s, s) / s


@pytest.mark.parametrize(("kind", "bound"), [("static", lambda x0: x0.clamp(-1, 1)), ("dynamic", dynamically)])
def test_loss_of_thresholds_equals_the_formulas(tiny_ddpm_grey, kind, bound):
    method, teacher = build(
        tiny_ddpm_grey, thresholding={"kind": kind} | ({"quantile": 0.9} if kind == "dynamic" else {})
    )
    nets, batch, z = nets_for(method), batch_for(teacher), noise_for(teacher)
    segment, index = torch.zeros(4, dtype=torch.long), torch.tensor([0, 3, 5, 7])
    with torch.no_grad():
        loss = method.loss(nets, batch, noise=z, segment=segment, index=index).losses["boot"].item()
        expected, free = (
            written_out(method, teacher, nets, batch, z, segment, index, 1, bound=b).item()
            for b in (bound, lambda x0: x0)
        )
    assert loss == pytest.approx(expected, rel=2e-3) and abs(free / expected - 1) > 0.05


def test_loss_of_segments_equals_the_formulas(tiny_sd):
    """Segments begin where the averaged student's jumps arrive."""
    method, teacher = build(tiny_sd, steps=4, guidance={"scale": 2.0})
    nets, batch, noise = nets_for(method), batch_for(teacher), noise_for(teacher)
    segment, index = torch.tensor([0, 1, 2, 3]), torch.tensor([2, 0, 5, 7])
    z = noise.clone()
    with torch.no_grad():
        for i in range(4):
            for j in range(int(segment[i])):
                cond = {k: v[i : i + 1] for k, v in batch.cond.items()}
                p = nets["ema"](z[i : i + 1], method.grid[j, :1], cond, progress=torch.ones(1))
                z[i : i + 1] = ode_step(teacher.schedule, p, method.grid[j, -1:])
        loss = method.loss(nets, batch, noise=noise, segment=segment, index=index).losses["boot"]
        expected = written_out(method, teacher, nets, batch, z, segment, index, 2.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)


def test_a_perfect_student_has_no_loss(tiny_sd):
    """With as many sub-steps as chains of m_teacher, the target of the whole chain is the fine solution's pair."""
    method, teacher = build(tiny_sd, n_sub=8, m_teacher=8)
    nets, batch, z = nets_for(method, perturb=0), batch_for(teacher), noise_for(teacher)
    x, grid = z.clone(), method.grid[0]
    with torch.no_grad():
        for t, s in pairwise(grid):
            x = ode_step(teacher.schedule, teacher.denoiser(x, t.expand(4), batch.cond), s.expand(4))
        found = method.guided.bootstrap(
            method.guided.denoiser(nets["teacher"], batch.cond, None),
            teacher.denoiser(z, grid[:1].expand(4), batch.cond), grid[:1].expand(4), grid[:, None].expand(-1, 4),
        )  # fmt: skip
    torch.testing.assert_close(ode_step(teacher.schedule, found, grid[-1:].expand(4)), x, atol=2e-4, rtol=1e-4)


def test_paper_form_equals_its_formulas(tiny_sd):
    method, teacher = build(tiny_sd, form={"kind": "paper", "t_max": 0.95, "t_min": 0.05, "boundary_weight": 3.0})
    nets, batch, z = nets_for(method), batch_for(teacher), noise_for(teacher)
    assert method.grid[0, 0] == round(0.95 * 999) and method.grid[0, -1] == round(0.05 * 999)
    index = torch.tensor([0, 3, 5, 7])
    bar = teacher.pipeline.scheduler.alphas_cumprod.double()
    table = 0.5 * ((1 - bar) / bar).log()
    tau, total, edges = torch.full((4,), 999), [], []
    with torch.no_grad():
        losses = method.paper_loss(nets, batch, noise=z, index=index).losses
        y = [nets["student"](z, tau, batch.cond, progress=(index + i) / 8).x0 for i in (0, 1)]
        for i, k in enumerate(index.tolist()):
            t, s = method.grid[0, k], method.grid[0, k + 1]
            slope = (table[t + 1] - table[t - 1]) / 2 * 1000
            delta = (t - s) / 1000
            cond = {key: v[i : i + 1] for key, v in batch.cond.items()}
            x_t = bar[t].sqrt().float() * y[0][i : i + 1] + (1 - bar[t]).sqrt().float() * z[i : i + 1]
            f = nets["teacher"](x_t, t[None], cond).x0[0]
            target = y[0][i] + delta * slope * (f - y[0][i])
            total.append((y[1][i] - target).square().mean() / delta**2)
        t_max = torch.full((4,), int(method.grid[0, 0]))
        edge = nets["teacher"](z, t_max, batch.cond).x0
        edges = (nets["student"](z, tau, batch.cond, progress=torch.zeros(4)).x0 - edge).square().mean()
    assert losses["boot"].item() == pytest.approx(torch.stack(total).mean().item(), rel=1e-3)
    assert losses["boundary"].item() == pytest.approx(3 * edges.item(), rel=1e-4)


def test_weights_have_mean_one_and_grow_with_what_is_old(tiny_sd):
    for weighting, power in (("none", 0), ("inv1", 1), ("inv2", 2)):
        method, teacher = build(tiny_sd, form={"kind": "anchored", "weighting": weighting})
        weights = method.weights[0]
        assert weights.mean().item() == pytest.approx(1, abs=1e-6)
        alpha, sigma = teacher.schedule(method.grid[0])
        r = (alpha / sigma).double()
        fresh = (r[1:] - r[:-1]) / (r[1:] - r[0])
        torch.testing.assert_close((weights / weights[0]).double(), fresh**-power, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"solver": "heun"},
        {"m_teacher": 2},
        {"distance": "pseudo_huber", "form": {"kind": "anchored", "weighting": "inv1", "loss_space": "state"}},
        {"guidance": {"scale": [1.0, 3.0]}},
        {"steps": 3, "solver": "heun"},
        {"steps": 2, "start": {"kind": "teacher"}, "guidance": {"scale": 2.0}},
        {"steps": 2, "start": {"kind": "pool", "size": 6}, "guidance": {"scale": [1.0, 3.0]}},
        {"steps": 2, "start": {"kind": "renoise"}},
        {"steps": 2, "start": {"kind": "onpolicy", "warm_start": {"iterations": 10}}},
        {"form": {"kind": "paper"}, "guidance": {"scale": [1.0, 3.0]}, "distance": "pseudo_huber"},
    ],
    ids=str,
)
def test_every_option_gives_a_finite_gradient(tiny_sd, changes):
    method, teacher = build(tiny_sd, **changes)
    nets, batch = nets_for(method), batch_for(teacher)
    torch.manual_seed(0)
    output = method.steps()[0].loss(nets, batch, {})
    sum(output.losses.values()).backward()
    gradients = [p.grad for p in nets["student"].parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert all(p.grad is None for p in nets["teacher"].parameters())
    assert {"loss_front", "loss_middle", "loss_back"} & output.logs.keys()


def test_negative_prompt_and_thresholds_reach_the_teacher(tiny_sd, tiny_ddpm_grey):
    losses = []
    for negative in ("", "a shoe"):
        method, teacher = build(tiny_sd, guidance={"scale": 3.0, "negative_prompt": negative})
        nets, index = nets_for(method), torch.tensor([0, 3, 5, 7])
        losses.append(
            method.loss(nets, batch_for(teacher), noise=noise_for(teacher), segment=None, index=index)
            .losses["boot"]
            .item()
        )
    assert losses[0] != losses[1]
    bounds = {}
    for kind in ("none", "static", "dynamic"):
        method, teacher = build(tiny_ddpm_grey, thresholding=None if kind == "none" else {"kind": kind})
        x = 30 * noise_for(teacher)
        bounds[kind] = method.guided.denoiser(teacher.denoiser, {}, None)(x, torch.full((4,), 10)).x0.abs().max().item()
    assert bounds["none"] > 5 and bounds["static"] == 1 and bounds["dynamic"] == 1


def test_forwards_are_at_the_floor(tiny_sd):
    """One step with guidance: the student twice (once with gradient), the teacher once on both halves of guidance."""
    for steps, student, averaged in ((1, 2, 0), (4, 2, 1.5)):
        method, teacher = build(tiny_sd, steps=steps, guidance={"scale": 2.0})
        nets = nets_for(method)
        nets["ema"] = nets["student"].clone()
        counts = Counter()
        for name, net in nets.items():
            net.net.register_forward_pre_hook(partial(counted, counts, name))
        method.loss(nets, batch_for(teacher), segment=torch.arange(4) % steps)
        assert counts == Counter(teacher=2 * 4, student=student * 4, ema=int(averaged * 4))


def counted(counts, name, module, args):
    counts[name] += len(args[0])


# Starts of segments -----------------------------------------------------------------------------------------------------


def test_teacher_starts_are_the_stock_schedulers_states(tiny_sd):
    """Against diffusers' DDIM with custom timesteps, without guidance."""
    method, teacher = build(tiny_sd, steps=4, start={"kind": "teacher"}, n_sub=5)
    nets, batch, noise = nets_for(method), batch_for(teacher), noise_for(teacher)
    with torch.no_grad():
        starts, _ = method._starts(nets, batch, noise, torch.tensor([0, 1, 2, 3]), None)
        x, scheduler = noise.clone(), method.scheduler()
        times = torch.cat([method.grid[:3, :-1].flatten(), method.grid[3, :1]]).tolist()
        scheduler.set_timesteps(timesteps=times)
        for i, t in enumerate(times):
            if i % 5 == 0:
                torch.testing.assert_close(starts.x[i // 5], x[i // 5], atol=1e-4, rtol=1e-4)
            output = teacher.pipeline.unet(x, torch.tensor(t), **batch.cond).sample
            x = scheduler.step(output, t, x, eta=0.0).prev_sample
    assert torch.equal(noise, noise_for(teacher))


def test_renoised_starts_have_the_noise_of_their_timestep(tiny_sd):
    method, teacher = build(tiny_sd, steps=4, start={"kind": "renoise"})
    assert method.grid[:, 0].tolist() == [999, 749, 499, 249] and (method.grid[:, -1] == -1).all()
    assert method.allowed_steps() == (1, 2, 3, 4)
    nets, noise = nets_for(method), noise_for(teacher)
    with torch.no_grad():
        torch.manual_seed(3)
        starts, _ = method._starts(nets, batch_for(teacher), noise, torch.full((4,), 1), None)
        x0 = nets["ema"](noise, torch.full((4,), 999), batch_for(teacher).cond, progress=torch.ones(4)).x0
        torch.manual_seed(3)
        alpha, sigma = (like(v, x0) for v in teacher.schedule(torch.full((4,), 749)))
    torch.testing.assert_close(starts.x, alpha * x0 + sigma * torch.randn_like(x0), atol=1e-5, rtol=1e-5)


def test_pool_moves_a_few_states_and_goes_on_from_its_state():
    times = torch.tensor([999, 666, 333])

    def cross(starts, segment):
        assert torch.equal(starts.t, times[segment])
        return starts.x + 1

    def fresh(value):
        return NoisyBatch(torch.full((4, 2), value), times[:1].expand(4), {"c": torch.full((4, 1), value)})

    def drawn(pool, first, last):
        found = []
        for i in range(first, last):
            torch.manual_seed(i)
            starts, segment = pool.draw(cross, fresh(100.0 * i + 100))
            # A state carries its own noise and condition, and has made one step for each segment.
            assert torch.equal(starts.x, (starts.cond["c"] + segment[:, None]).expand(-1, 2))
            assert torch.equal(starts.t, times[segment])
            assert torch.equal(pool.noise, pool.held.cond["c"][:4].expand(-1, 2))
            found.append((starts, segment))
        return found

    pool = Pool(6, times, n_sub=2)
    drawn(pool, 0, 3)
    assert len(pool.held) == 6
    assert set(pool.state()) == {"z", "segment", "noise", "cond.c"}
    other = Pool(6, times, n_sub=2)
    other.load_state({k: v.clone() for k, v in pool.state().items()})
    segments = set()
    for (a, i), (b, j) in zip(drawn(pool, 3, 60), drawn(other, 3, 60), strict=True):
        assert torch.equal(a.x, b.x) and torch.equal(a.t, b.t) and torch.equal(i, j)
        segments |= set(i.tolist())
    assert segments == {0, 1, 2}
    assert pool.held.x.min() > 4000, "old states never left"


def test_warm_start_falls_evenly_from_pool_to_student(tiny_ddpm_grey):
    method, teacher = build(
        tiny_ddpm_grey, steps=2, n_sub=2, start={"kind": "onpolicy", "warm_start": {"iterations": 8}}
    )
    nets = nets_for(method)
    torch.manual_seed(0)
    used = []
    for iteration in (0, 4, 8):
        drawn = []
        for _ in range(40 if iteration == 4 else 4):
            method.pool = Pool(4, method.grid[:, 0], n_sub=2)
            with torch.no_grad():
                method._starts(nets, batch_for(teacher, 1, iteration), None, None, None)
            drawn.append(method.pool.held is not None)
        used.append(sum(drawn) / len(drawn))
    assert used[0] == 1 and used[2] == 0 and used[1] == pytest.approx(0.5, abs=0.2)


# Schedulers and export --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["tiny_sd", "tiny_ddpm"])
@pytest.mark.parametrize("steps", range(1, 9))
def test_the_grid_is_what_the_scheduler_does(request, family, steps):
    teacher = load_teacher(str(request.getfixturevalue(family)))
    scheduler = teacher.samplers.jump(steps)
    grid = teacher.samplers.grid(scheduler, steps)
    assert len(grid) == steps + 1 and grid[0] >= 990
    generator = torch.Generator().manual_seed(0)
    for t, s in pairwise(grid):
        x, output = (torch.randn(2, *teacher.latent_shape, generator=generator) for _ in range(2))
        keywords = {"eta": 0.0} if family == "tiny_sd" else {}
        found = scheduler.step(output, t, x, **keywords).prev_sample
        p = read(teacher.schedule, teacher.denoiser.prediction_type, output, x, t.expand(2))
        expected = p.x0 if s < 0 else ode_step(teacher.schedule, p, s.expand(2))
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-5)
    if family == "tiny_sd" or steps == 1:
        with pytest.raises(ValueError):
            scheduler.set_timesteps(steps + 1)


@pytest.mark.parametrize(("family", "steps"), [("tiny_sd", 4), ("tiny_ddpm_grey", 3)])
def test_stock_diffusers_draws_the_student(request, tmp_path, family, steps):
    """The exported folder, by its card's own call, against the jumps of the trainer; guidance cannot come back."""
    from diffusers import DiffusionPipeline

    method, teacher = build(request.getfixturevalue(family), steps=steps)
    student = nets_for(method)["student"].eval()
    path = export(
        teacher, student, method.scheduler(), tmp_path / "pipeline", allowed_steps=method.allowed_steps(),
        card={"method": "boot", "prompt": "a bag"},
    )  # fmt: skip
    stock = DiffusionPipeline.from_pretrained(path)
    stock.set_progress_bar_config(disable=True)
    with torch.no_grad():
        x = torch.randn(1, *teacher.latent_shape, generator=torch.Generator().manual_seed(3))
        cond = batch_for(teacher, 1).cond
        for k in range(steps):
            p = student(x, method.grid[k, :1], cond, progress=torch.ones(1))
            x = p.x0 if method.grid[k, -1] < 0 else ode_step(teacher.schedule, p, method.grid[k, -1:])
    keywords = {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(3)}
    if family == "tiny_sd":
        assert type(stock).__name__ == "StableDiffusionPipeline"
        for scale in (7.5, 1.0):
            keywords["generator"].manual_seed(3)
            found = stock("a bag", output_type="latent", guidance_scale=scale, **keywords).images
            torch.testing.assert_close(found, x, atol=1e-4, rtol=1e-4)
        for wrong in ({"num_inference_steps": steps + 1}, {}):
            with pytest.raises(ValueError, match="smaller than"):
                stock("a bag", **wrong)
    else:
        found = torch.from_numpy(stock(output_type="np", **keywords).images).permute(0, 3, 1, 2)
        torch.testing.assert_close(found, (x / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=1e-4)
        assert "others run without an error and draw badly" in (path / "README.md").read_text()


def test_a_range_of_guidance_stays_with_the_caller_or_is_folded(tiny_sd):
    """One evaluation a step whatever the caller asks for; and what the student says of that scale, or of the folded one."""
    method, teacher = build(tiny_sd, guidance={"scale": [1.0, 4.0]})
    student = nets_for(method, perturb=0.05)["student"].eval()
    z = torch.randn(1, *teacher.latent_shape, generator=torch.Generator().manual_seed(3))
    cond, t, s = batch_for(teacher, 1).cond, method.grid[0, :1], method.grid[0, -1:]

    def said(scale):
        with torch.no_grad():
            return ode_step(teacher.schedule, student(z, t, cond, torch.tensor([scale]), torch.ones(1)), s)

    assert (said(1.5) - said(3.0)).abs().max() > 1e-2
    for folded in (None, 3.0):
        stock = teacher.students.pipeline(student, method.scheduler(), folded)
        sizes = []
        stock.unet.register_forward_pre_hook(lambda _, args, sizes=sizes: sizes.append(len(args[0])))
        for scale in (1.5, 3.0):
            found = stock(
                "a bag", num_inference_steps=1, guidance_scale=scale, output_type="latent",
                generator=torch.Generator().manual_seed(3),
            ).images  # fmt: skip
            torch.testing.assert_close(found, said(scale if folded is None else folded), atol=1e-4, rtol=1e-4)
        assert sizes == [1, 1]


# The whole ------------------------------------------------------------------------------------------------------------


def make(teacher_path, folder, method=None, **changes):
    values = {
        "teacher": str(teacher_path), "output_dir": str(folder), "data": {"source": "fashion", "limit": 64},
        "max_iterations": 4, "train": {"cpu_threads": 1, "mixed_precision": "no"}, "batch_size": 4,
        "checkpoint": {"every": 2}, "log": {"every": 2},
        "method": {"optim": {"lr": 1e-3}, "n_sub": 4} | (method or {}),
    }  # fmt: skip
    config = RunConfig[BootConfig].model_validate(changed(values, changes))
    teacher = load_teacher(config.teacher)
    return Trainer(config, Boot(config.method, teacher), teacher, load_source(config.data, teacher.image_size))


def weights(folder, iteration, names=("student", "ema", "student_optimizer")):
    files = [folder / "checkpoints" / str(iteration) / f"{n}.safetensors" for n in names]
    return {f"{f.stem}.{k}": v for f in files for k, v in load_file(f).items()}


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "method", [{"guidance": {"scale": 2.0}}, {"steps": 2, "start": {"kind": "pool", "size": 6}}], ids=str
)
def test_resume_is_exact(tiny_sd, tmp_path, method):
    assert make(tiny_sd, tmp_path / "whole", method).fit()
    trainer = make(tiny_sd, tmp_path / "again", method, log={"every": 1})  # nor does it matter how often a run logs
    trainer.resume(str(tmp_path / "whole" / "checkpoints" / "2"))
    trainer.fit()
    whole, again = (weights(tmp_path / name, 4) for name in ("whole", "again"))
    assert whole.keys() == again.keys() and all(torch.equal(v, again[k]) for k, v in whole.items())


def test_no_image_is_opened(tiny_sd, tmp_path, monkeypatch):
    def opened(*_):
        raise AssertionError("an image was opened")

    for what in ("fashion.load_idx", "fashion.load_embedded", "folder.decode", "parquet.decode", "images.check_whole"):
        monkeypatch.setattr(f"fewstep.data.{what}", opened)
    monkeypatch.setattr("PIL.Image.open", opened)
    for source in (Fashion, Folder, Parquet):
        monkeypatch.setattr(source, "get", opened)
    assert make(tiny_sd, tmp_path / "a", max_iterations=1, log={"samples_every": 1}).fit()
    # Images that are none: only their captions count.
    (tmp_path / "images" / "a coat").mkdir(parents=True)
    (tmp_path / "images" / "a coat" / "1.png").write_text("no image")
    pq.write_table(pa.table({"image": [b"no image"] * 2, "text": ["a coat", "a bag"]}), tmp_path / "a.parquet")
    for source, path in (("folder", tmp_path / "images"), ("parquet", tmp_path / "a.parquet")):
        data = {"source": source, "path": str(path)}
        assert make(tiny_sd, tmp_path / source, max_iterations=1, data=data).fit()


def test_prompts_or_nothing_are_enough(tiny_sd, tiny_ddpm_grey, tmp_path):
    (tmp_path / "prompts.txt").write_text("a bag\na coat\n")
    data = {"source": "prompts", "path": str(tmp_path / "prompts.txt")}
    assert make(tiny_sd, tmp_path / "a", max_iterations=1, data=data).fit()
    assert make(
        tiny_ddpm_grey, tmp_path / "b", {"thresholding": {"kind": "static"}}, max_iterations=1, data={"source": "none"}
    ).fit()


WITHOUT_IMAGES = """
import runpy, sys
def refuse(event, args):
    if event == "open" and str(args[0]).endswith((".png", ".jpg", ".gz", ".parquet")) and args[1] in ("r", "rb"):
        raise AssertionError(f"opened {args[0]}")
sys.addaudithook(refuse)
import fewstep
assert fewstep.__file__.startswith(sys.argv[1])
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_run_without_any_image_source(tiny_sd, tmp_path):
    """The whole command by a package that has no images, where the operating system would tell of one that is opened."""
    shutil.copytree(ROOT / "fewstep", tmp_path / "fewstep", ignore=shutil.ignore_patterns("images.parquet", "*.png"))
    (tmp_path / "prompts.txt").write_text("a bag\na coat\n")
    run = tmp_path / "run"
    done = subprocess.run(
        [
            sys.executable, "-c", WITHOUT_IMAGES, str(tmp_path), str(ROOT / "train" / "boot.py"),
            "--config", str(ROOT / "configs" / "fashion/boot.yaml"), f"teacher={tiny_sd}", f"output_dir={run}",
            "data.source=prompts", f"data.path={tmp_path / 'prompts.txt'}", "max_iterations=2", "batch_size=2",
            "log.every=1",
            "log.samples_every=1", "checkpoint.every=2", "evaluate=null", "train.cpu_threads=1", "method.n_sub=4",
        ],
        cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (run / "pipeline" / "model_index.json").exists() and (run / "samples" / "2.png").exists()


@pytest.mark.slow
def test_two_processes_train_export_and_resume_exactly(tiny_sd, tmp_path):
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        "2",
        "--multi_gpu",
        "--main_process_port",
        "0",
    ]
    runs = {}
    for name, overrides in (("whole", ()), ("part", ("max_iterations=2",)), ("part", ("checkpoint.resume=latest",))):
        done = subprocess.run(
            [
                *launch, "train/boot.py", "--config", "configs/fashion/boot_4step.yaml", f"teacher={tiny_sd}",
                f"output_dir={tmp_path / name}", "batch_size=4", "max_iterations=4", "checkpoint.every=2", "log.every=1",
                "log.samples_every=0", "evaluate=null", "train.cpu_threads=1", "method.steps=2", "method.n_sub=8",
                "method.start={kind: onpolicy, warm_start: {iterations: 3, pool_size: 8}}",
                "method.optim.decay=constant", *overrides,
            ],
            cwd=ROOT, capture_output=True, text=True,
            env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert (tmp_path / name / "pipeline" / "model_index.json").exists()
        runs[name] = weights(tmp_path / name, ckpt.find(tmp_path / name / "checkpoints", "latest").name)
    folder = tmp_path / "whole" / "checkpoints" / "4"
    assert io.read_json(folder / "state.json")["num_processes"] == 2, "the launch silently used one process"
    pools = [load_file(folder / f"method_{rank}.safetensors")["z"] for rank in (0, 1)]
    assert not torch.equal(*pools)
    # One process alone draws 4 targets an iteration.
    assert max(len(line["loss_by_sub_step"]) for line in log_of(tmp_path / "whole")) > 4
    assert all(torch.equal(v, runs["part"][k]) for k, v in runs["whole"].items())


def test_health_is_the_loss_along_the_chain(tiny_sd):
    """The boundary by itself, then thirds of what follows; and the spread of the segments' starts."""
    method, teacher = build(tiny_sd, n_sub=9)
    logs, _ = method._report(10.0 ** torch.arange(9), torch.arange(9))
    found = {name: logs[f"loss_{name}"].item() for name in ("boundary", "front", "middle", "back")}
    expected = {"boundary": 1, "front": 110 / 2, "middle": 111e3 / 3, "back": 111e6 / 3}
    assert found == pytest.approx(expected)
    method, teacher = build(tiny_sd, steps=2)
    nets, batch, z = nets_for(method), batch_for(teacher), noise_for(teacher)
    index = torch.tensor([0, 0, 3, 7])
    logs = method.loss(nets, batch, noise=z, segment=torch.zeros(4, dtype=torch.long), index=index).logs
    assert logs["start_std"].item() == pytest.approx(z.std().item())
    with torch.no_grad():
        t = torch.full((2,), int(method.grid[0, 0]))
        cond = {k: v[:2] for k, v in batch.cond.items()}
        edge = nets["teacher"](z[:2], t, cond).x0
        own = nets["student"](z[:2], t, cond, progress=torch.full((2,), 1 / 8)).x0
    error = (own - edge).square().mean() / edge.var()
    assert logs["boundary_error"].item() == pytest.approx(error.item(), rel=1e-3)


def test_log_has_the_loss_of_every_sub_step_that_was_seen(tiny_sd, tmp_path, monkeypatch):
    """Against what each iteration reported: means since the last line, of nothing else, and no zeros."""
    seen, report = [], Boot._report

    def kept(self, each, index):
        seen.append((each.tolist(), (2 * index).tolist()))
        return report(self, each, index)

    monkeypatch.setattr(Boot, "_report", kept)
    changes = {"n_sub": 16, "m_teacher": 2, "boundary_frac": 0.5}
    assert make(tiny_sd, tmp_path, changes, train={"accumulate": 2}, batch_size=2, checkpoint={"every": 4}).fit()
    log = log_of(tmp_path)
    assert len(seen) == 8 and len(log) == 2
    for line, calls in zip(log, (seen[:4], seen[4:]), strict=True):
        expected = {}
        for losses, places in calls:
            for loss, place in zip(losses, places, strict=True):
                expected.setdefault(str(place), []).append(loss)
        assert 1 < len(expected) < 8
        wanted = {place: pytest.approx(sum(v) / len(v), rel=1e-5) for place, v in expected.items()}
        assert line["loss_by_sub_step"] == wanted


def test_drift_of_the_pool_is_the_distance_from_the_students_own_states(tiny_sd):
    method, teacher = build(
        tiny_sd, steps=3, start={"kind": "pool", "size": 6}, n_sub=2, guidance={"scale": [1.0, 3.0]}
    )
    nets, found = nets_for(method), set()
    assert method.health(nets, 1) == {}
    for i in range(12):
        torch.manual_seed(i)
        with torch.no_grad():
            method._starts(nets, batch_for(teacher), None, None, None)
            before = torch.get_rng_state()
            figures = method.health(nets, i + 1)
            assert torch.equal(before, torch.get_rng_state())
            held, segment, states, own = method.pool.held, method.pool.segment, [], []
            for k in (segment[:4] > 0).nonzero().flatten().tolist():
                z = method.pool.noise[k : k + 1]
                cond = {key: v[k : k + 1] for key, v in held.cond.items()}
                for j in range(int(segment[k])):
                    p = nets["ema"](z, method.grid[j, :1], cond, held.guidance_scale[k : k + 1], torch.ones(1))
                    z = ode_step(teacher.schedule, p, method.grid[j, -1:])
                states.append(held.x[k : k + 1])
                own.append(z)
        found.add(len(states))
        if not states:
            assert figures == {}
            continue
        states, own = torch.cat(states), torch.cat(own)
        expected = (states - own).square().mean() / states.var()
        assert expected > 1e-4
        assert figures["pool_drift"].item() == pytest.approx(expected.item(), rel=1e-3)
    assert len(found) > 1


def test_drift_is_logged_while_starts_come_from_a_pool(tiny_sd, tmp_path):
    for name, method, expected in (
        ("pool", {"steps": 4, "start": {"kind": "pool", "size": 4}}, [True, True]),
        (
            "warm",
            {"steps": 4, "start": {"kind": "onpolicy", "warm_start": {"iterations": 3, "pool_size": 4}}},
            [True, False],
        ),
        ("own", {"steps": 2}, [False, False]),
    ):
        assert make(tiny_sd, tmp_path / name, method, checkpoint={"every": 4}).fit()
        log = log_of(tmp_path / name)
        assert ["pool_drift" in line for line in log] == expected
        assert all(line["start_std"] > 0 for line in log)


def test_warning_when_the_boundary_is_lost(tiny_sd):
    method, _ = build(tiny_sd)
    assert method.warnings({"boundary_error": 0.6}) == []
    assert method.warnings({"boundary_error": 0.2}) == []
    assert method.warnings({"boundary_error": 0.3}) == []
    assert "method.boundary_frac" in method.warnings({"boundary_error": 0.7})[0]
    assert method.warnings({}) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"m_teacher": 3}, "m_teacher: found 3; expected a divisor of n_sub"),
        ({"steps": 9}, "steps"),
        ({"guidance": {"scale": [3.0, 2.0]}}, "scale: found .*ascending"),
        ({"guidance": {"export_scale": 2.0}}, "export_scale: found 2"),
        ({"guidance": {"negative_prompt": "x"}}, "negative_prompt: found"),
        ({"start": {"kind": "pool"}}, "start: found pool with steps 1"),
        ({"start": {"kind": "onpolicy", "warm_start": {"iterations": 5}}}, "start: found warm_start with steps 1"),
        ({"form": {"kind": "paper"}, "steps": 2}, "form: found paper with steps 2"),
        ({"form": {"kind": "paper", "weighting": "inv1"}}, "form.paper.weighting"),
        ({"form": {"kind": "paper", "loss_space": "state"}}, "form.paper.loss_space"),
        ({"form": {"kind": "paper", "t_min": 0.5, "t_max": 0.4}}, "t_min: found 0.5"),
    ],
    ids=str,
)
def test_impossible_configs(changes, message):
    with pytest.raises(ValidationError, match=message):
        config(**changes)


def test_configs_that_do_not_fit_the_teacher(tiny_sd, tiny_ddpm):
    for path, changes, message in (
        (tiny_ddpm, {"guidance": {"scale": 2.0}}, r"method\.guidance\.scale"),
        (tiny_sd, {"thresholding": {"kind": "static"}}, r"method\.thresholding"),
        (tiny_sd, {"n_sub": 1100}, r"method\.n_sub: found 1100 between timesteps"),
        (tiny_sd, {"form": {"kind": "paper", "t_max": 0.9999}}, r"method\.form\.t_max"),
    ):
        with pytest.raises(ValueError, match=message):
            build(path, **changes)
