"""Starts of BOOT's segments: states that the student or the teacher reaches from pure noise, never from an image.

Samples at the starts of segments are a `NoisyBatch`; the indices of their segments, [B], stay on the CPU beside it, so that no
accelerator waits for a choice.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.diffusion import rollout
from fewstep.diffusion.schedule import Schedule
from fewstep.diffusion.shapes import Counts, GridTimes, Rows, Samples, Scalar
from fewstep.methods.noisy_batch import NoisyBatch
from fewstep.teachers.denoiser import DenoiserLike

Cross = Callable[[NoisyBatch, Counts], Samples]
"""From samples at the starts of segments, and the segments, to the states at their ends."""


def student_cross(net: DenoiserLike, schedule: Schedule, timesteps: GridTimes, embedded: bool, renoise: bool) -> Cross:
    """The student's own jump over a segment.

    Args:
        timesteps: starts of all segments, on the CPU.
        embedded: whether the student has a guidance embedding.
        renoise: draw fresh noise on the student's x0 instead of following its ODE step.
    """
    move = rollout.renoise if renoise else rollout.jump

    def cross(at: NoisyBatch, segment: Counts) -> Samples:
        scale = at.guidance_scale if embedded else None
        jump = net(at.x, at.t, at.cond, scale, torch.ones(len(at), device=at.x.device))
        return move(schedule, jump, timesteps[segment + 1].to(at.x.device))

    return cross


def follow(cross: Cross, noise: NoisyBatch, segment: Counts, timesteps: GridTimes) -> NoisyBatch:
    """Samples at the starts of segments, where `cross` takes their initial noise, one segment after the other.

    timesteps: starts of all segments, on the CPU.
    """

    def step(x: Samples, which: Counts, j: int) -> Samples:
        now = torch.full_like(which, j)
        part = noise.rows(which.to(x.device)).with_x(x, timesteps[now].to(x.device))
        return cross(part, now)

    x = rollout.ragged_rollout(step, noise.x, segment)
    return noise.with_x(x, timesteps[segment].to(x.device))


WATCHED = 16
"""States of a pool, at most, whose noise is kept."""


class Pool:
    """States of the teacher that are drawn many times while a few of them move on: teacher starts at little cost.

    It fills with the first batches' initial noise; a state that has been at the last segment's start makes room for a new one.
    The initial noise of the first few states is kept, to compare them with what the student makes of it.

    Args:
        size: states, at most.
        timesteps: starts of all segments, on the CPU.
        n_sub: sub-steps of a segment.
    """

    def __init__(self, size: int, timesteps: GridTimes, n_sub: int) -> None:
        self.size, self.timesteps, self.n_sub = size, timesteps, n_sub
        self.held: NoisyBatch | None = None
        self.segment = torch.zeros(0, dtype=torch.long)
        self.noise: Samples | None = None

    def draw(self, cross: Cross, fresh: NoisyBatch) -> tuple[NoisyBatch, Counts]:
        """As many random states as `fresh` has, and their segments, after that many / n_sub (at least one) moved one on."""
        held, device = self._filled(fresh), fresh.x.device
        if self.noise is None:  # no more of them than a batch has, which is what memory was found for
            self.noise = fresh.x[: min(self.size, WATCHED)].clone()
        moved = torch.randperm(len(held))[: max(1, len(fresh) // self.n_sub)]
        last = self.segment[moved] == len(self.timesteps) - 1
        if len(ending := moved[last]):
            self._replace(held, ending, fresh.rows(torch.arange(len(ending), device=device)))
        if len(going := moved[~last]):
            on = going.to(device)
            held.x[on] = cross(held.rows(on), self.segment[going])
            self.segment[going] += 1
            held.t[on] = self.timesteps[self.segment[going]].to(device)
        drawn = torch.randint(len(held), (len(fresh),))
        return held.rows(drawn.to(device)), self.segment[drawn]

    def _filled(self, fresh: NoisyBatch) -> NoisyBatch:
        """The pool's states, with `fresh` as long as there is room; copies, for the pool changes in place."""
        if self.held is None or len(self.held) < self.size:
            joined = fresh if self.held is None else NoisyBatch.cat([self.held, fresh])
            first = torch.arange(min(self.size, len(joined)), device=fresh.x.device)
            self.held, added = joined.rows(first), len(first) - len(self.segment)
            self.segment = torch.cat([self.segment, torch.zeros(added, dtype=torch.long)])
        return self.held

    def _replace(self, held: NoisyBatch, which: Rows, new: NoisyBatch) -> None:
        """Put initial noise at the indices `which`."""
        on, tensors = which.to(new.x.device), new.state_dict()
        for name, value in held.state_dict().items():
            value[on] = tensors[name]
        self.segment[which] = 0
        assert self.noise is not None
        watched = (which < len(self.noise)).nonzero().flatten()
        self.noise[which[watched].to(new.x.device)] = new.x[watched.to(new.x.device)]

    def drift(self, cross: Cross) -> Scalar | None:
        """Mean squared distance of watched states from where `cross` takes their initial noise, as a share of their variance.

        None as long as all watched states are noise.
        """
        if self.held is None or self.noise is None:
            return None
        moved = self.segment[: len(self.noise)].nonzero().flatten()
        if len(moved) == 0:
            return None
        on = moved.to(self.held.x.device)
        states = self.held.rows(on)
        own = follow(cross, states.with_x(self.noise[on]), self.segment[moved], self.timesteps)
        return (own.x - states.x).square().mean() / states.x.var()

    def state(self) -> dict[str, Tensor]:
        """The tensors by name, for a checkpoint; timesteps are those of the segments."""
        if self.held is None or self.noise is None:
            return {}
        named = {"z": self.held.x, "segment": self.segment, "noise": self.noise}
        return named | {key: v for key, v in self.held.state_dict().items() if key not in ("x", "t")}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.segment, self.noise = tensors["segment"].cpu(), tensors["noise"]
        t = self.timesteps[self.segment].to(tensors["z"].device)
        self.held = NoisyBatch.from_state_dict({**tensors, "x": tensors["z"], "t": t})
