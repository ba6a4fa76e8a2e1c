"""Easy consistency tuning of a diffusion model (ECT)."""

from fewstep.diffusion.grids import log_levels
from fewstep.methods.consistency import build
from fewstep.methods.consistency.endpoints import plain
from fewstep.methods.consistency.loss import Consistency, Parts, Stage
from fewstep.methods.consistency.method_settings import EctSettings
from fewstep.methods.consistency.points import ShrinkingGap
from fewstep.methods.consistency.settings import NoisedData


class ECT(Consistency):
    """Easy consistency tuning (Geng et al. 2024).

    Noise levels from a log-normal; the target's level r follows from t, and comes nearer in stages (eq. 12 and 13), from clean
    data on, where the loss is the diffusion model's; x_r has the noise of x_t; the target is the student itself, with the same
    dropout; weight 1 / (t - r); norm of the difference.

    Departures: levels are at whole timesteps of the teacher; x_r can be the teacher's step (target `solver`).
    """

    name = "ect"
    paper = "Geng et al. 2024, Easy Consistency Tuning, arXiv 2406.14548"

    config: EctSettings

    def compose(self) -> tuple[Stage, ...]:
        c, teacher = self.config, self.teacher
        points = ShrinkingGap(log_levels(teacher.schedule, teacher.num_train_timesteps), c.gap)
        parts = Parts(
            states=self.make.states(NoisedData(lognormal=c.lognormal), points, c.target),
            target=self.make.target(c.target, plain, may_be_clean=True),
            endpoint=plain,
            weight=build.weight(teacher, c.weighting),
            distance=build.distance(teacher, c.distance),
        )
        return (Stage(parts),)
