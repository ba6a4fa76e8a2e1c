"""More trajectories of the teacher than a batch has samples, of which every batch draws others."""

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.methods.consistency.states import State, Step, Trajectories


class Replay(Trajectories):
    """`size` trajectories, on the CPU; a batch of B is at some of them, drawn at random, and moves these on.

    Without it a batch has the same prompts and noises until their trajectories end. Here a sample comes back after
    size / B iterations on average, in its next segment. The teacher is frozen, so that a state that waits is as good as
    a new one; and as it is moved on by the evaluation that gives its target, none is added but at the start, where B
    trajectories an iteration, spread over all segments, are begun until there are `size`.
    """

    def __init__(self, segments: int | None, size: int) -> None:
        super().__init__(segments)
        self.size = size
        self.pool: State | None = None
        self.visits = torch.zeros(0, dtype=torch.long)
        self.drawn = torch.zeros(0, dtype=torch.long)

    def draw(self, step: Step, times: Tensor, fresh: State) -> State:
        if self.size < (wanted := len(fresh.x)):
            raise ValueError(
                f"method.replay: {self.size} trajectories are fewer than a batch has samples, {wanted}; set it to several "
                "batches, or to 0, which keeps one trajectory for each sample of a batch"
            )
        if not torch.equal(times, self.times):
            self.times, self.pool = times, None
        if self.pool is None or len(self.pool.x) < self.size:
            self._begin(self._spread(step, fresh))
        assert self.pool is not None
        device = fresh.x.device
        self.drawn = torch.randperm(len(self.pool.x))[:wanted]
        self.held = _each(lambda v: v[self.drawn].to(device), self.pool)
        self.visit = self.visits[self.drawn].to(device)
        return self.held

    def move(self, there: Callable[[Tensor], Tensor], fresh: State) -> None:
        super().move(there, fresh)
        assert self.pool is not None and self.held is not None  # nothing can be moved before a draw
        self.pool = _each(lambda kept, new: kept.index_copy_(0, self.drawn, new.cpu()), self.pool, self.held)
        self.visits[self.drawn] = self.visit.cpu()

    def _begin(self, new: State) -> None:
        """Take up what `_spread` has made, as far as there is room."""
        pool, visits = _each(Tensor.cpu, new), self.visit.cpu()
        if self.pool is not None:
            pool = _each(lambda *v: torch.cat(v), self.pool, pool)
            visits = torch.cat([self.visits, visits])
        self.pool, self.visits = _each(lambda v: v[: self.size].clone(), pool), visits[: self.size]

    def state(self) -> dict[str, Tensor]:
        self.held, self.visit = self.pool, self.visits  # between iterations, nothing else is held
        return super().state()

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        super().load_state({key: v.cpu() for key, v in tensors.items()})
        self.pool, self.visits = self.held, self.visit


def _each(change: Callable[..., Tensor], *states: State) -> State:
    """The state whose tensors are `change` of those of `states`."""
    first = states[0]
    cond = {key: change(*(state.cond[key] for state in states)) for key in first.cond}
    scale = None if first.scale is None else change(*(state.scale for state in states))
    return State(change(*(state.x for state in states)), change(*(state.index for state in states)), cond, scale)
