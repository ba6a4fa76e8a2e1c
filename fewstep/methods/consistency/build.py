"""Parts of a consistency loss from sections of settings, for one teacher: the dispatch of all unions."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from fewstep.diffusion.losses import sample_distance
from fewstep.diffusion.rollout import Move, jump, renoise
from fewstep.diffusion.shapes import GridTimes, PerSample, Samples
from fewstep.diffusion.solvers import RULES
from fewstep.methods.consistency import settings
from fewstep.methods.consistency.endpoints import Endpoint
from fewstep.methods.consistency.points import WEIGHTS, Points, Weight
from fewstep.methods.consistency.pool import Pool, Replay
from fewstep.methods.consistency.states import (
    Draw,
    NoisedData,
    SampledTrajectories,
    SharedTrajectories,
    SolverTrajectories,
    States,
    StoredTrajectories,
    StudentRollout,
)
from fewstep.methods.consistency.targets import Reach, SameNoise, SolverStep, Target, next_state
from fewstep.methods.consistency.terms import RewardTerm
from fewstep.methods.guidance_settings import GuidanceSettings
from fewstep.methods.guided_student import drawn_range, embeds
from fewstep.methods.perceptual import load_lpips
from fewstep.teachers.base import Teacher

AnyStates = (
    settings.NoisedData
    | settings.SharedTrajectories
    | settings.SolverTrajectories
    | settings.SampledTrajectories
    | settings.StoredTrajectories
    | settings.StudentRollout
)
AnyTarget = settings.SolverTarget | settings.SameNoise | settings.NextState
AnyDistance = settings.L2 | settings.PseudoHuber | settings.PseudoHuberSample | settings.Lpips
Distance = Callable[[Samples, Samples], PerSample]
"""Two batches to the distances of their samples."""


def distance(teacher: Teacher, chosen: AnyDistance) -> Distance:
    """The distance of the samples of two batches."""
    match chosen:
        case settings.Lpips():
            lpips, decode = load_lpips("distance", "pseudo_huber"), teacher.decode
            return lambda a, b: lpips(decode(a), decode(b))
        case settings.PseudoHuber() | settings.PseudoHuberSample():
            return partial(sample_distance, chosen.kind, c=chosen.c)
    return partial(sample_distance, "l2", c=0.0)


def skip(target: AnyTarget) -> int:
    """Points of the grid from a state to its target."""
    return target.skip if isinstance(target, settings.NextState) else 1


def weight(teacher: Teacher, chosen: settings.Weighting) -> Weight:
    return partial(WEIGHTS[chosen], teacher.schedule)


@dataclass
class Builder:
    """Makes the parts of a method's stages; trajectories that stages share are one.

    Attributes:
        sampled: timesteps of the student's sampler in a number of steps.
        renoises: whether that sampler adds fresh noise between steps.
        null_share: share of samples whose condition becomes the null one; None = none.
    """

    teacher: Teacher
    guidance: GuidanceSettings | None
    sampled: Callable[[int], GridTimes]
    renoises: bool = True
    null_share: float | None = None
    pool: Pool | None = field(default=None, init=False)

    def states(
        self, chosen: AnyStates, points: Points, target: AnyTarget, steps_per_point: int | None = None
    ) -> States:
        draw = partial(Draw, self.teacher, points, drawn_range(self.guidance), null_share=self.null_share)
        match chosen:
            case settings.NoisedData():
                return NoisedData(draw(chosen.lognormal))
            case settings.SharedTrajectories():
                return SharedTrajectories(draw(), self._pool(chosen.segments, chosen.replay))
            case settings.SolverTrajectories():
                assert isinstance(target, settings.SolverTarget)  # as the settings demand
                rule, steps = RULES[target.solver], steps_per_point or target.steps_per_point
                return SolverTrajectories(draw(), self._pool(None, chosen.replay), rule, steps)
            case settings.SampledTrajectories():
                return SampledTrajectories(draw(), chosen.segments)
            case settings.StoredTrajectories():
                skip = target.skip if isinstance(target, settings.NextState) else None
                return StoredTrajectories(draw(chosen.lognormal), chosen, skip)
        return StudentRollout(draw(), self.sampled(chosen.steps), self._move, embeds(self.guidance))

    def target(
        self, chosen: AnyTarget, endpoint: Endpoint, steps_per_point: int | None = None, may_be_clean: bool = False
    ) -> Target:
        """steps_per_point: in place of the target's own."""
        reach = self._reach(chosen, steps_per_point)
        return Target(
            reach, endpoint, "student" if chosen.decay is None else "target", embeds(self.guidance), may_be_clean
        )

    def reward(self, chosen: settings.Reward | None, weight: float | None = None) -> tuple[RewardTerm, ...]:
        """The reward's term; none without a reward or with weight 0. weight: in place of the reward's own."""
        if chosen is None or not (weight := chosen.weight if weight is None else weight):
            return ()
        times = self.sampled(chosen.steps)
        return (RewardTerm(self.teacher, chosen, weight, times, self._move, embeds(self.guidance)),)

    @property
    def _move(self) -> Move:
        return renoise if self.renoises else jump

    def _reach(self, chosen: AnyTarget, steps_per_point: int | None) -> Reach:
        match chosen:
            case settings.SolverTarget():
                steps = steps_per_point or chosen.steps_per_point
                return SolverStep(self.teacher.schedule, RULES[chosen.solver], steps)
            case settings.SameNoise():
                return SameNoise(self.teacher.schedule)
        return next_state

    def _pool(self, segments: int | None, replay: int) -> Pool:
        if self.pool is None:
            self.pool = Replay(segments, replay) if replay else Pool(segments)
        return self.pool
