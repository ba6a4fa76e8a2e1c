"""Phased consistency models (PCM)."""

from fewstep.methods.base import require_guidable
from fewstep.methods.consistency import build
from fewstep.methods.consistency.endpoints import PhaseEnd
from fewstep.methods.consistency.loss import Parts, Stage
from fewstep.methods.consistency.method_settings import PcmSettings
from fewstep.methods.consistency.phased import Phased
from fewstep.methods.consistency.terms import AdversarialTerm
from fewstep.teachers.students import StudentGuidance


class PCM(Phased):
    """Phased consistency (Wang et al. 2024).

    The trajectory is cut into phases; f is the DDIM jump to the end of the phase of x_t, the identity there (their eq. 8); x_s by
    one DDIM step, guided by `guidance` or, with `null_share`, not at all; the target is the student itself; an adversarial loss
    compares both ends with more noise on them.

    Departures: phases end where the stock sampler's steps do; noise is added by the exact kernel; states can be along the
    teacher's trajectories.
    """

    name = "pcm"
    paper = "Wang et al. 2024, Phased Consistency Models, arXiv 2405.18407"

    config: PcmSettings

    def compose(self) -> tuple[Stage, ...]:
        c, make = self.config, self.make
        if c.null_share is not None:
            require_guidable(self.teacher, "null_share", "null")
        self.student_guidance, self.last_phases = StudentGuidance(by_caller=c.null_share is not None), c.phases
        make.null_share, make.renoises = c.null_share, not self.jumps
        points, endpoint = self.points(c.phases, c.points), PhaseEnd(self.teacher.schedule)
        parts = Parts(
            states=make.states(c.states, points, c.target),
            target=make.target(c.target, endpoint),
            endpoint=endpoint,
            weight=build.weight(self.teacher, "none"),
            distance=build.distance(self.teacher, c.distance),
            terms=(AdversarialTerm(self.teacher, c.adversarial, c.phases),) if c.adversarial else (),
        )
        return (Stage(parts),)
