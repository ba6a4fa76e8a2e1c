"""Training states: noised images, or states along trajectories of the teacher or the student, from noise."""

from dataclasses import dataclass, replace

import torch

from fewstep.diffusion.grids import between, even_steps, lognormal_index, milestone_timesteps
from fewstep.diffusion.guidance import GuidedDenoiser, unguided
from fewstep.diffusion.prediction import Denoise, Prediction, add_noise, ode_step
from fewstep.diffusion.rollout import Move, ragged_rollout, rollout
from fewstep.diffusion.schedule import Schedule, like, noise_level
from fewstep.diffusion.shapes import Counts, GridTimes, Samples, Scales, Times
from fewstep.diffusion.solvers import Rule, solve
from fewstep.errors import FewstepError
from fewstep.methods.base import Batch, Networks, Preparation
from fewstep.methods.consistency import settings
from fewstep.methods.consistency.points import Points
from fewstep.methods.consistency.pool import Pool
from fewstep.methods.noisy_batch import NoisyBatch
from fewstep.methods.trajectories import Trajectories, TrajectorySettings
from fewstep.teachers.base import Teacher
from fewstep.teachers.denoiser import Cond


@dataclass(frozen=True)
class Given:
    """Draws that a caller of the loss fixes; None = drawn.

    index: positions in the grid. noise: like x0. guidance_scale: 1 = none.
    """

    index: Counts | None = None
    noise: Samples | None = None
    guidance_scale: Scales | None = None


@dataclass(frozen=True)
class State:
    """B states of the loss.

    Attributes:
        at: x_t.
        s, end: timesteps of the target and of the end.
        fresh: the batch's own noise, conditions and scales; trajectories may be of earlier ones.
        x_s: where the target is asked for, like x_t, if it is known with the state.
    """

    at: NoisyBatch
    s: Times
    end: Times
    fresh: NoisyBatch
    x_s: Samples | None = None


@dataclass(frozen=True)
class Draw:
    """Noise, grid positions, guidance scales and conditions: what all states begin with, drawn in this order.

    Attributes:
        guidance: range of scales; None = no guidance.
        lognormal: mean and deviation of the log noise level; None = uniform over the points.
        null_share: share of samples whose condition becomes the null one; None = none.
    """

    teacher: Teacher
    points: Points
    guidance: tuple[float, float] | None
    lognormal: tuple[float, float] | None = None
    null_share: float | None = None

    def __call__(self, batch: Batch, given: Given, noisiest: bool = False) -> tuple[Counts, NoisyBatch]:
        """Positions, of the noisiest point if asked, and noise at their timesteps."""
        index, noise, scale = self._index(batch, given.index, noisiest), given.noise, given.guidance_scale
        if noise is None:
            noise = torch.randn(batch.size, *self.teacher.latent_shape, device=batch.device)
        if scale is None and self.guidance is not None:
            low, high = self.guidance
            scale = low + (high - low) * torch.rand(batch.size, device=batch.device)
        t = self.points.t.to(batch.device)[index]
        return index, NoisyBatch(noise, t, self._conditions(batch), scale)

    def _index(self, batch: Batch, index: Counts | None, noisiest: bool) -> Counts:
        n, device = len(self.points.t), batch.device
        if noisiest:
            return torch.full((batch.size,), n - 1, device=device)
        if index is not None:
            return index
        if self.lognormal is not None:
            levels = noise_level(self.teacher.schedule, self.points.t).log().to(device)
            return lognormal_index(levels, batch.size, *self.lognormal)
        return torch.randint(n, (batch.size,), device=device)

    def _conditions(self, batch: Batch) -> Cond:
        if self.null_share is None:
            return batch.cond
        empty = torch.rand(batch.size, device=batch.device) < self.null_share
        return {key: torch.where(like(empty, v).bool(), batch.uncond[key], v) for key, v in batch.cond.items()}


class States:
    """Source of training states. Called without gradient."""

    needs_images = False

    def __init__(self, draw: Draw) -> None:
        self.draw, self.schedule = draw, draw.teacher.schedule

    def __call__(self, nets: Networks, batch: Batch, given: Given) -> State:
        raise NotImplementedError

    def move(self, state: State, first: Prediction | None, x_s: Samples) -> None:
        """Called after the target's x_s is known, and the teacher's prediction at x_t (None = it was not called)."""

    def prepare(self, at: Preparation) -> None:
        """Called once before the first iteration."""

    def _state(self, at: NoisyBatch, index: Counts, batch: Batch, fresh: NoisyBatch) -> State:
        points = self.draw.points.at(index, batch.iteration)
        return State(replace(at, t=points.t), points.s, points.end, fresh)


class NoisedData(States):
    """Noised images."""

    needs_images = True

    def __call__(self, nets: Networks, batch: Batch, given: Given) -> State:
        index, fresh = self.draw(batch, given)
        return self._state(fresh.with_x(add_noise(self.schedule, batch.x0, fresh.x, fresh.t)), index, batch, fresh)


class SharedTrajectories(States):
    """A pool of trajectories: the teacher's prediction that gives the loss its target moves them on by a segment."""

    def __init__(self, draw: Draw, pool: Pool) -> None:
        super().__init__(draw)
        self.pool = pool

    def __call__(self, nets: Networks, batch: Batch, given: Given) -> State:
        _, fresh = self.draw(batch, given, noisiest=True)
        denoise = fresh.guided(nets["teacher"], batch.uncond)

        def advance(x: Samples, rows: Counts, before: Counts, after: Counts) -> Samples:
            return self._advance(denoise.rows(rows), x, before, after)

        held = self.pool.draw(advance, self.draw.points.t, fresh)
        return self._state(held, self.pool.index, batch, fresh)

    def move(self, state: State, first: Prediction | None, x_s: Samples) -> None:
        assert first is not None  # targets of such states are the solver's
        t = self.draw.points.t.to(x_s.device)
        self.pool.move(lambda index: ode_step(self.schedule, first, t[index]), state.fresh)

    def _advance(self, denoise: Denoise, x: Samples, before: Counts, after: Counts) -> Samples:
        t = self.draw.points.t.to(x.device)
        return ode_step(self.schedule, denoise(x, t[before]), t[after])


class SolverTrajectories(SharedTrajectories):
    """A pool of trajectories through every point of the grid: the solver's x_s is the next state."""

    def __init__(self, draw: Draw, pool: Pool, rule: Rule, steps: int) -> None:
        super().__init__(draw, pool)
        self.rule, self.steps = rule, steps

    def move(self, state: State, first: Prediction | None, x_s: Samples) -> None:
        self.pool.move(lambda _: x_s, state.fresh)

    def _advance(self, denoise: Denoise, x: Samples, before: Counts, after: Counts) -> Samples:
        points = self.draw.points.at(before, 0)
        return solve(denoise, self.schedule, x, even_steps(points.t, points.s, self.steps), self.rule)


class SampledTrajectories(States):
    """A trajectory of its own from noise for every state (MLCM, algorithm 1).

    A state in the s-th of M segments from the clean end takes M - s equal steps; pure noise itself takes none.
    """

    def __init__(self, draw: Draw, segments: int) -> None:
        super().__init__(draw)
        self.segments = segments

    def __call__(self, nets: Networks, batch: Batch, given: Given) -> State:
        index, fresh = self.draw(batch, given)
        x = self.roll(fresh.guided(nets["teacher"], batch.uncond), index, fresh)
        return self._state(fresh.with_x(x), index, batch, fresh)

    def roll(self, denoise: GuidedDenoiser, index: Counts, fresh: NoisyBatch) -> Samples:
        """States at positions `index` from the noise of `fresh`."""
        n, top = len(self.draw.points.t), self.draw.points.t[-1]
        steps = torch.where(index == n - 1, 0, self.segments - index * self.segments // n)

        def step(x: Samples, on: Counts, i: int) -> Samples:
            now, after = (between(top, fresh.t[on], (i + j) / steps[on]) for j in (0, 1))
            return ode_step(self.schedule, denoise.rows(on)(x, now), after)

        return ragged_rollout(step, fresh.x, steps)


class StoredTrajectories(States):
    """States of trajectories that the teacher has drawn before training, each with a later one.

    Every state is used again and again, as the teacher is frozen; so an accurate solver can be used, and training never
    calls the teacher.

    skip: points from a state to x_s; None = to the trajectory's sample.
    """

    def __init__(self, draw: Draw, stored: settings.StoredTrajectories, skip: int | None, key: str = "states") -> None:
        super().__init__(draw)
        teacher, points = draw.teacher, tuple(draw.points.t.flip(0).tolist())
        try:
            times = milestone_timesteps(points, stored.substeps, teacher.num_train_timesteps)
        except FewstepError as e:
            raise FewstepError(f"method.{key}.substeps", e.found, e.expected) from None
        scales = draw.guidance or (1.0, 1.0)
        self.settings = TrajectorySettings(stored.count, stored.batch_size, times, points, stored.solver, scales)
        self.skip = skip
        self.stored: Trajectories | None = None

    def __call__(self, nets: Networks, batch: Batch, given: Given) -> State:
        if self.stored is None:
            raise RuntimeError("trajectories: found none; expected those that prepare draws. Call prepare first")
        index, fresh = self.draw(batch, given)
        rows, cond = self.stored.pick(batch.size, self.draw.teacher)
        last, device = self.stored.x.shape[1] - 1, batch.device
        place = last - 1 - index.cpu()  # kept from the noisiest down, the sample last
        there = torch.full_like(place, last) if self.skip is None else (place + self.skip).clamp_max(last)
        x, x_s = self.stored.x[rows, place], self.stored.x[rows, there]
        scale = None if fresh.guidance_scale is None else self.stored.scale[rows].to(device)
        at = NoisyBatch(x.to(device), fresh.t, cond, scale)
        return replace(self._state(at, index, batch, fresh), x_s=x_s.to(device))

    def prepare(self, at: Preparation) -> None:
        self.stored = at.trajectories(self.draw.teacher, "trajectories", self.settings)


class StudentRollout(States):
    """Noised samples of the averaged student (Xie et al. 2024, TLCM's second stage).

    times: of its sampler's steps; move: from one to the next; embedded: whether it receives the guidance scale.
    """

    def __init__(self, draw: Draw, times: GridTimes, move: Move, embedded: bool) -> None:
        super().__init__(draw)
        self.times, self.sampler_move, self.embedded = times, move, embedded

    def __call__(self, nets: Networks, batch: Batch, given: Given) -> State:
        index, fresh = self.draw(batch, given)
        times = self.times.to(batch.device)
        x0 = averaged_student(nets, fresh, times, self.sampler_move, self.embedded, self.schedule).x0
        at = fresh.with_x(add_noise(self.schedule, x0, torch.randn_like(x0), fresh.t))
        return self._state(at, index, batch, fresh)


def averaged_student(
    nets: Networks, start: NoisyBatch, times: GridTimes, move: Move, embedded: bool, schedule: Schedule
) -> Prediction:
    """The averaged student's prediction at the last of `times`, after its own steps from the noise `start.x`."""
    denoise = unguided(nets["ema"], start.cond, start.guidance_scale if embedded else None)
    x = rollout(denoise, schedule, start.x, times, move)
    return denoise(x, times[-1].expand(len(x)))
