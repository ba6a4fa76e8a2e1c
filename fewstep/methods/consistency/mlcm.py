"""Multistep latent consistency models (MLCM; in its later version TLCM): stages of ever fewer phases, without images."""

from fewstep.methods.consistency import build
from fewstep.methods.consistency.endpoints import PhaseEnd, plain
from fewstep.methods.consistency.loss import Parts, Stage
from fewstep.methods.consistency.method_settings import MlcmSettings, MlcmStage
from fewstep.methods.consistency.phased import Phased
from fewstep.methods.consistency.points import even_points


class MLCM(Phased):
    """Multistep latent consistency distillation (Xie et al. 2024).

    Stage 1: consistency within 8 phases, at states of the teacher's own trajectories from noise (algorithm 1, states
    `sampled_trajectories`), one guided step of the teacher to x_s; the student itself as target, without guidance input. Then
    fewer phases; then (TLCM's stage 2) x0 of the whole trajectory at the 8 milestones, from the student's own noised samples,
    several steps of the teacher to x_s; then a reward.

    Departures: points are on a grid; shared trajectories by default, whose states cost no evaluation; no latent LPIPS.
    """

    name = "mlcm"
    paper = "Xie et al. 2024, MLCM, arXiv 2406.05768"

    config: MlcmSettings

    def compose(self) -> tuple[Stage, ...]:
        self.make.renoises, self.last_phases = not self.jumps, self.config.stages[-1].phases or 1
        stages, start = list[Stage](), 0
        for number, stage in enumerate(self.config.stages):
            stages.append(Stage(self._parts(stage, f"stages[{number}].points"), start, stage.lr))
            start += stage.iterations or 0
        return tuple(stages)

    def _parts(self, stage: MlcmStage, key: str) -> Parts:
        c, make, count = self.config, self.make, stage.points or self.config.points
        points = even_points(count, self.teacher, key) if stage.phases is None else self.points(stage.phases, count)
        endpoint = plain if stage.phases is None else PhaseEnd(self.teacher.schedule)
        return Parts(
            states=make.states(stage.states or c.states, points, c.target, stage.steps_per_point),
            target=make.target(c.target, endpoint, stage.steps_per_point),
            endpoint=endpoint,
            weight=build.weight(self.teacher, "none"),
            distance=build.distance(self.teacher, c.distance),
            terms=make.reward(c.reward, stage.reward_weight),
        )
