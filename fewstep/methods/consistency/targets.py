"""Targets: the state x_s, and the network whose prediction there is the target."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from fewstep.diffusion.grids import even_steps
from fewstep.diffusion.prediction import Prediction, add_noise
from fewstep.diffusion.schedule import Schedule
from fewstep.diffusion.shapes import Samples
from fewstep.diffusion.solvers import Rule, solve
from fewstep.methods.base import Batch, Networks
from fewstep.methods.consistency.endpoints import Endpoint
from fewstep.methods.consistency.states import State
from fewstep.methods.dropout import replayed


class Neighbour(NamedTuple):
    """x_s, and the teacher's prediction at x_t where it was called."""

    x_s: Samples
    first: Prediction | None


Reach = Callable[[Networks, Batch, State], Neighbour]


@dataclass(frozen=True)
class SolverStep:
    """x_s by the guided teacher's steps from x_t (distillation)."""

    schedule: Schedule
    rule: Rule
    steps: int

    def __call__(self, nets: Networks, batch: Batch, state: State) -> Neighbour:
        at = state.at
        denoise = at.guided(nets["teacher"], batch.uncond)
        first = denoise(at.x, at.t)
        times = even_steps(at.t, state.s, self.steps)
        return Neighbour(solve(denoise, self.schedule, at.x, times, self.rule, first), first)


@dataclass(frozen=True)
class SameNoise:
    """x_s of the image and noise of x_t (training)."""

    schedule: Schedule

    def __call__(self, nets: Networks, batch: Batch, state: State) -> Neighbour:
        return Neighbour(add_noise(self.schedule, batch.x0, state.fresh.x, state.s), None)


def next_state(nets: Networks, batch: Batch, state: State) -> Neighbour:
    """x_s that was stored with x_t."""
    if state.x_s is None:
        raise RuntimeError("states: found none of the target; expected stored trajectories")
    return Neighbour(state.x_s, None)


@dataclass(frozen=True)
class Target:
    """f(x_s, s) of a target network, without gradient.

    Attributes:
        reach: x_s from x_t.
        endpoint: f of a prediction.
        network: the moving average, or the student itself, with the same dropout as in its own turn.
        embedded: whether the network receives the guidance scale.
        may_be_clean: whether all x_s of a batch can be ends, for which no network is asked.
    """

    reach: Reach
    endpoint: Endpoint
    network: Literal["target", "student"]
    embedded: bool
    may_be_clean: bool = False

    @property
    def is_student(self) -> bool:
        """Whether the target network is the student itself."""
        return self.network == "student"

    def __call__(self, nets: Networks, state: State, x_s: Samples, masks: Tensor | None) -> Samples:
        """masks: state of the generator of the student's dropout, None for another network."""
        if self.may_be_clean and not bool((state.s > state.end).any()):
            return x_s
        with replayed(masks, x_s.device):
            there = state.at.with_x(x_s, state.s.clamp_min(0)).denoised(nets[self.network], self.embedded)
        return self.endpoint(there, x_s, state.s, state.end)
