"""One test for each mistake that implementations of latent consistency distillation are known for.

In float64, on real tiny pipelines, against diffusers' own schedulers and pipelines or closed forms. Most of these mistakes
change the loss by less than a percent and training by more than that.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, LatentConsistencyModelPipeline
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from builders import changed
from builders.consistency import config, consistency
from fewstep.config import LoraConfig, RunConfig
from fewstep.data import load_source
from fewstep.diffusion.grids import even_grid
from fewstep.diffusion.prediction import Prediction, add_noise
from fewstep.diffusion.schedule import VariancePreserving
from fewstep.methods.base import Batch
from fewstep.methods.consistency.endpoints import boundary_scalings
from fewstep.methods.consistency.method_settings import LcmSettings
from fewstep.methods.dropout import set_dropout
from fewstep.teachers import load_teacher
from fewstep.teachers.embeddings.unet import attach_guidance, guidance_embedding, with_guidance_embedding
from fewstep.training.batches import Batches
from fewstep.training.trainer import Trainer

INDEX = torch.tensor([0, 49, 17, 1])  # both ends of the grid of 50
T, S = torch.tensor([19, 999, 359, 39]), torch.tensor([0, 979, 339, 19])
SCALE = torch.tensor([3.0, 8.0, 4.5, 6.0], dtype=torch.float64)
EXACT: dict[str, float] = {"rtol": 1e-10, "atol": 1e-12}


@dataclass
class Seen:
    """What a UNet was given, and what it gave."""

    x: Tensor
    t: Tensor
    embedding: Tensor | None
    output: Tensor


class Turn:
    """One loss of fixed tensors, with what each network saw on the way."""

    def __init__(
        self, folder: str, distance: str = "l2", timestep_scaling: float = 10.0, dtype: torch.dtype = torch.float64
    ) -> None:
        self.teacher = teacher = load_teacher(folder)
        teacher.placement.to(torch.device("cpu"), dtype)
        self.alphas = teacher.pipeline.scheduler.alphas_cumprod.double()
        teacher.schedule = teacher.denoiser.schedule = VariancePreserving(self.alphas)
        self.method = consistency(config(distance=distance, timestep_scaling=timestep_scaling), teacher)
        self.nets = {name: role.net.to(dtype) for name, role in self.method.roles().items()}
        g = torch.Generator().manual_seed(5)
        self.x0, self.noise = torch.randn(2, 4, *teacher.latent_shape, generator=g, dtype=dtype)
        with torch.no_grad():  # three different networks, the embedding of the guidance scale among what differs
            for name in ("student", "target"):
                for p in self.nets[name].parameters():
                    p.add_(0.02 * torch.randn(p.shape, generator=g, dtype=p.dtype))
        cond = teacher.condition(["a coat", "a bag", "", "a shirt"])
        self.batch = Batch(4, cond, teacher.null_condition(4), torch.device("cpu"), latents=self.x0)
        self.seen: dict[str, list[Seen]] = {name: [] for name in self.nets}
        for name, net in self.nets.items():
            net.net.register_forward_hook(self._watch(name), with_kwargs=True)
        self.loss = self.again()

    def again(self) -> Tensor:
        return self.method.loss(self.nets, self.batch, index=INDEX, noise=self.noise, guidance_scale=SCALE).losses[
            "consistency"
        ]

    def _watch(self, name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.seen[name].append(Seen(args[0], args[1], kwargs["timestep_cond"], output.sample.detach()))

        return hook

    def x0_hat(self, seen: Seen) -> Tensor:
        """The formulas of the diffusion papers, once more."""
        a = self.alphas[seen.t].view(-1, 1, 1, 1)
        if self.teacher.denoiser.prediction_type == "epsilon":
            return (seen.x - (1 - a).sqrt() * seen.output) / a.sqrt()
        return a.sqrt() * seen.x - (1 - a).sqrt() * seen.output

    def guided(self) -> Tensor:
        """The teacher's output under guidance, as the Stable Diffusion pipeline combines it."""
        (seen,) = self.seen["teacher"]
        cond, uncond = seen.output.chunk(2)
        return uncond + SCALE.view(-1, 1, 1, 1) * (cond - uncond)

    def ddim(self, output: Tensor) -> Tensor:
        """Each sample's step by diffusers' scheduler on the same grid of 50."""
        scheduler = DDIMScheduler.from_config(self.teacher.pipeline.scheduler.config)
        scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = self.alphas, self.alphas[0]
        scheduler.set_timesteps(50)
        x_t = add_noise(VariancePreserving(self.alphas), self.x0, self.noise, T)
        return torch.stack([scheduler.step(o, int(t), x).prev_sample for o, t, x in zip(output, T, x_t, strict=True)])


def run_values(teacher: Any, folder: Any, **changes: Any) -> dict[str, Any]:
    """Of a run of one iteration of two images."""
    values = {
        "teacher": str(teacher), "output_dir": str(folder), "data": {"source": "fashion", "limit": 4}, "batch_size": 2,
        "method": {"optim": {"lr": 1e-4}}, "max_iterations": 1, "train": {"cpu_threads": 1, "mixed_precision": "no"},
    }  # fmt: skip
    return changed(values, changes)


def trainer_for(values: dict[str, Any]) -> Trainer:
    run = RunConfig[LcmSettings].model_validate(values)
    teacher = load_teacher(run.teacher)
    method = consistency(run.method, teacher)
    return Trainer(run, method, teacher, load_source(run.data, teacher.image_size))


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def turn(request: pytest.FixtureRequest, tiny_sd_path: Any) -> Turn:
    return Turn(str(tiny_sd_path(request.param)))


def one(turn: Turn, name: str) -> Seen:
    (seen,) = turn.seen[name]
    return seen


def stock_embedding(w: Tensor) -> Tensor:
    return LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w, embedding_dim=256)  # type: ignore[arg-type]


# Guidance -----------------------------------------------------------------------------------------------------------------


def test_guidance_off_by_one(turn: Turn) -> None:
    """LCM's w multiplies cond - uncond beside cond, diffusers' guidance scale g = w + 1 beside uncond."""
    torch.testing.assert_close(one(turn, "target").x[1:], turn.ddim(turn.guided())[1:], **EXACT)


def test_embedding_the_guidance_scale_instead_of_w(turn: Turn) -> None:
    """The stock pipelines embed guidance_scale - 1."""
    embedding = one(turn, "student").embedding
    assert embedding is not None
    torch.testing.assert_close(embedding.float(), stock_embedding(SCALE.float() - 1), rtol=0, atol=1e-6)


def test_cosine_before_sine() -> None:
    """w = 0 has sines 0, which come first, and cosines 1."""
    assert guidance_embedding(torch.ones(1))[0].tolist() == [0.0] * 128 + [1.0] * 128


def test_frequencies_by_h_instead_of_h_minus_one() -> None:
    """The last frequency is 1000 / 10000 exactly."""
    sine = guidance_embedding(torch.tensor([3.0]))[0, 127]
    torch.testing.assert_close(sine, torch.tensor(0.2).sin(), rtol=1e-5, atol=0)


def test_target_without_the_embedding(turn: Turn) -> None:
    student, target = one(turn, "student").embedding, one(turn, "target").embedding
    assert student is not None and target is not None and torch.equal(student, target)


# The teacher's step -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver_steps", [50, 40, 10])
def test_grid_off_by_one(solver_steps: int, tiny_sd: Any) -> None:
    """The grid is that of diffusers' trailing DDIM, and every timestep of the student's stock scheduler lies on it."""
    t, s, _ = even_grid(solver_steps, 1000)
    teacher = load_teacher(str(tiny_sd))
    ddim = DDIMScheduler.from_config(teacher.pipeline.scheduler.config)
    ddim.set_timesteps(solver_steps)
    assert t.tolist() == ddim.timesteps.tolist()[::-1]
    assert s.tolist() == [0, *t[:-1].tolist()] if s[0] == 0 and t[0] > 0 else False
    steps = 10
    stock = consistency(config(solver_steps=solver_steps, steps=steps), teacher).scheduler()
    for n in range(1, steps + 1):
        stock.set_timesteps(n)
        assert set(stock.timesteps.tolist()) <= set(t.tolist())


def test_step_of_one_timestep_instead_of_k(turn: Turn) -> None:
    """From t = 999 on a grid of 50, DDIM goes to 979."""
    assert one(turn, "student").t.tolist() == T.tolist()
    expected = turn.ddim(turn.guided())
    torch.testing.assert_close(one(turn, "target").x[1], expected[1], **EXACT)


def test_clean_data_below_the_grid(turn: Turn) -> None:
    """The last step leads to t = 0, whose alpha is less than 1."""
    expected = turn.ddim(turn.guided())
    torch.testing.assert_close(one(turn, "target").x[0], expected[0], **EXACT)


def test_output_of_a_v_teacher_taken_for_epsilon(tiny_sd: Any) -> None:
    turn = Turn(str(tiny_sd))
    assert turn.teacher.denoiser.prediction_type == "v_prediction"
    torch.testing.assert_close(one(turn, "target").x, turn.ddim(turn.guided()), **EXACT)


def test_teacher_that_embeds_guidance_called_without_it(tiny_sd: Any, tmp_path: Path) -> None:
    """Such a network is a student already; without its embedding it answers for no scale."""
    teacher = load_teacher(str(tiny_sd))
    attach_guidance(teacher.pipeline.unet)
    teacher.pipeline.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"embeds the guidance scale \(time_cond_proj_dim\)"):
        load_teacher(str(tmp_path))


def test_unconditional_embeddings_of_another_batch_size(tiny_sd: Any) -> None:
    """A batch of three after one of four is its own samples' mean, and every batch of a source has as many conditions."""
    turn = Turn(str(tiny_sd))
    losses = []
    for rows in (slice(0, 3), slice(3, 4)):
        cond = {key: value[rows] for key, value in turn.batch.cond.items()}
        size = len(SCALE[rows])
        batch = Batch(size, cond, turn.teacher.null_condition(size), turn.batch.device, latents=turn.x0[rows])
        given = {"index": INDEX[rows], "noise": turn.noise[rows], "guidance_scale": SCALE[rows]}
        losses.append(turn.method.loss(turn.nets, batch, **given).losses["consistency"].item())
        assert len(turn.seen["teacher"][-1].x) == 2 * size
    assert (3 * losses[0] + losses[1]) / 4 == pytest.approx(turn.loss.item(), rel=1e-9)
    run = RunConfig[LcmSettings].model_validate(run_values(tiny_sd, "unused", data={"source": "fashion", "limit": 5}))
    source = load_source(run.data, turn.teacher.image_size)
    batches = Batches(run, turn.teacher, source, False, turn.batch.device, 0, 1)
    for iteration in range(3):  # the last of them has a sample of the next epoch
        batch = batches.draw(iteration, 0)
        assert {len(v) for v in (*batch.cond.values(), *batch.uncond.values())} == {batch.size} == {2}


# The target ---------------------------------------------------------------------------------------------------------------


def test_target_evaluated_at_t(turn: Turn) -> None:
    assert one(turn, "target").t.tolist() == S.tolist()


def test_online_network_as_target(tiny_sd: Any) -> None:
    """Only the average's weights decide on the target; without one, the student's do."""
    turn = Turn(str(tiny_sd))
    assert (len(turn.seen["student"]), len(turn.seen["target"])) == (1, 1)
    before = turn.loss.item()
    with torch.no_grad():
        for p in turn.nets["target"].parameters():
            p.add_(0.1)
    assert abs(turn.again().item() / before - 1) > 1e-3


def test_gradient_through_the_target(tiny_sd: Any) -> None:
    turn = Turn(str(tiny_sd))
    turn.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in turn.nets["student"].parameters())
    assert all(p.grad is None for name in ("teacher", "target") for p in turn.nets[name].parameters())


# The endpoint -------------------------------------------------------------------------------------------------------------


def test_scalings_are_the_stock_schedulers(tiny_sd: Any) -> None:
    """c_out without sigma_data, c_skip with the timestep scaling, which the loss itself hardly shows, at every t."""
    teacher = load_teacher(str(tiny_sd))
    for scaling in (10.0, 0.01):
        stock: Any = consistency(config(timestep_scaling=scaling), teacher).scheduler()
        assert stock.config.timestep_scaling == scaling
        t = torch.arange(1000)
        expected = stock.get_scalings_for_boundary_condition_discrete(t.double())
        for ours, theirs in zip(boundary_scalings(t, scaling), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


def test_c_out_with_sigma_data() -> None:
    """c_out multiplies a prediction of x0, so it tends to 1, not to sigma_data."""
    assert boundary_scalings(torch.tensor([999]), 10.0)[1].item() == pytest.approx(1, abs=1e-8)


def test_scalings_left_out(turn: Turn) -> None:
    """The distance is between c_skip x + c_out x0 of both networks: 1e-5 of the loss, but not of a test in float64."""
    ends = []
    for name in ("student", "target"):
        seen = one(turn, name)
        q = (10.0 * seen.t.double()).view(-1, 1, 1, 1)
        ends.append(0.25 / (q**2 + 0.25) * seen.x + q / (q**2 + 0.25).sqrt() * turn.x0_hat(seen))
    assert turn.loss.item() == pytest.approx((ends[0] - ends[1]).square().mean().item(), rel=1e-11)


def test_timestep_scaling_left_out(tiny_sd: Any) -> None:
    """With a scaling so small that the student is nearly the identity, the loss is nearly that of one solver step."""
    turn = Turn(str(tiny_sd), timestep_scaling=1e-6)
    assert turn.loss.item() == pytest.approx(
        (one(turn, "student").x - one(turn, "target").x).square().mean().item(), rel=1e-2
    )


def test_huber_over_samples_instead_of_elements(tiny_sd: Any) -> None:
    """With c = 1e-3 the element-wise form is L1 but for less than c."""
    turn = Turn(str(tiny_sd), distance="pseudo_huber")
    difference = torch.stack(
        [
            c_skip.view(-1, 1, 1, 1) * seen.x + c_out.view(-1, 1, 1, 1) * turn.x0_hat(seen)
            for seen in (one(turn, "student"), one(turn, "target"))
            for c_skip, c_out in [boundary_scalings(seen.t, 10.0)]
        ]
    ).diff(dim=0)
    expected = ((difference**2 + 1e-6).sqrt() - 1e-3).mean().item()
    assert turn.loss.item() == pytest.approx(expected, rel=1e-11)
    assert 0 < difference.abs().mean().item() - expected < 1e-3


# Precision and dropout ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_algebra_in_half_precision(kind: str, tiny_sd_path: Any) -> None:
    """Networks answer in bfloat16 under autocast; readings, guidance, the teacher's step and the loss stay in float32."""
    turn = Turn(str(tiny_sd_path(kind)), dtype=torch.float32)
    for seen in turn.seen.values():
        seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        loss = turn.again()
    assert loss.dtype == torch.float32
    for seen in turn.seen.values():
        assert [one.output.dtype for one in seen] == [torch.bfloat16]
        seen[0].output, seen[0].x = seen[0].output.double(), seen[0].x.double()
    stepped = turn.ddim(turn.guided())
    torch.testing.assert_close(one(turn, "target").x[1:], stepped[1:], rtol=1e-5, atol=1e-5)
    ends = []
    for name in ("student", "target"):
        seen = one(turn, name)
        c_skip, c_out = (v.view(-1, 1, 1, 1) for v in boundary_scalings(seen.t, 10.0))
        ends.append(c_skip * seen.x + c_out * turn.x0_hat(seen))
    assert loss.item() == pytest.approx((ends[0] - ends[1]).square().mean().item(), rel=1e-4)


def test_teacher_under_an_autocast_that_nobody_asked_for(tiny_sd: Any, tmp_path: Path) -> None:
    """Without mixed precision the teacher answers in the type of its weights."""
    trainer = trainer_for(run_values(tiny_sd, tmp_path))
    seen: list[tuple[bool, torch.dtype]] = []
    trainer.teacher.denoiser.net.register_forward_hook(
        lambda _m, _given, output: seen.append((torch.is_autocast_enabled("cpu"), output.sample.dtype))
    )
    trainer.fit()
    assert seen == [(False, torch.float32)]


def test_adapters_without_an_average_for_targets(tiny_sd: Any, tmp_path: Path) -> None:
    """The target's adapters are the average of the student's; the weights under both are the teacher's, once in memory."""
    method = {"optim": {"lr": 1e-3}, "target": {"kind": "solver", "decay": 0.75}}
    trainer = trainer_for(run_values(tiny_sd, tmp_path, train={"student": {"kind": "lora", "rank": 2}}, method=method))
    student, target = trainer.roles["student"].tensors.parameters, trainer.roles["target"].tensors.parameters
    before = [p.detach().clone() for p in target]
    trainer.fit()
    assert any(not torch.equal(p, q) for p, q in zip(student, before, strict=True))
    for average, first, last in zip(target, before, student, strict=True):
        torch.testing.assert_close(average, 0.75 * first + 0.25 * last, rtol=1e-5, atol=1e-7)
    base = {id(p) for p in trainer.teacher.denoiser.net.parameters()}
    for name in ("student", "target"):
        role = trainer.roles[name]
        assert {id(p) for p in role.net.parameters()} - {id(p) for p in role.tensors.parameters} == base
    assert not trainer.roles["target"].net.training and not trainer.roles["teacher"].net.training


@pytest.mark.parametrize("whose", ["teacher", "adapters"])
def test_online_target_with_other_dropout_masks(whose: str, tiny_sd: Any) -> None:
    """Dropout need not come from the method's own key: the teacher's network may have it, and adapters."""
    teacher = load_teacher(str(tiny_sd))
    if whose == "adapters":
        teacher.students.adapt(LoraConfig(rank=2, dropout=0.3))
    else:
        set_dropout(teacher.denoiser, 0.3)
    method = consistency(config(target_decay=None, guidance_range=None), teacher)
    nets = {name: role.net for name, role in method.roles().items()}
    dropped: list[Tensor] = []
    layer = next(m for m in nets["student"].modules() if isinstance(m, nn.Dropout) and m.p == 0.3)
    layer.register_forward_hook(lambda _m, given, output: dropped.append((output == 0) & (given[0] != 0)))
    x0 = torch.randn(4, *teacher.latent_shape)
    batch = Batch(4, teacher.condition(["a"] * 4), teacher.null_condition(4), torch.device("cpu"), latents=x0)
    method.loss(nets, batch, index=INDEX)
    assert len(dropped) == 2 and dropped[0].any() and torch.equal(*dropped)


# The whole ----------------------------------------------------------------------------------------------------------------


class PointMass(nn.Module):
    """The exact networks for data that are one image m, where x_t = alpha m + sigma eps determines eps.

    As a teacher it predicts x0 = m. As a student it predicts what c_skip and c_out turn into the state at t = 0.
    """

    def __init__(self, schedule: VariancePreserving, mean: Tensor, student: bool) -> None:
        super().__init__()
        self.schedule, self.mean, self.student = schedule, mean, student

    def forward(self, x_t: Tensor, t: Tensor, cond: Any, guidance_scale: Tensor | None = None) -> Prediction:
        alpha, sigma = (v.view(-1, 1, 1, 1) for v in self.schedule(t))
        eps = (x_t - alpha * self.mean) / sigma
        x0 = self.mean.expand_as(x_t)
        if self.student:
            end = add_noise(self.schedule, x0, eps, torch.zeros_like(t))
            c_skip, c_out = (v.view(-1, 1, 1, 1) for v in boundary_scalings(t, 10.0))
            x0 = torch.where(c_out > 0, (end - c_skip * x_t) / c_out.clamp_min(1e-9), 0)
        return Prediction(x0, eps)


def test_a_perfect_student_has_no_loss(tiny_sd: Any) -> None:
    """The teacher's ODE is straight for a point mass, so its steps are exact and the consistency function is known."""
    turn = Turn(str(tiny_sd))
    method = consistency(config(target_decay=None, guidance_range=None), turn.teacher)
    schedule, mean = VariancePreserving(turn.alphas), turn.x0[:1]
    batch = Batch(50, {}, {}, torch.device("cpu"), latents=mean.expand(50, -1, -1, -1))
    nets = {"teacher": PointMass(schedule, mean, False), "student": PointMass(schedule, mean, True)}
    noise = torch.randn(batch.x0.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert method.loss(nets, batch, index=torch.arange(50), noise=noise).losses["consistency"].item() < 1e-20


def test_an_iteration_costs_six_forwards(tiny_sd: Any) -> None:
    """Student 1 and 2 for its backward, target 1, teacher 2: nothing is evaluated twice."""
    turn = Turn(str(tiny_sd))
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        turn.nets["teacher"](turn.x0, T, turn.batch.cond)
    with FlopCounterMode(display=False) as whole:
        turn.again().backward()
    assert whole.get_total_flops() / forward.get_total_flops() == pytest.approx(6, abs=0.1)


# Around the loss ----------------------------------------------------------------------------------------------------------


def test_clipping_that_clips_nothing(tiny_sd: Any, tmp_path: Path) -> None:
    """AdamW hides the scale of gradients from the weights; its first moment shows what the optimizer was given."""
    trainer = trainer_for(run_values(tiny_sd, tmp_path, method={"optim": {"lr": 1e-4, "max_grad_norm": 1e-3}}))
    trainer.fit()
    moments = load_file(tmp_path / "checkpoints" / "1" / "student_optimizer.safetensors")
    first = torch.cat([v.flatten() for k, v in moments.items() if k.endswith("exp_avg")])
    assert first.norm().item() / (1 - 0.9) == pytest.approx(1e-3, rel=1e-3)
    logged = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert logged["student_grad_norm"] > 2e-3


def test_weights_that_do_not_fit_go_unnoticed(tiny_sd: Any) -> None:
    """Loading the teacher's weights leaves nothing out but the new embedding, and says so if it would."""
    unet = load_teacher(str(tiny_sd)).denoiser.net
    unet.conv_in.register_parameter("bias", None)
    with pytest.raises(ValueError, match=r"missing .*conv_in\.bias"):
        with_guidance_embedding(unet)
