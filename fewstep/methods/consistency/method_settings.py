"""Settings of the consistency methods cd, lcm, ect, pcm and mlcm: which parts each of them can have; imports no torch."""

from typing import Annotated, Literal

from annotated_types import Ge, Lt
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from fewstep.config import MethodConfig, OptimConfig, Strict
from fewstep.methods.consistency import settings as parts
from fewstep.methods.guidance_settings import GuidanceSettings

Share = Annotated[float, Ge(0), Lt(1)]
Sampling = Literal["renoise", "jump"]


class ConsistencySettings(MethodConfig):
    """The keys that all of them have."""

    optim: OptimConfig
    """Optimizer of the student."""
    steps: PositiveInt = 10
    """Largest number of network evaluations at inference."""
    guidance: GuidanceSettings | None = None
    """Guidance of the teacher's steps; null = none."""
    target: parts.Target = parts.SolverTarget()
    """The target: how x_s follows from x_t, and which network predicts there."""
    distance: parts.Distance = parts.L2()
    """Distance between student and target."""
    dropout: Share | None = None
    """Dropout of the student in training, the same in its target where that is the student; null = as the teacher has it."""

    @property
    def target_decay(self) -> float | None:
        """Decay of the target network; None = the student itself."""
        return self.target.decay

    @model_validator(mode="after")
    def _one_scale_a_step(self) -> "ConsistencySettings":
        scales = () if self.guidance is None else self.guidance.export_scales
        if len(scales) > 1 and len(scales) != self.steps:
            raise ValueError(
                f"guidance.export_scale: found {len(scales)} scales; expected one number or {self.steps}, one for each of steps"
            )
        return self


def check_target(states: Strict, target: Strict, guidance: object) -> None:
    """ValueError where a target has no x_s for the states, or guidance has no teacher's step to guide."""
    stored, following = isinstance(states, parts.StoredTrajectories), isinstance(target, parts.NextState)
    if stored and not following:
        raise ValueError(
            "target: found another kind than next_state with stored trajectories; expected next_state, whose state they hold. "
            "To train on their ends, use the method trajectory"
        )
    if following and not stored:
        raise ValueError(
            "target: found next_state without stored trajectories; expected states of kind stored_trajectories"
        )
    if isinstance(target, parts.SameNoise):
        if not isinstance(states, parts.NoisedData):
            raise ValueError(
                "target: found same_noise, which needs the image of x_t; expected states of kind noised_data"
            )
        if guidance is not None:
            raise ValueError(
                "guidance: found a range with target same_noise, which calls no teacher; expected null. Set guidance to null"
            )


def check_divides(steps: int, points: int, key: str, name: str = "steps") -> None:
    """ValueError where the points of an even grid are no multiple of the steps."""
    if points % steps:
        raise ValueError(f"{name}: found {steps}; expected a divisor of {key} ({points})")


def check_rollout(most: int, steps: int, key: str) -> None:
    """ValueError where the student has more steps in training than at inference."""
    if steps > most:
        raise ValueError(f"{key}: found {steps}; expected at most steps ({most})")


class CdSettings(ConsistencySettings):
    name: Literal["cd"] = "cd"
    """Consistency distillation, and training."""
    grid: parts.Grid = parts.KarrasGrid()
    """Points of the teacher's ODE grid."""
    states: Annotated[parts.NoisedData | parts.StoredTrajectories, Field(discriminator="kind")] = parts.NoisedData()
    """States at which the student is trained."""
    target: parts.Target = parts.SolverTarget(solver="heun")
    """The target: how x_s follows from x_t, and which network predicts there."""
    endpoint: parts.Endpoint = parts.Boundary()
    """The consistency function."""
    weighting: parts.Weighting = "none"
    """Weight of a sample's distance: 1, 1 over the gap in sigma, or (sigma^2 + 0.25) / (0.25 sigma^2)."""

    @model_validator(mode="after")
    def _fits(self) -> "CdSettings":
        check_target(self.states, self.target, self.guidance)
        if isinstance(self.grid, parts.EvenGrid):
            check_divides(self.steps, self.grid.points, "grid.points")
        elif isinstance(self.states, parts.StoredTrajectories):
            raise ValueError("grid: found karras with stored trajectories; expected even. Set grid.kind to even")
        return self


class LcmSettings(ConsistencySettings):
    name: Literal["lcm"] = "lcm"
    """Latent consistency distillation, and fine-tuning."""
    grid: parts.EvenGrid = parts.EvenGrid()
    """Points of the teacher's ODE grid; `steps` must divide their number, so that every step count lies on the grid."""
    states: parts.AllStates = parts.NoisedData()
    """States at which the student is trained."""
    target: parts.Target = parts.SolverTarget()
    """The target: how x_s follows from x_t, and which network predicts there."""
    endpoint: parts.Endpoint = parts.Boundary()
    """The consistency function."""
    guidance: GuidanceSettings | None = GuidanceSettings(range=(3.0, 15.0))
    """Guidance of the teacher's steps; null = none."""
    reward: parts.Reward | None = None
    """Reward on the student's own samples; null = none."""

    @model_validator(mode="after")
    def _fits(self) -> "LcmSettings":
        check_target(self.states, self.target, self.guidance)
        check_divides(self.steps, self.grid.points, "grid.points")
        if isinstance(self.states, parts.StudentRollout):
            check_rollout(self.steps, self.states.steps, "states.steps")
        if self.reward is not None:
            check_rollout(self.steps, self.reward.steps, "reward.steps")
        return self


class EctSettings(ConsistencySettings):
    name: Literal["ect"] = "ect"
    """Easy consistency tuning."""
    steps: PositiveInt = 2
    """Largest number of network evaluations at inference."""
    gap: parts.Gap
    """Gap between the noise levels of state and target, which shrinks in stages."""
    lognormal: parts.LogNormal | None = (-1.1, 2.0)
    """Mean and deviation of the log of the noise level sigma / alpha at t (P_mean, P_std); null = uniform over timesteps."""
    target: parts.StepTarget = parts.SameNoise()
    """The target: how x_s follows from x_t, and which network predicts there."""
    weighting: parts.Weighting = "inverse_gap"
    """Weight of a sample's distance: 1, 1 over the gap in sigma, or (sigma^2 + 0.25) / (0.25 sigma^2)."""
    distance: parts.Distance = parts.PseudoHuberSample(c=0.0)
    """Distance between student and target."""

    @model_validator(mode="after")
    def _fits(self) -> "EctSettings":
        check_target(parts.NoisedData(), self.target, self.guidance)
        return self


class PcmSettings(ConsistencySettings):
    name: Literal["pcm"] = "pcm"
    """Phased consistency."""
    steps: PositiveInt = 4
    """Largest number of network evaluations at inference."""
    phases: PositiveInt = 4
    """Pieces of the trajectory, each with an end of its own; they end where the sampler's steps do."""
    points: parts.GridSize = 40
    """Points of the teacher's ODE grid, even within phases; a multiple of `steps` and `phases`."""
    sampling: Sampling = "jump"
    """Between steps: the ODE's jumps, for which `steps` is `phases`; or fresh noise on x0, for any count up to `steps`."""
    states: parts.PhaseStates = parts.NoisedData()
    """States at which the student is trained."""
    target: parts.StepTarget = parts.SolverTarget(decay=None)
    """The target: how x_s follows from x_t, and which network predicts there."""
    null_share: Share | None = None
    """PCM without guidance in the teacher's step: share of samples whose condition is the null one. The exported student is
    then guided by its caller, negative prompts included. null = guidance as in `guidance`."""
    adversarial: parts.Adversarial | None = None
    """Adversarial loss on the ends of phases; null = none."""

    @model_validator(mode="after")
    def _fits(self) -> "PcmSettings":
        check_target(self.states, self.target, self.guidance)
        check_divides(self.steps, self.points, "points")
        check_divides(self.phases, self.points, "points", "phases")
        if self.sampling == "jump" and self.steps != self.phases:
            raise ValueError(f"steps: found {self.steps}; expected as many as phases ({self.phases}) for sampling jump")
        if self.null_share is not None and self.guidance is not None:
            raise ValueError(
                "null_share: found a number with guidance; expected null, or no guidance. Set guidance to null"
            )
        return self


class MlcmStage(Strict):
    """A stretch of the training; keys that are null are the method's."""

    iterations: PositiveInt | None = None
    """Iterations of this stage; null, for the last one only, = to the end of the run."""
    lr: PositiveFloat | None = None
    """Peak learning rate; null = the optimizer's."""
    phases: PositiveInt | None
    """Pieces of the trajectory, each with an end of its own; null = x0 of the whole trajectory."""
    points: parts.GridSize | None = None
    """Points of the teacher's ODE grid."""
    steps_per_point: PositiveInt | None = None
    """Steps of the guided teacher from one grid point to the next."""
    states: parts.StageStates | None = None
    """States at which the student is trained."""
    reward_weight: NonNegativeFloat | None = None
    """Weight of the reward; 0 = no reward in this stage."""


class MlcmSettings(ConsistencySettings):
    name: Literal["mlcm"] = "mlcm"
    """Multistep latent consistency."""
    steps: PositiveInt = 8
    """Largest number of network evaluations at inference; must divide the points of every stage."""
    stages: tuple[MlcmStage, ...] = (MlcmStage(phases=8),)
    """Stages one after the other, such as 8, 4, 2 phases, then x0 from the student's own samples."""
    points: parts.GridSize = 40
    """Points of the teacher's ODE grid, even within phases; a multiple of `steps` and `phases`."""
    states: parts.StageStates = parts.SharedTrajectories()
    """States at which the student is trained."""
    target: parts.StepTarget = parts.SolverTarget(decay=None)
    """The target: how x_s follows from x_t, and which network predicts there."""
    sampling: Sampling = "renoise"
    """Between steps: fresh noise on x0, for any count up to `steps`; or the ODE's jumps, for which `steps` is the most phases."""
    reward: parts.Reward | None = None
    """Reward on the student's own samples; null = none."""

    @model_validator(mode="after")
    def _fits(self) -> "MlcmSettings":
        if not self.stages:
            raise ValueError("stages: found none; expected at least one")
        for i, stage in enumerate(self.stages):
            self._check(f"stages[{i}]", stage, last=i == len(self.stages) - 1)
        if self.reward is not None:
            check_rollout(self.steps, self.reward.steps, "reward.steps")
        most = max(stage.phases or 1 for stage in self.stages)
        if self.sampling == "jump" and (self.stages[-1].phases is None or self.steps != most):
            raise ValueError(
                f"sampling: found jump with steps {self.steps}; expected phases in the last stage, at most {most}, as many "
                "as steps"
            )
        kept = {s for stage in self.stages if not isinstance(s := stage.states or self.states, parts.StudentRollout)}
        if len(kept - {parts.NoisedData()}) > 1:
            raise ValueError("stages: found trajectories of several kinds; expected one kind in all stages")
        return self

    def _check(self, key: str, stage: MlcmStage, last: bool) -> None:
        states, points = stage.states or self.states, stage.points or self.points
        if (stage.iterations is None) != last:
            raise ValueError(
                f"{key}.iterations: found null; expected a number in all stages but the last, which lasts to the end of the run"
            )
        check_target(states, self.target, self.guidance)
        check_divides(self.steps, points, f"{key}.points")
        check_divides(stage.phases or 1, points, f"{key}.points", f"{key}.phases")
        if isinstance(states, parts.StudentRollout):
            check_rollout(self.steps, states.steps, f"{key}.states.steps")
        if stage.reward_weight and self.reward is None:
            raise ValueError(
                f"{key}.reward_weight: found a weight; expected null without a reward. Set one, such as reward.name=clip@fashion"
            )
        if stage.steps_per_point is not None and not isinstance(self.target, parts.SolverTarget):
            raise ValueError(
                f"{key}.steps_per_point: found a number; expected null for any target but solver. Leave it out"
            )
