"""Where the segments of BOOT begin: states that the student or the teacher reaches from pure noise, never from an image."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.diffusion import rollout
from fewstep.diffusion.schedule import Schedule
from fewstep.teachers.denoiser import Cond, DenoiserLike


@dataclass
class Starts:
    """B samples at the start of their segments.

    Attributes:
        z: states [B, C, h, w].
        segment: 0 ... steps - 1, [B], on the CPU, so that no accelerator waits for a choice.
        cond: conditions.
        scale: guidance scales, [B]; None = no guidance.
    """

    z: Tensor
    segment: Tensor
    cond: Cond
    scale: Tensor | None

    def rows(self, which: Tensor) -> "Starts":
        """The samples at the indices `which` (on the CPU)."""
        on = which.to(self.z.device)
        scale = None if self.scale is None else self.scale[on]
        return Starts(self.z[on], self.segment[which], {k: v[on] for k, v in self.cond.items()}, scale)

    def put(self, which: Tensor, other: "Starts") -> None:
        """Put the samples of `other` at the indices `which`, in place."""
        on = which.to(self.z.device)
        self.z[on], self.segment[which] = other.z, other.segment
        for key, value in other.cond.items():
            self.cond[key][on] = value
        if self.scale is not None and other.scale is not None:
            self.scale[on] = other.scale

    def __len__(self) -> int:
        return len(self.z)


Cross = Callable[[Starts], Tensor]
"""The teacher's states at the ends of the segments at whose starts it is given states."""


def from_student(
    net: DenoiserLike, starts: Starts, schedule: Schedule, timesteps: Tensor, embedded: bool, renoise: bool
) -> None:
    """Take noise `starts.z` to the segments' starts by the student's own jumps, in place.

    timesteps: starts of all segments, [steps], on the CPU. embedded: whether the student has a guidance embedding.
    renoise: draw fresh noise on the student's x0 instead of following its ODE step.
    """
    move = rollout.renoise if renoise else rollout.jump

    def step(z: Tensor, which: Tensor, j: int) -> Tensor:
        part = starts.rows(which)
        t, s = (timesteps[i].expand(len(part)).to(z.device) for i in (j, j + 1))
        end = torch.ones(len(part), device=z.device)
        return move(schedule, net(z, t, part.cond, part.scale if embedded else None, end), s)

    starts.z = rollout.ragged_rollout(step, starts.z, starts.segment)


def from_teacher(cross: Cross, starts: Starts) -> None:
    """Take noise `starts.z` to the segments' starts along the teacher's own ODE, in place."""

    def step(z: Tensor, which: Tensor, j: int) -> Tensor:
        part = starts.rows(which)
        return cross(Starts(z, torch.full_like(which, j), part.cond, part.scale))

    starts.z = rollout.ragged_rollout(step, starts.z, starts.segment)


WATCHED = 16
"""States of a pool, at most, whose noise is kept."""


class Pool:
    """States of the teacher that are drawn many times while a few of them move on: teacher starts at little cost.

    It fills with the first batches' initial noise; a state that has been at the last segment's start makes room for a new one.
    The initial noise of the first few states is kept, to compare them with what the student makes of it.
    """

    def __init__(self, size: int, steps: int, n_sub: int) -> None:
        self.size, self.steps, self.n_sub = size, steps, n_sub
        self.held: Starts | None = None
        self.noise: Tensor | None = None

    def draw(self, cross: Cross, fresh: Starts) -> Starts:
        """As many random states as `fresh` has samples, after that many / n_sub (at least one) moved one segment on."""
        if self.held is None or len(self.held) < self.size:
            self.held = _joined(self.held, fresh, self.size)
        if self.noise is None:  # no more of them than a batch has, which is what memory was found for
            self.noise = fresh.z[: min(self.size, WATCHED)].clone()
        held = self.held
        moved = torch.randperm(len(held))[: max(1, len(fresh) // self.n_sub)]
        last = held.segment[moved] == self.steps - 1
        if len(ending := moved[last]):
            new = fresh.rows(torch.arange(len(ending)))
            held.put(ending, new)
            watched = (ending < len(self.noise)).nonzero().flatten()
            self.noise[ending[watched].to(new.z.device)] = new.z[watched.to(new.z.device)]
        if len(going := moved[~last]):
            held.z[going.to(held.z.device)] = cross(held.rows(going))
            held.segment[going] += 1
        return held.rows(torch.randint(len(held), (len(fresh),)))

    def drift(self, follow: Callable[[Starts], None]) -> Tensor | None:
        """Mean squared distance of watched states from where `follow` takes their initial noise, as a share of their variance.

        follow: takes initial noise to the segments' starts, in place. None as long as all watched states are noise.
        """
        if self.held is None or self.noise is None:
            return None
        moved = self.held.segment[: len(self.noise)].nonzero().flatten()
        if len(moved) == 0:
            return None
        states = self.held.rows(moved)
        own = replace(states, z=self.noise[moved.to(states.z.device)])
        follow(own)
        return (own.z - states.z).square().mean() / states.z.var()

    def state(self) -> dict[str, Tensor]:
        if self.held is None or self.noise is None:
            return {}
        named = {"z": self.held.z, "segment": self.held.segment, "noise": self.noise}
        named |= {f"cond.{k}": v for k, v in self.held.cond.items()}
        return named if self.held.scale is None else named | {"scale": self.held.scale}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        cond = {k.removeprefix("cond."): v for k, v in tensors.items() if k.startswith("cond.")}
        self.held = Starts(tensors["z"], tensors["segment"].cpu(), cond, tensors.get("scale"))
        self.noise = tensors["noise"]


def _joined(held: Starts | None, fresh: Starts, size: int) -> Starts:
    """Both, up to `size` samples; copies, for the pool changes in place."""
    parts = [fresh] if held is None else [held, fresh]
    scales = [p.scale for p in parts if p.scale is not None]
    cond = {key: torch.cat([p.cond[key] for p in parts])[:size] for key in fresh.cond}
    z, segment = (torch.cat(values)[:size] for values in ([p.z for p in parts], [p.segment for p in parts]))
    return Starts(z, segment, cond, torch.cat(scales)[:size] if scales else None)
