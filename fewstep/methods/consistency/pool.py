"""Teacher trajectories that training and the teacher's own evaluations take on together: states cost nothing."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fewstep.diffusion.rollout import ragged_rollout
from fewstep.diffusion.schedule import like
from fewstep.diffusion.shapes import Anything, Counts, GridTimes, Samples, Times
from fewstep.errors import FewstepError
from fewstep.methods.noisy_batch import NoisyBatch

Advance = Callable[[Samples, Counts, Counts, Counts], Samples]
"""(states, their samples' numbers, their grid positions, other positions) -> states there."""


class Pool:
    """One trajectory of the teacher for each sample of a batch; every iteration trains on all of them, then moves them on.

    A trajectory is at pure noise first, then once in each of `segments` equal parts of the grid, at a random point of it,
    by one step from the last (Xie et al. 2024, MLCM, algorithm 1, whose every state has a trajectory of its own).
    The teacher's prediction at a state gives the loss its target and takes the trajectory on. The samples are at
    different segments, so that a batch always has states from all of the trajectory.

    segments: None = the grid's own, each point once.
    """

    def __init__(self, segments: int | None) -> None:
        self.segments = segments
        self.times = torch.zeros(0)
        self.held: NoisyBatch | None = None
        self.index = torch.zeros(0, dtype=torch.long)
        self.visit = torch.zeros(0, dtype=torch.long)

    def draw(self, advance: Advance, times: GridTimes, fresh: NoisyBatch) -> NoisyBatch:
        """The states to train at, of `fresh`'s size; new ones, from its initial noise, where there are none for this grid yet.

        times: the grid, ascending, on the CPU.
        """
        if self.held is None or len(self.held) != len(fresh) or not torch.equal(times, self.times):
            self.times = times
            self._spread(advance, fresh)
        assert self.held is not None
        return self.held

    def move(self, there: Callable[[Counts], Samples], fresh: NoisyBatch) -> None:
        """Take the trajectories on to positions of which `there` gives x; those at their end restart from `fresh`."""
        assert self.held is not None  # nothing can be moved before a draw
        visit = self.visit + 1
        ended = visit > self._last
        self.visit = torch.where(ended, 0, visit)
        self.index = self._place(self.visit)
        x = there(self.index)
        scale = self.held.guidance_scale
        if scale is not None and fresh.guidance_scale is not None:
            scale = torch.where(ended, fresh.guidance_scale, scale)
        cond = {k: torch.where(_over(ended, v), fresh.cond[k], v) for k, v in self.held.cond.items()}
        self.held = NoisyBatch(torch.where(_over(ended, x), fresh.x, x), self._t(), cond, scale)

    def _spread(self, advance: Advance, fresh: NoisyBatch) -> None:
        """Trajectories from noise, each as many segments on as its place in the batch says."""
        self.visit = torch.arange(len(fresh), device=fresh.x.device) % (self._last + 1)
        self.index = torch.full_like(self.visit, len(self.times) - 1)

        def step(x: Samples, rows: Counts, visit: int) -> Samples:
            before = self.index[rows]
            self.index[rows] = self._place(torch.full_like(rows, visit + 1))
            return advance(x, rows, before, self.index[rows])

        x = ragged_rollout(step, fresh.x, self.visit)
        self.held = NoisyBatch(x, self._t(), fresh.cond, fresh.guidance_scale)

    def _t(self) -> Times:
        return self.times.to(self.index.device)[self.index]

    @property
    def _last(self) -> int:
        """The last visit, after which a trajectory ends."""
        return len(self.times) - 1 if self.segments is None else self.segments

    def _place(self, visit: Counts) -> Counts:
        """The grid position of each trajectory's `visit`: the noisiest for 0, otherwise a random one of the segment."""
        n, m = len(self.times), self.segments
        if m is None:
            return n - 1 - visit
        low, high = n - n * visit // m, n - n * (visit - 1) // m
        drawn = low + (torch.rand(len(visit), device=visit.device) * (high - low)).long()
        return torch.where(visit == 0, n - 1, drawn)

    def state_dict(self) -> dict[str, Tensor]:
        if self.held is None:
            return {}
        held = self.held.state_dict()
        del held["t"]  # follows from the positions
        return held | {"index": self.index, "visit": self.visit, "times": self.times}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        self.visit, self.index, self.times = tensors["visit"], tensors["index"], tensors["times"].cpu()
        self.held = NoisyBatch.from_state_dict({**tensors, "t": self._t()})


class Replay(Pool):
    """`size` trajectories, on the CPU; a batch of B is at some of them, drawn at random, and moves these on.

    Without it a batch has the same prompts and initial noise until their trajectories end. Here a sample comes back after
    size / B iterations on average, in its next segment. The teacher is frozen, so that a state that waits is as good as
    a new one; and as it is moved on by the evaluation that gives its target, none is added but at the start, where B
    trajectories an iteration, spread over all segments, are begun until there are `size`.
    """

    def __init__(self, segments: int | None, size: int) -> None:
        super().__init__(segments)
        self.size = size
        self.kept: NoisyBatch | None = None
        self.kept_at = torch.zeros(2, 0, dtype=torch.long)
        """Positions and visits of the kept trajectories, [2, size]."""
        self.drawn = torch.zeros(0, dtype=torch.long)

    def draw(self, advance: Advance, times: GridTimes, fresh: NoisyBatch) -> NoisyBatch:
        if self.size < (count := len(fresh)):
            raise FewstepError(
                "method.states.replay",
                self.size,
                f"at least a batch's {count} samples",
                "Set it to several batches, or to 0, which keeps one trajectory for each sample of a batch",
            )
        if not torch.equal(times, self.times):
            self.times, self.kept = times, None
        if self.kept is None or len(self.kept) < self.size:
            self._spread(advance, fresh)
            self._keep()
        assert self.kept is not None
        device = fresh.x.device
        self.drawn = torch.randperm(len(self.kept))[:count]
        self.held = self.kept.rows(self.drawn).to(device)
        self.index, self.visit = self.kept_at[:, self.drawn].to(device)
        return self.held

    def move(self, there: Callable[[Counts], Samples], fresh: NoisyBatch) -> None:
        super().move(there, fresh)
        assert self.kept is not None and self.held is not None  # nothing can be moved before a draw
        kept, moved = self.kept.state_dict(), self.held.to(torch.device("cpu")).state_dict()
        self.kept = NoisyBatch.from_state_dict({k: v.index_copy_(0, self.drawn, moved[k]) for k, v in kept.items()})
        self.kept_at[:, self.drawn] = torch.stack([self.index, self.visit]).cpu()

    def _keep(self) -> None:
        """Keep what `_spread` has made, as far as there is room."""
        assert self.held is not None
        new, new_at = self.held.to(torch.device("cpu")), torch.stack([self.index, self.visit]).cpu()
        if self.kept is not None:
            new, new_at = NoisyBatch.cat([self.kept, new]), torch.cat([self.kept_at, new_at], dim=1)
        tensors = {key: v[: self.size].clone() for key, v in new.state_dict().items()}
        self.kept, self.kept_at = NoisyBatch.from_state_dict(tensors), new_at[:, : self.size].clone()

    def state_dict(self) -> dict[str, Tensor]:
        if self.kept is None:
            return {}
        self.held, (self.index, self.visit) = self.kept, self.kept_at  # between iterations, nothing else is held
        return super().state_dict()

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_state_dict({key: v.cpu() for key, v in tensors.items()})
        self.kept, self.kept_at = self.held, torch.stack([self.index, self.visit])


def _over(rows: Times, x: Anything) -> Anything:
    """A mask as [B, 1, ...], to choose among rows of x."""
    return like(rows, x).bool()
