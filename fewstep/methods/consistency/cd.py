"""Consistency models: consistency distillation and training on noise levels (CD, CT)."""

from fewstep.methods.consistency import build
from fewstep.methods.consistency.endpoints import whole_trajectory
from fewstep.methods.consistency.loss import Consistency, Parts, Stage
from fewstep.methods.consistency.method_settings import CdSettings
from fewstep.methods.consistency.points import FixedPoints, even_points, karras_points
from fewstep.methods.consistency.settings import Boundary, KarrasGrid


class CD(Consistency):
    """Consistency distillation (Song et al. 2023, algorithm 2).

    Noised images at Karras noise levels; x_s by one Heun step (eq. 6); target network = moving average (eq. 8); lambda(t) by
    `weighting`. With target `same_noise` it is consistency training (algorithm 3) on a fixed grid.

    Departures: levels are at whole timesteps of the teacher, and the sampler's timesteps are among them; f has LCM's c_skip and
    c_out on x0, or none, in place of EDM's; the teacher can be guided; the schedules of N and of the decay are not there.
    """

    name = "cd"
    paper = "Song et al. 2023, Consistency Models, arXiv 2303.01469"

    config: CdSettings

    def compose(self) -> tuple[Stage, ...]:
        c, make = self.config, self.make
        if isinstance(c.endpoint, Boundary):
            self.timestep_scaling = c.endpoint.timestep_scaling
        points, endpoint = self._points(), whole_trajectory(c.endpoint)
        parts = Parts(
            states=make.states(c.states, points, c.target),
            target=make.target(c.target, endpoint),
            endpoint=endpoint,
            weight=build.weight(self.teacher, c.weighting),
            distance=build.distance(self.teacher, c.distance),
        )
        return (Stage(parts),)

    def _points(self) -> FixedPoints:
        c = self.config
        if isinstance(c.grid, KarrasGrid):
            return karras_points(c.grid, self.teacher, self.sampled(c.steps))
        return even_points(c.grid.points, self.teacher, "grid.points", build.skip(c.target))
