"""Phases, milestones and grids: what the student is consistent in is what the stock schedulers run."""

import re

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, LCMScheduler, StableDiffusionPipeline, TCDScheduler
from pydantic import ValidationError

from builders.consistency import batch_for, config, consistency, grid_of, nets_for
from fewstep.diffusion.grids import even_grid, phase_grid
from fewstep.diffusion.prediction import ode_step, read
from fewstep.export.pipeline import export
from fewstep.methods.registry import settings_class
from fewstep.teachers import load_teacher


def phased(**changes):
    return config(**{"solver_steps": 40, "steps": 4, "endpoint": "phase", "phases": 4, "sampling": "jump"} | changes)


@pytest.fixture(scope="module")
def teacher(tiny_sd_epsilon):
    return load_teacher(str(tiny_sd_epsilon))


def jumps(teacher, phases):
    return teacher.samplers.grid(teacher.samplers.jump(phases), phases)


# Tables -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "phases", "ends"),
    [
        (40, 4, [0, 249, 499, 749]),
        (100, 4, [0, 249, 499, 749]),
        (50, 5, [0, 199, 399, 599, 799]),
        (40, 8, [0, 124, 249, 374, 499, 624, 749, 874]),
        (40, 2, [0, 499]),
        (40, 1, [0]),
    ],
)
def test_phases_are_those_of_pcm(teacher, n, phases, ends):
    """Edges at floor(m N / M); t, and the step below it, LCM's."""
    grid, plain = phase_grid(jumps(teacher, phases), n), even_grid(n, 1000)
    assert torch.equal(grid.t, plain.t) and torch.equal(grid.s, plain.s)
    edges = [m * n // phases for m in range(phases)]
    assert grid.end[edges].tolist() == ends
    assert (grid.s == grid.end).nonzero().flatten().tolist() == edges
    of_index = [max(m for m, e in enumerate(edges) if e <= i) for i in range(n)]
    assert grid.end.tolist() == [ends[m] for m in of_index]


@pytest.mark.parametrize("phases", [1, 2, 3, 4, 5, 6, 7, 8])
def test_phases_begin_where_the_stock_sampler_steps(teacher, phases):
    """For every count, also those that divide nothing: the tcd grid of 3 steps is 998, 665, 332."""
    scheduler = teacher.samplers.jump(phases)
    scheduler.set_timesteps(phases)
    grid = phase_grid(jumps(teacher, phases), 10 * phases)
    assert grid.t.flip(0)[::10].tolist() == scheduler.timesteps.tolist()
    assert grid.end.unique().flip(0).tolist() == [*scheduler.timesteps.tolist()[1:], 0]
    assert torch.equal(grid.s[1:], grid.t[:-1]) and grid.s[0] == 0


def test_milestones_of_mlcm(teacher):
    assert jumps(teacher, 8).tolist() == [999, 874, 749, 624, 499, 374, 249, 124, 0]
    for coarse in (4, 2, 1):  # stages from 8 phases to 1: ends are among the ends before
        assert set(jumps(teacher, coarse).tolist()) <= set(jumps(teacher, 2 * coarse).tolist())


@pytest.mark.parametrize(
    ("n", "timesteps"),
    [
        (1, [999]), (2, [999, 499]), (3, [999, 679, 339]), (4, [999, 759, 499, 259]), (5, [999, 799, 599, 399, 199]),
        (6, [999, 839, 679, 499, 339, 179]), (8, [999, 879, 759, 639, 499, 379, 259, 139]),
    ],
)  # fmt: skip
def test_lcm_schedule_of_fifty(n, timesteps):
    scheduler = LCMScheduler(original_inference_steps=50)
    scheduler.set_timesteps(n)
    assert scheduler.timesteps.tolist() == timesteps


@pytest.mark.parametrize(
    ("n", "places"),
    [
        (1, [0]), (2, [0, 4]), (3, [0, 2, 5]), (4, [0, 2, 4, 6]), (5, [0, 1, 3, 4, 6]), (6, [0, 1, 2, 4, 5, 6]),
        (7, range(7)), (8, range(8)),
    ],
)  # fmt: skip
def test_one_student_runs_milestones_at_every_count(teacher, n, places):
    """`num_inference_steps` alone, up to 8, by the exported scheduler: any subset of milestones is a legal schedule."""
    method = consistency(phased(steps=8, phases=1, sampling="renoise"), teacher)
    scheduler = method.scheduler()
    scheduler.set_timesteps(n)
    assert scheduler.timesteps.tolist() == [[999, 874, 749, 624, 499, 374, 249, 124][i] for i in places]
    assert set(scheduler.timesteps.tolist()) <= set(grid_of(method).t.tolist())
    with pytest.raises(ValueError, match="9"):
        scheduler.set_timesteps(9)


@pytest.mark.parametrize(
    "places", [[0, 4, 7], [0, 2, 4, 7], [0, 2, 4, 6, 7], [0, 2, 4, 5, 6, 7], [0, 2, 3, 4, 5, 6, 7]]
)
def test_tlcms_schedules_are_taken_as_timesteps(tiny_sd, places):
    """They end at 124, which no count gives; the exported pipeline runs them as a caller lists them, and no other way."""
    wanted = [[999, 874, 749, 624, 499, 374, 249, 124][i] for i in places]
    teacher = load_teacher(str(tiny_sd))
    method = consistency(phased(steps=8, phases=1, sampling="renoise", embed_guidance=False), teacher)
    pipeline = teacher.students.pipeline(method.roles()["student"].net, method.scheduler())
    seen: list[int] = []
    pipeline.unet.register_forward_pre_hook(lambda _, args: seen.append(int(args[1])))
    pipeline("a coat", timesteps=wanted, output_type="latent")
    assert seen == wanted and set(wanted) <= set(grid_of(method).t.tolist())
    for k in range(1, 1000 // len(wanted)):
        scheduler = LCMScheduler(original_inference_steps=k)
        try:
            scheduler.set_timesteps(len(wanted))
        except ValueError:
            continue
        assert scheduler.timesteps.tolist() != wanted


PROMPT, SCALES = "a coat", (3.0, 1.0, 2.0, 1.0, 2.5, 1.5, 1.0, 4.0)


@pytest.fixture(scope="module")
def milestones(tiny_sd, tmp_path_factory):
    """The method of fashion/trajectory_long.yaml, its student, and the export with a scale for each of eight milestones."""
    teacher = load_teacher(str(tiny_sd))
    method = consistency(
        config(solver_steps=8, steps=8, guidance_range=(1.0, 4.0), export_guidance_scale=SCALES), teacher
    )
    student = nets_for(method)["student"].eval()
    torch.nn.init.normal_(student.net.time_embedding.cond_proj.weight, std=0.1)
    path = export(
        teacher, student, method.scheduler(), tmp_path_factory.mktemp("milestones") / "student",
        allowed_steps=method.allowed_steps(), guidance=method.student_guidance, card={"prompt": PROMPT},
    )  # fmt: skip
    return method, student, path


def jumping(sampler, path):
    """Stock schedulers of deterministic steps, for an exported folder of a re-noising student."""
    options = {"subfolder": "scheduler", "steps_offset": 1}
    if sampler == "tcd":
        return TCDScheduler.from_pretrained(path, **options)
    return DDIMScheduler.from_pretrained(path, timestep_spacing="trailing", **options)


@pytest.mark.parametrize("n", [1, 2, 4, 8])
@pytest.mark.parametrize("sampler", ["lcm", "tcd", "ddim"])
def test_one_artefact_serves_three_stock_samplers(milestones, sampler, n):
    """In plain diffusers, against loops written out here with the student in memory, told the scale of each milestone.

    LCM ends in x0, trailing DDIM too (its last step goes to alpha 1), TCD in alpha and sigma of timestep 0.
    """
    method, student, path = milestones
    times = [999, 874, 749, 624, 499, 374, 249, 124][:: 8 // n]
    if sampler == "lcm":
        stock = DiffusionPipeline.from_pretrained(path)
    else:
        stock = StableDiffusionPipeline.from_pretrained(path, scheduler=jumping(sampler, path))
    stock.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    found = stock(
        PROMPT, num_inference_steps=n, latents=noise, generator=torch.Generator().manual_seed(7), output_type="latent"
    ).images
    assert stock.scheduler.timesteps.tolist() == times

    cond, alphas, x = method.teacher.condition([PROMPT]), method.teacher.pipeline.scheduler.alphas_cumprod, noise
    generator = torch.Generator().manual_seed(7)
    scales = dict(zip([999, 874, 749, 624, 499, 374, 249, 124], SCALES, strict=True))
    last = {"tcd": alphas[0]}.get(sampler, torch.tensor(1.0))
    for t, alpha in zip(times, [*(alphas[s] for s in times[1:]), last], strict=True):
        with torch.no_grad():
            x0, eps = student(x, torch.tensor([t]), cond, torch.tensor([scales[t]]))
        if sampler == "lcm":
            eps = torch.randn(x.shape, generator=generator) if alpha < 1 else eps
        x = alpha.sqrt() * x0 + (1 - alpha).sqrt() * eps
    assert (found - x).abs().max() <= 1e-5 * x.abs().max()


@pytest.mark.parametrize("sampler", ["tcd", "ddim"])
def test_the_artefacts_own_pipeline_is_for_its_own_sampler(milestones, sampler):
    """LatentConsistencyModelPipeline passes an eta of None, which TCD cannot take, and a grid, which DDIM cannot."""
    path = milestones[2]
    pipeline = DiffusionPipeline.from_pretrained(path, scheduler=jumping(sampler, path))
    pipeline.set_progress_bar_config(disable=True)
    with pytest.raises(TypeError):
        pipeline(PROMPT, num_inference_steps=4)


def test_the_artefacts_card_tells_milestones(milestones):
    method, _, path = milestones
    rows = dict(re.findall(r"^\| (\d) \| (999.*) \|$", (path / "README.md").read_text(), re.M))
    assert list(rows) == [str(n) for n in method.allowed_steps()]
    grid = set(grid_of(method).t.tolist())
    assert all({int(t) for t in told.split(",")} <= grid for told in rows.values())
    assert [len(told.split(",")) for told in rows.values()] == [1, 2, 3, 4, 5, 6, 7, 8]


# Maps ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("n", [40, 100])
def test_phase_maps_are_the_stock_steps_bit_for_bit(teacher, kind, n):
    """From every phase's start, in float32: TCD with eta 0 on the training grid or the exported one, trailing DDIM.

    Roots, products, sums and quotients of single numbers are rounded alike everywhere on the CPU; on a GPU the stock steps
    divide by alpha, a number on the CPU, as the product with its inverse, and epsilon's x0 may differ in the last bit.
    """
    own = dict(teacher.pipeline.scheduler.config) | {"prediction_type": kind}
    tcd = TCDScheduler.from_config(own, original_inference_steps=n)
    # Its last step ends at the first alpha, as TCD's does.
    ddim = DDIMScheduler.from_config(own, clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing")
    x, output = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for phases in (1, 2, 4):
        grid = phase_grid(jumps(teacher, phases), n)
        exported = TCDScheduler.from_config(
            own | dict(teacher.samplers.jump(phases).config) | {"prediction_type": kind}
        )
        for scheduler, options in ((tcd, {"eta": 0.0}), (exported, {"eta": 0.0}), (ddim, {})):
            scheduler.set_timesteps(phases)
            for t in scheduler.timesteps:
                step = scheduler.step(output, int(t), x, **options).prev_sample
                end = grid.end[grid.t == t].expand(2)
                p = read(teacher.schedule, kind, output, x, t.expand(2))
                assert torch.equal(ode_step(teacher.schedule, p, end), step)


def test_edges_are_the_identity(teacher):
    """One grid point above an end the target is the solver's state itself, whatever the network says there."""
    method = consistency(phased(target_decay=0.5), teacher)
    nets, batch = nets_for(method), batch_for(teacher)
    noise, g = torch.randn_like(batch.x0), torch.full((4,), 3.0)
    for index, same in ((torch.tensor([0, 10, 20, 30]), True), (torch.tensor([1, 11, 21, 31]), False)):
        with torch.no_grad():
            first = method.loss(nets, batch, index=index, noise=noise, guidance_scale=g).losses["consistency"]
            for p in nets["target"].parameters():
                p.add_(0.3)
            assert (
                torch.equal(
                    method.loss(nets, batch, index=index, noise=noise, guidance_scale=g).losses["consistency"], first
                )
                == same
            )
            for p in nets["target"].parameters():
                p.sub_(0.3)


def test_identity_is_tested_on_the_start_and_both_sides_have_its_end(teacher):
    """A pitfall: the state's phase decides, not that of the solver's step, which at an edge is in the next one."""
    grid = grid_of(consistency(phased(), teacher))
    at = grid.at(torch.tensor([10, 11, 9]))
    assert at.t.tolist() == [274, 299, 249]
    assert at.s.tolist() == [249, 274, 224]
    assert at.end.tolist() == [249, 249, 0]


def test_phase_loss_equals_the_formulas(teacher):
    method = consistency(phased(), teacher)
    nets, batch = nets_for(method), batch_for(teacher)
    index, noise = torch.tensor([39, 10, 13, 0]), torch.randn_like(batch.x0)
    scale = torch.tensor([3.0, 8.0, 4.5, 6.0])
    alphas = teacher.pipeline.scheduler.alphas_cumprod.double()

    def jump(x0, eps, s):
        return alphas[s].sqrt() * x0 + (1 - alphas[s]).sqrt() * eps

    total = []
    with torch.no_grad():
        for i, (t, s, end) in enumerate([(999, 974, 749), (274, 249, 249), (349, 324, 249), (24, 0, 0)]):
            cond, uncond = ({k: v[i : i + 1] for k, v in c.items()} for c in (batch.cond, batch.uncond))
            g, at = scale[i : i + 1], torch.tensor
            x = jump(batch.x0[i : i + 1].double(), noise[i : i + 1].double(), t).float()
            c, u = (nets["teacher"](x, at([t]), side) for side in (cond, uncond))
            x_s = jump(u.x0 + g * (c.x0 - u.x0), u.eps + g * (c.eps - u.eps), s).float()
            own = jump(*nets["student"](x, at([t]), cond, g), end)
            target = x_s if s == end else jump(*nets["target"](x_s, at([s]), cond, g), end)
            total.append((own - target).square().mean())
        loss = method.loss(nets, batch, index=index, noise=noise, guidance_scale=scale).losses["consistency"]
    assert loss.item() == pytest.approx(torch.stack(total).mean().item(), rel=1e-4)


def test_plain_x0_has_no_scalings_but_the_end(teacher):
    method = consistency(config(endpoint="x0_plain", solver_steps=40, steps=8), teacher)
    x = torch.randn(2, 4, 8, 8)
    p = teacher.denoiser(x, torch.tensor([19, 0]), teacher.null_condition(2))
    value = method.stages[0].parts.endpoint(p, x, torch.tensor([19, 0]), torch.tensor([0, 0]))
    assert torch.equal(value[0], p.x0[0]) and torch.equal(value[1], x[1])


def test_flow_phases_are_eulers_steps(tmp_path):
    from builders.families import build_sd3

    teacher = load_teacher(str(build_sd3(tmp_path / "sd3")))
    grid = phase_grid(jumps(teacher, 4), 20)
    assert torch.equal(grid.t.flip(0)[::5], jumps(teacher, 4)[:-1].float())
    _, sigma = teacher.schedule(grid.t)
    u = torch.linspace(0.05, 1, 20)
    assert torch.allclose(sigma, 3 * u / (1 + 2 * u), atol=1e-5)  # even before the shift of 3
    assert grid.end[0] == -1 and teacher.schedule(grid.s[:1]) == (1, 0)


# Sampling, impossible settings --------------------------------------------------------------------------------------------


def test_counts(teacher):
    assert consistency(phased(), teacher).allowed_steps() == (4,)
    stages = (dict(phases=8, iterations=2), dict(phases=2))
    staged = consistency(phased(steps=8, stages=stages), teacher)
    assert staged.allowed_steps() == (2, 3, 4, 5, 6, 7, 8)
    assert consistency(phased(sampling="renoise", steps=8), teacher).allowed_steps() == tuple(range(1, 9))


@pytest.mark.parametrize("name", ["cd", "lcm", "ect"])
def test_phases_are_of_methods_that_have_them(name):
    with pytest.raises(ValidationError, match=r"phases\n.*Extra inputs"):
        settings_class(name).model_validate({"optim": {"lr": 1.0}, "phases": 4})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phases": 3}, r"phases: found 3; expected a divisor of points \(40\)"),
        ({"steps": 8}, r"steps: found 8; expected as many as phases \(4\)"),
        ({"stages": ({}, {})}, "found null; expected a number in all stages but the last"),
        ({"stages": ({"iterations": 3},)}, "all stages but the last"),
        ({"states": "student_rollout", "student_steps": 5}, r"states.steps: found 5; expected at most steps"),
        ({"embed_guidance": False, "export_guidance_scale": 3.0}, "embed false"),
    ],
)
def test_impossible_configs(changes, message):
    with pytest.raises(ValidationError, match=message):
        phased(**changes)
