"""Consistency distillation (CD; Song et al. 2023); in latent space with guidance (LCM; Luo et al. 2023), in phases (PCM; Wang
et al. 2024; MLCM; Xie et al. 2024); and tuning of a diffusion model without a teacher's step (ECT; Geng et al. 2024).

One loss. What differs between these is where its states come from (consistency_states), which grid and phases it has
(consistency_grid) or which noise levels (consistency_tuning), how x_s follows from x_t (consistency_solver), what the student
is consistent in, and how that changes during training (the stages of the config).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fewstep.diffusion.grids import Grid, even_grid, even_steps, karras_grid, log_levels, lognormal_index, phase_grid
from fewstep.diffusion.guidance import GuidedDenoiser, concatenate
from fewstep.diffusion.losses import discriminator_loss, generator_loss, sample_distance
from fewstep.diffusion.prediction import Prediction, add_noise, ode_step
from fewstep.diffusion.rollout import jump, renoise, rollout
from fewstep.diffusion.schedule import like, noise_level
from fewstep.diffusion.solvers import RULES, solve
from fewstep.methods.base import (
    NOTHING,
    Batch,
    Carry,
    Losses,
    Method,
    Networks,
    Preparation,
    Reward,
    Role,
    Step,
    StepOutput,
    require_guidable,
    require_guidance_by_step,
    require_live_guidance,
)
from fewstep.methods.consistency.adversarial import Ends, judge, new_discriminator, times_in_phase
from fewstep.methods.consistency.config import ConsistencyConfig, PlannedStage
from fewstep.methods.consistency.endpoints import boundary_scalings
from fewstep.methods.consistency.replay import Replay
from fewstep.methods.consistency.states import State, Trajectories, teacher_rollout
from fewstep.methods.consistency.stored import remembered, stored_settings
from fewstep.methods.consistency.tuning import gap_weights, tuned_timestep
from fewstep.methods.discriminator import named_layers
from fewstep.methods.distribution_matching.diagnostics import accuracies
from fewstep.methods.dropout import random_state, replayed, set_dropout
from fewstep.methods.perceptual import load_lpips
from fewstep.methods.trajectories import Trajectories as Stored
from fewstep.teachers.base import Teacher
from fewstep.teachers.denoiser import Cond, DenoiserLike, Scale

__all__ = ["Consistency", "ConsistencyConfig", "boundary_scalings"]


@dataclass(frozen=True)
class Stage:
    """A stage's settings and its grid."""

    plan: PlannedStage
    grid: Grid


class Consistency(Method):
    """The student maps every point of a trajectory of the guided teacher to its end, or to the end of its phase."""

    name = "consistency"
    paper = (
        "Luo et al. 2023, Latent Consistency Models, arXiv 2310.04378; Song et al. 2023, Consistency Models, arXiv "
        "2303.01469; Wang et al. 2024, Phased Consistency Models, arXiv 2405.18407; Xie et al. 2024, MLCM, arXiv 2406.05768; "
        "Geng et al. 2024, Easy Consistency Tuning, arXiv 2406.14548"
    )

    config: ConsistencyConfig

    def __init__(self, config: ConsistencyConfig, teacher: Teacher) -> None:
        super().__init__(config, teacher)
        if config.guidance_range is not None:
            require_guidable(teacher, "guidance_range", "null")
        if config.embedded and config.export_guidance_scale is None:
            require_live_guidance(teacher)
        if config.keep_guidance:
            require_guidable(teacher, "keep_guidance", "false")
        self.export_guidance_scale, self.keeps_guidance = self._folded_scale(), config.keep_guidance
        self.stages = tuple(Stage(plan, self._grid(plan)) for plan in config.plan)
        self.last_stage = self.stages[-1].plan.start
        self.needs_images = any(stage.plan.states == "noised_data" for stage in self.stages)
        segments = None if config.rollout == "solver" else config.rollout_segments
        self.trajectories = Replay(segments, config.replay) if config.replay else Trajectories(segments)
        self.stored: Stored | None = None
        self.stored_settings = None
        if config.stored is not None:
            scales = config.guidance_range or (1.0, 1.0)
            self.stored_settings = stored_settings(
                config.stored, self.stages[0].grid, teacher.num_train_timesteps, scales
            )
        self.reward: Reward | None = None
        self.distance = self._distance()
        self.levels = log_levels(teacher.schedule, teacher.num_train_timesteps)
        self.layers = named_layers(teacher, config.gan_layers, "method.gan_layers") if config.gan_weight else ()
        if config.rolls_out:
            self.own_timesteps = teacher.samplers.grid(self.scheduler(), config.student_steps)[:-1]

    def _folded_scale(self) -> Scale | None:
        scale = self.config.export_guidance_scale
        if not isinstance(scale, tuple):
            return scale
        require_guidance_by_step(self.teacher)
        times = self.teacher.samplers.grid(self.scheduler(), self.config.steps)[:-1].tolist()
        return dict(zip(times, scale, strict=True))

    def _grid(self, plan: PlannedStage) -> Grid:
        if plan.endpoint == "phase":
            jumps = self.teacher.samplers.grid(self.teacher.samplers.jump(plan.phases), plan.phases)
            try:
                return phase_grid(jumps, plan.solver_steps)
            except ValueError as error:
                raise ValueError(f"method.solver_steps: {error}") from None
        if self.config.tuning is not None:
            t = torch.arange(self.teacher.num_train_timesteps)
            return Grid(t, t - 1, torch.full_like(t, -1))
        if self.config.grid == "karras":
            met = self.teacher.samplers.grid(self.scheduler(), self.config.steps)[:-1]
            total, rho = self.teacher.num_train_timesteps, self.config.karras_rho
            try:
                return karras_grid(self.teacher.schedule, plan.solver_steps, total, met, rho)
            except ValueError as error:
                raise ValueError(f"method.grid: {error}; set it to even") from None
        if self.teacher.num_train_timesteps % plan.solver_steps:
            raise ValueError(
                f"method.solver_steps: {plan.solver_steps} does not divide the teacher's "
                f"{self.teacher.num_train_timesteps} timesteps, so its noisiest one would never be trained"
            )
        return even_grid(plan.solver_steps, self.teacher.num_train_timesteps)

    def _distance(self) -> Callable[[Tensor, Tensor], Tensor]:
        kind, c = self.config.distance, self.config.huber_c
        if kind == "lpips":
            lpips, decode = load_lpips("distance", "pseudo_huber"), self.teacher.decode
            return lambda a, b: lpips(decode(a), decode(b))
        return lambda a, b: sample_distance(kind, a, b, c)

    def roles(self) -> dict[str, Role]:
        c = self.config
        student = self.teacher.students.new(guidance_embedding=c.embedded)
        if c.dropout is not None:
            set_dropout(student, c.dropout)
        roles = {"teacher": Role(self.teacher.denoiser), "student": Role(student, optim=c.optim)}
        if c.target_decay is not None:  # never with target_step end
            roles["target"] = Role(student.clone(), follows="student", decay=c.target_decay)
        if c.gan_weight:
            roles["discriminator"] = Role(new_discriminator(self.teacher, self.layers), optim=c.gan_optim or c.optim)
        return roles

    def steps(self) -> tuple[Step, ...]:
        student = Step("student", self.loss, lr_scale=lambda i: self.stage(i).plan.lr / self.config.optim.lr)
        return (student, Step("discriminator", self.discriminator_loss)) if self.config.gan_weight else (student,)

    def stage(self, iteration: int) -> Stage:
        """The stage that an iteration belongs to."""
        return [stage for stage in self.stages if stage.plan.start <= iteration][-1]

    def scheduler(self):  # type: ignore[no-untyped-def]  # diffusers' class is not imported here
        if self.config.sampling == "jump":
            return self.teacher.samplers.jump(self.config.steps)
        return self.teacher.samplers.renoise(self.config.steps, self.config.timestep_scaling)

    def allowed_steps(self) -> tuple[int, ...]:
        """Re-noised samples are at home at every timestep of the grid, those of jumps only where a phase has begun."""
        if self.config.sampling == "jump":
            return tuple(range(self.stages[-1].plan.phases, self.config.steps + 1))
        return self.teacher.samplers.counts(self.config.steps)

    def prepare(self, at: Preparation) -> None:
        if self.config.reward is not None:
            try:
                self.reward = at.load_reward(self.config.reward)
            except ValueError as error:
                raise ValueError(f"method.reward: {error}") from None
        if self.stored_settings is not None:
            self.stored = at.trajectories(self.teacher, "trajectories", self.stored_settings)

    def state(self) -> dict[str, Tensor]:
        return self.trajectories.state()

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.trajectories.load_state(tensors)

    # The loss ---------------------------------------------------------------------------------------------------------

    def loss(
        self,
        nets: Networks,
        batch: Batch,
        carry: Carry = NOTHING,
        *,
        index: Tensor | None = None,
        noise: Tensor | None = None,
        guidance_scale: Tensor | None = None,
    ) -> StepOutput:
        """Consistency loss (Luo et al. 2023, eq. 16 with skipping): distance of f(x_t, t) to f_target(x_s, s).

        Args:
            index: positions in the solver's grid, [B]; drawn if None. Shared trajectories have their own.
            noise: like x0, [B, C, h, w], of x_t, or that a trajectory starts from; drawn if None.
            guidance_scale: 1 = none, [B]; drawn from guidance_range if None.
        """
        c, stage = self.config, self.stage(batch.iteration)
        fresh = self._fresh(stage, batch, index, noise, guidance_scale)
        with torch.no_grad():
            at = self._states(stage, nets, batch, fresh)
        grid = stage.grid.to(batch.device).at(at.index)
        if c.tuning is not None:
            s = tuned_timestep(self.levels.to(batch.device), grid.t, batch.iteration, c.tuning)
            grid = grid._replace(s=s)
        told = at.scale if c.embedded else None
        rewarded = self._rewarded(nets, batch, fresh) if stage.plan.reward_weight else None
        # The student's dropout, whether its teacher's, its adapters' or our key's: a target that is the student has it too.
        masks = random_state(batch.device) if c.target_decay is None else None
        student, sample = self._student(nets["student"], at, grid.t, rewarded)
        with torch.no_grad():
            if c.target_step == "same_noise":
                x_s = add_noise(self.teacher.schedule, batch.x0, fresh.x, grid.s)
            elif at.x_s is not None:
                x_s = at.x_s
            else:
                first = self._teacher(nets, batch, at, grid.t)
                x_s = self._solve(stage, nets, batch, at, grid, first)
                if stage.plan.states == "trajectory" and c.rollout != "sample":
                    self._move(stage, first, x_s, fresh)
            target = x_s
            # The end itself needs no network, and early in tuning most targets are the data.
            if c.target_step != "end" and (c.tuning is None or bool((grid.s > grid.end).any())):
                target_net = nets["student"] if c.target_decay is None else nets["target"]
                with replayed(masks, batch.device):
                    there = target_net(x_s, grid.s.clamp_min(0), at.cond, told)
                target = self._endpoint(stage, there, x_s, grid.s, grid.end)
        prediction = self._endpoint(stage, student, at.x, grid.t, grid.end)
        logs: dict[str, Tensor] = {}
        if len(self.stages) > 1:
            logs["stage"] = torch.tensor(float(self.stages.index(stage)))
        weight = gap_weights(c.weighting, self.teacher.schedule, grid.t, grid.s).to(prediction.dtype)
        losses: Losses = {"consistency": (weight * self.distance(prediction, target)).mean()}
        if sample is not None:
            displeasure, logs["reward_value"] = self._displeasure(batch, sample.x0)
            losses["reward"] = stage.plan.reward_weight * displeasure
        left: dict[str, Tensor] = {}
        if c.gan_weight:
            ends = Ends(prediction, target, grid.end, at.cond)
            left = ends.carried()
            heard = judge(self.teacher, self.layers, ends.fake, ends, self._heard_at(stage, ends))
            logits = nets["discriminator"](heard)
            losses["gan"] = c.gan_weight * generator_loss(c.gan_loss, logits)
        return StepOutput(losses, logs, carry=left)

    def discriminator_loss(self, nets: Networks, batch: Batch, carry: Carry) -> StepOutput:
        """Telling the student's ends of phases from the targets, in one call."""
        stage, ends = self.stage(batch.iteration), Ends.from_carried(carry)
        t = self._heard_at(stage, ends)
        with torch.no_grad():
            given = [judge(self.teacher, self.layers, x, ends, t) for x in (ends.real, ends.fake)]
        on_real, on_fake = nets["discriminator"]([torch.cat(pair) for pair in zip(*given, strict=True)]).chunk(2)
        loss = discriminator_loss(self.config.gan_loss, on_real, on_fake)
        return StepOutput({"discriminator": loss}, accuracies(on_real, on_fake))

    def _heard_at(self, stage: Stage, ends: Ends) -> Tensor:
        total = self.teacher.num_train_timesteps
        return times_in_phase(ends.t, total // stage.plan.phases, total)

    def _student(
        self, net: DenoiserLike, at: State, t: Tensor, more: tuple[State, Tensor] | None
    ) -> tuple[Prediction, Prediction | None]:
        """The student at states and their timesteps; with `more` of both, as distributed training wants it, in one call."""
        embedded = self.config.embedded
        if more is None:
            return net(at.x, t, at.cond, at.scale if embedded else None), None
        (own, u), n = more, len(at.x)
        scale = (
            torch.cat([at.scale, own.scale]) if embedded and at.scale is not None and own.scale is not None else None
        )
        both = net(torch.cat([at.x, own.x]), torch.cat([t, u]), concatenate(at.cond, own.cond), scale)
        return Prediction(*(v[:n] for v in both)), Prediction(*(v[n:] for v in both))

    def _rewarded(self, nets: Networks, batch: Batch, fresh: State) -> tuple[State, Tensor]:
        """Inputs of one step of the student's sampler, and their timesteps: only through this step the reward teaches."""
        rows = torch.arange(min(self.config.reward_samples, batch.size), device=batch.device)
        noise = torch.randn(len(rows), *self.teacher.latent_shape, device=batch.device)
        start = replace(fresh, x=noise).rows(rows)
        # The same on every process, which else would wait for the longest.
        stop = int(torch.randint(len(self.own_timesteps), (), generator=batch.generator))
        times = self.own_timesteps[: stop + 1].to(batch.device)
        return replace(start, x=self._rollout(nets, start, times)), times[-1].expand(len(rows))

    def _displeasure(self, batch: Batch, x0: Tensor) -> tuple[Tensor, Tensor]:
        """What the reward is short of its ceiling, or less the reward; and its mean, for the log. Gradients go through decoder
        and reward."""
        if self.reward is None:
            raise ValueError("the reward is not there yet: call prepare first")
        images = (self.teacher.decode(x0) / 2 + 0.5).clamp(0, 1)
        prompts = list(batch.raw[: len(x0)]) if self.teacher.conditions == "prompt" else None
        reward, ceiling = self.reward(images, prompts), self.config.reward_ceiling
        displeasure = -reward.mean() if ceiling is None else (ceiling - reward).relu().mean()
        return displeasure, reward.detach().mean()

    def _rollout(self, nets: Networks, start: State, times: Tensor) -> Tensor:
        told = start.scale if self.config.embedded else None
        return rollout(
            lambda x, t: nets["ema"](x, t, start.cond, told), self.teacher.schedule, start.x, times,
            renoise if self.config.sampling == "renoise" else jump,
        )  # fmt: skip

    def _fresh(
        self, stage: Stage, batch: Batch, index: Tensor | None, noise: Tensor | None, scale: Tensor | None
    ) -> State:
        """Noise, grid positions and guidance scales, with the batch's conditions."""
        n, device = len(stage.grid.t), batch.device
        if stage.plan.states == "trajectory" and self.config.rollout in ("shared", "solver"):
            index = torch.full((batch.size,), n - 1, device=device)
        if index is None and self.config.lognormal is not None:
            levels = noise_level(self.teacher.schedule, stage.grid.t).log().to(device)
            index = lognormal_index(levels, batch.size, *self.config.lognormal)
        if index is None:
            index = torch.randint(n, (batch.size,), device=device)
        if noise is None:
            noise = torch.randn(batch.size, *self.teacher.latent_shape, device=device)
        if scale is None and self.config.guidance_range is not None:
            low, high = self.config.guidance_range
            scale = low + (high - low) * torch.rand(batch.size, device=device)
        return State(noise, index, self._conditions(batch), scale)

    def _conditions(self, batch: Batch) -> Cond:
        """The batch's; those of a share null_share without, where the student is to be guided."""
        if not self.config.keep_guidance:
            return batch.cond
        empty = torch.rand(batch.size, device=batch.device) < self.config.null_share
        return {key: torch.where(like(empty, v).bool(), batch.uncond[key], v) for key, v in batch.cond.items()}

    def _states(self, stage: Stage, nets: Networks, batch: Batch, fresh: State) -> State:
        schedule, grid = self.teacher.schedule, stage.grid
        t = grid.t.to(batch.device)[fresh.index]
        match stage.plan.states:
            case "noised_data":
                return replace(fresh, x=add_noise(schedule, batch.x0, fresh.x, t))
            case "student_rollout":
                told, times = fresh.scale if self.config.embedded else None, self.own_timesteps.to(batch.device)
                x = self._rollout(nets, fresh, times)
                x0 = nets["ema"](x, times[-1].expand(batch.size), fresh.cond, told).x0
                return replace(fresh, x=add_noise(schedule, x0, torch.randn_like(x0), t))

        if self.config.rollout == "stored":
            if self.stored is None:
                raise ValueError("the teacher's trajectories are not there yet: call prepare first")
            return remembered(self.stored, self.teacher, fresh, to_end=self.config.target_step == "end")

        def answer(at: State, times: Tensor) -> Prediction:
            return self._teacher(nets, batch, at, times)

        if self.config.rollout == "sample":
            segments = self.config.rollout_segments
            return replace(fresh, x=teacher_rollout(answer, schedule, grid.t, segments, fresh))
        points = grid.to(batch.device)

        def step(at: State, index: Tensor) -> Tensor:
            first = answer(at, points.t[at.index])
            if self.config.rollout == "solver":
                return self._solve(stage, nets, batch, at, points.at(at.index), first)
            return ode_step(schedule, first, points.t[index])

        return self.trajectories.draw(step, grid.t, fresh)

    def _move(self, stage: Stage, first: Prediction, x_s: Tensor, fresh: State) -> None:
        """Shared trajectories go on by what the loss has of the teacher: its prediction at x_t, or its solver's x_s."""
        t = stage.grid.t.to(x_s.device)
        jump = partial(ode_step, self.teacher.schedule, first)
        self.trajectories.move(lambda index: x_s if self.config.rollout == "solver" else jump(t[index]), fresh)

    def _teacher(self, nets: Networks, batch: Batch, at: State, t: Tensor) -> Prediction:
        return self._denoiser(nets, batch, at)(at.x, t)

    def _denoiser(self, nets: Networks, batch: Batch, at: State) -> GuidedDenoiser:
        uncond = {key: value[: len(at.x)] for key, value in batch.uncond.items()}
        return GuidedDenoiser(nets["teacher"], at.cond, uncond, at.scale)

    def _solve(self, stage: Stage, nets: Networks, batch: Batch, at: State, grid: Grid, p: Prediction) -> Tensor:
        """x_s by the teacher's steps from x_t, with its prediction there given."""

        times = even_steps(grid.t, grid.s, stage.plan.teacher_steps)
        denoise = self._denoiser(nets, batch, at)
        return solve(denoise, self.teacher.schedule, at.x, times, RULES[self.config.solver], p)

    def _endpoint(self, stage: Stage, p: Prediction, x: Tensor, t: Tensor, end: Tensor) -> Tensor:
        """What is consistent: f(x_t, t) [B, C, h, w]; x_t itself where t is the end, whatever the network says there."""
        match stage.plan.endpoint:
            case "x0":
                c_skip, c_out = (like(v, p.x0) for v in boundary_scalings(t, self.config.timestep_scaling))
                return c_skip * x + c_out * p.x0
            case "x0_plain":
                jump = p.x0
            case "phase":
                jump = ode_step(self.teacher.schedule, p, end)
        return torch.where(like(t == end, x).bool(), x.to(jump.dtype), jump)
