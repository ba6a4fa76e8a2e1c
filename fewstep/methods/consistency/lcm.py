"""Latent consistency models: consistency distillation in latent space, with guidance (LCM)."""

from fewstep.methods.consistency import build
from fewstep.methods.consistency.endpoints import whole_trajectory
from fewstep.methods.consistency.loss import Consistency, Parts, Stage
from fewstep.methods.consistency.method_settings import LcmSettings
from fewstep.methods.consistency.points import even_points
from fewstep.methods.consistency.settings import Boundary


class LCM(Consistency):
    """Latent consistency distillation (Luo et al. 2023, section 4).

    Noised latents x_t at even timesteps; x_s by one guided DDIM step of `T / points` timesteps (skipping, eq. 14); the guidance
    scale is drawn and embedded (4.2); f = c_skip x + c_out x0 with boundary at t = 0; target network = moving average (eq. 16).
    With target `same_noise` it is latent consistency fine-tuning (4.4), without a teacher's step.

    Departures, each by a key: states on trajectories of the teacher, or of the student's own samples, in place of latents of
    images; x_s from stored trajectories; a reward (as Li et al. 2024, arXiv 2403.11027); x0 without c_skip and c_out.
    """

    name = "lcm"
    paper = "Luo et al. 2023, Latent Consistency Models, arXiv 2310.04378"

    config: LcmSettings

    def compose(self) -> tuple[Stage, ...]:
        c, make = self.config, self.make
        if isinstance(c.endpoint, Boundary):
            self.timestep_scaling = c.endpoint.timestep_scaling
        points = even_points(c.grid.points, self.teacher, "grid.points", build.skip(c.target))
        endpoint = whole_trajectory(c.endpoint)
        parts = Parts(
            states=make.states(c.states, points, c.target),
            target=make.target(c.target, endpoint),
            endpoint=endpoint,
            weight=build.weight(self.teacher, "none"),
            distance=build.distance(self.teacher, c.distance),
            terms=make.reward(c.reward),
        )
        return (Stage(parts),)
