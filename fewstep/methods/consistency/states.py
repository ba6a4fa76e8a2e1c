"""States that consistency is trained at without an image: along the teacher's trajectories from noise, or the student's."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.diffusion.grids import between
from fewstep.diffusion.prediction import Prediction, ode_step
from fewstep.diffusion.rollout import ragged_rollout
from fewstep.diffusion.schedule import Schedule, like
from fewstep.teachers.denoiser import Cond


@dataclass(frozen=True)
class State:
    """B states at points of a grid.

    Attributes:
        x: [B, C, h, w].
        index: position in the grid, [B].
        cond: conditions.
        scale: guidance scales, [B]; None = no guidance.
        x_s: where the loss has its target, like x, if that was drawn with the states; else None.
    """

    x: Tensor
    index: Tensor
    cond: Cond
    scale: Tensor | None
    x_s: Tensor | None = None

    def rows(self, on: Tensor) -> "State":
        scale = None if self.scale is None else self.scale[on]
        return State(self.x[on], self.index[on], {k: v[on] for k, v in self.cond.items()}, scale)


Answer = Callable[[State, Tensor], Prediction]
"""The guided teacher at states and their timesteps t [B]."""
Step = Callable[[State, Tensor], Tensor]
"""The guided teacher's way from states to other positions in the grid, [B]: x [B, C, h, w] there."""


class Trajectories:
    """One trajectory of the teacher for each sample of a batch; every iteration trains on all of them, then moves them on.

    A trajectory is at pure noise first, then once in each of `segments` equal parts of the grid, at a random point of it,
    by one step from the last (Xie et al. 2024, MLCM, algorithm 1, whose every state has a trajectory of its own).
    What the teacher says at a state gives the loss its target and takes the trajectory on: states cost nothing. The
    samples are at different segments, so that a batch always has states from all of the trajectory.

    segments: None = the grid's own, each point once.
    """

    def __init__(self, segments: int | None) -> None:
        self.segments = segments
        self.times = torch.zeros(0)
        self.held: State | None = None
        self.visit = torch.zeros(0, dtype=torch.long)

    def draw(self, step: Step, times: Tensor, fresh: State) -> State:
        """The states to train at, of `fresh`'s size; new ones, from its noises, where there are none for this grid yet.

        times: the grid, [N], ascending, on the CPU.
        """
        if self.held is None or len(self.held.x) != len(fresh.x) or not torch.equal(times, self.times):
            self.times = times
            self.held = self._spread(step, fresh)
        return self.held

    def move(self, there: Callable[[Tensor], Tensor], fresh: State) -> None:
        """Take the trajectories on to positions [B] of which `there` gives x; those at their end begin anew from `fresh`."""
        assert self.held is not None  # nothing can be moved before a draw
        visit = self.visit + 1
        ended = visit > self._last
        self.visit = torch.where(ended, 0, visit)
        index = self._place(self.visit)
        x = there(index)
        scale = self.held.scale
        if scale is not None and fresh.scale is not None:
            scale = torch.where(ended, fresh.scale, scale)
        cond = {k: torch.where(_over(ended, v), fresh.cond[k], v) for k, v in self.held.cond.items()}
        self.held = State(torch.where(_over(ended, x), fresh.x, x), index, cond, scale)

    def _spread(self, step: Step, fresh: State) -> State:
        """Trajectories from noise, each as many segments on as its place in the batch says."""
        self.visit = torch.arange(len(fresh.x), device=fresh.x.device) % (self._last + 1)
        x, index = fresh.x.clone(), fresh.index.clone()
        for v in range(1, self._last + 1):
            on = (self.visit >= v).nonzero().flatten()
            if not len(on):  # a batch of fewer samples than segments
                break
            part = State(x, index, fresh.cond, fresh.scale).rows(on)
            index[on] = self._place(torch.full_like(on, v))
            x[on] = step(part, index[on])
        return State(x, index, fresh.cond, fresh.scale)

    @property
    def _last(self) -> int:
        """The last visit, after which a trajectory ends."""
        return len(self.times) - 1 if self.segments is None else self.segments

    def _place(self, visit: Tensor) -> Tensor:
        """The grid position of each trajectory's `visit` [B]: the noisiest for 0, else a random one of the segment."""
        n, m = len(self.times), self.segments
        if m is None:
            return n - 1 - visit
        low, high = n - n * visit // m, n - n * (visit - 1) // m
        drawn = low + (torch.rand(len(visit), device=visit.device) * (high - low)).long()
        return torch.where(visit == 0, n - 1, drawn)

    def state(self) -> dict[str, Tensor]:
        if self.held is None:
            return {}
        named = {"x": self.held.x, "index": self.held.index, "visit": self.visit, "times": self.times}
        if self.held.scale is not None:
            named["scale"] = self.held.scale
        return named | {f"cond.{k}": v for k, v in self.held.cond.items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        cond = {k.removeprefix("cond."): v for k, v in tensors.items() if k.startswith("cond.")}
        self.held = State(tensors["x"], tensors["index"], cond, tensors.get("scale"))
        self.visit, self.times = tensors["visit"], tensors["times"].cpu()


def teacher_rollout(answer: Answer, schedule: Schedule, times: Tensor, segments: int, start: State) -> Tensor:
    """States at `start.index`, each by a trajectory of its own from the noise `start.x` (MLCM, algorithm 1).

    A state in the s-th of M segments from the clean end takes M - s equal steps; pure noise itself takes none.
    """
    n, top = len(times), times[-1]
    steps = torch.where(start.index == n - 1, 0, segments - start.index * segments // n)
    t = times.to(start.x.device)

    def step(x: Tensor, on: Tensor, i: int) -> Tensor:
        part = replace(start.rows(on), x=x)
        now, after = (between(top, t[part.index], (i + j) / steps[on]) for j in (0, 1))
        return ode_step(schedule, answer(part, now), after)

    return ragged_rollout(step, start.x, steps)


def _over(rows: Tensor, x: Tensor) -> Tensor:
    """A mask [B] as [B, 1, ...], to choose among rows of x."""
    return like(rows, x).bool()
