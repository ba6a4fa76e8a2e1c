"""Interface of a method: the networks it keeps (roles), and the losses from which they learn (steps)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, overload

import torch
from torch import Tensor, nn

from fewstep.config import MethodConfig, OptimConfig
from fewstep.diffusion.shapes import Histogram, Images, PerSample, Samples, Scalar
from fewstep.errors import FewstepError
from fewstep.methods.trajectories import Trajectories, TrajectorySettings, draw_trajectories, read_trajectories
from fewstep.teachers.base import Teacher
from fewstep.teachers.denoiser import Cond, DenoiserLike
from fewstep.teachers.students import UNGUIDED, StudentGuidance

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


class Networks(Protocol):
    """The networks of a method's roles by name, as a loss gets them: those that learn as the trainer calls them.

    The trainer adds "ema", the student's moving average with `ema_decay`, to the roles of every method. It is what is scored
    and exported, and losses may sample from it.
    """

    @overload
    def __getitem__(self, role: Literal["teacher", "student", "ema", "target"], /) -> DenoiserLike: ...

    @overload
    def __getitem__(self, role: str, /) -> Callable[..., Any]: ...


Reward = Callable[[Images, Sequence[str] | None], PerSample]
"""Images in [0, 1] and their prompts to numbers, higher for better, differentiable in the images."""
Losses = dict[str, Scalar]
"""Log name -> scalar term; their sum is descended."""
Carry = Mapping[str, Tensor]
"""Tensors from the earlier steps of an iteration for the later ones, of one micro-batch."""
NOTHING: Carry = MappingProxyType({})
"""The carry of an iteration's first step."""


def require_guidable(teacher: Teacher, key: str, off: str) -> None:
    """Raise ValueError, naming `key` and the value that turns guidance off, for a teacher that cannot be guided."""
    if not teacher.guidance.guidable:
        raise FewstepError(
            f"method.{key}", "guidance", f"{off}, for the teacher has no unconditional prediction", f"Set it to {off}"
        )


def require_live_guidance(teacher: Teacher) -> None:
    """Raise ValueError where the stock pipeline does not pass its caller's guidance scale on to the student."""
    if not teacher.guidance.live:
        raise FewstepError(
            "method.guidance.export_scale",
            "null",
            "a scale, for the stock pipeline of this teacher's family passes none to its network",
            "Set the one that becomes part of the student's weights",
        )


@dataclass(frozen=True)
class Batch:
    """The input of a loss: `size` conditions and, for methods with `needs_images`, latents x0.

    All steps of an iteration get the same batch.

    Attributes:
        raw: the prompts, labels or Nones that `cond` encodes, [size].
        generator: on the CPU, in the same state on every process: for draws that all of them must share.
    """

    size: int
    cond: Cond
    uncond: Cond
    device: torch.device
    iteration: int = 0
    latents: Samples | None = None
    generator: torch.Generator = field(default_factory=torch.Generator)
    raw: Sequence[Any] = ()

    @property
    def x0(self) -> Samples:
        if self.latents is None:
            raise FewstepError("data.source", "no images", "a source with images, which this method needs")
        return self.latents


@dataclass(frozen=True)
class StepOutput:
    """Result of a loss for one micro-batch.

    Attributes:
        losses: scalar terms by their log name; their sum is descended.
        logs: scalars for the log that are not descended.
        histograms: sums and counts at each place: the log has the means of the places with a count above 0,
            over all processes. Every process has to return the same names.
        carry: tensors for the later steps of the same micro-batch, without gradient.
    """

    losses: Losses
    logs: Mapping[str, Scalar] = field(default_factory=dict)
    histograms: Mapping[str, Histogram] = field(default_factory=dict)
    carry: Mapping[str, Tensor] = field(default_factory=dict)

    def __or__(self, other: "StepOutput") -> "StepOutput":
        """Both outputs' terms, logs, histograms and carry."""
        return StepOutput(
            self.losses | other.losses,
            {**self.logs, **other.logs},
            {**self.histograms, **other.histograms},
            {**self.carry, **other.carry},
        )


@dataclass
class Role:
    """A network a method keeps: learnt (optim), frozen (neither), or the moving average of another role (follows, decay)."""

    net: nn.Module
    optim: OptimConfig | None = None
    follows: str | None = None
    decay: float = 0.0


def _unscaled(iteration: int) -> float:
    return 1.0


@dataclass(frozen=True)
class Step:
    """One optimizer update: `role` descends `loss` on every `every`-th iteration.

    loss: of the networks, a micro-batch, and what the earlier steps of the iteration have carried over from it.
    `lr_scale` of the iteration multiplies the learning rate, beside warm-up and decay: for methods with stages.
    """

    role: str
    loss: Callable[[Networks, Batch, Carry], StepOutput]
    every: int = 1
    lr_scale: Callable[[int], float] = _unscaled


@dataclass(frozen=True)
class Preparation:
    """The context in which a method prepares itself before the first iteration; the same on every process but for `process`.

    Attributes:
        folder: the run's, which all processes see.
        conditions: gives the source's prompts, labels or Nones at some of the indices 0 ... choices - 1.
        process, processes: number of this process, and how many there are.
        wait: returns when every process has called it.
        load_reward: a reward by name; ValueError, in one sentence, for one that does not exist on this machine.
    """

    folder: Path
    conditions: Callable[[list[int]], Sequence[Any]]
    choices: int
    seed: int
    device: torch.device
    process: int
    processes: int
    wait: Callable[[], None]
    load_reward: Callable[[str], Reward]

    def trajectories(self, teacher: Teacher, name: str, settings: TrajectorySettings) -> Trajectories:
        """The teacher's, drawn by all processes into the run's folder `name`, where they are not there yet, and read."""
        folder, where = self.folder / name, (self.device, self.process, self.processes)
        draw_trajectories(teacher, self.conditions, self.choices, folder, settings, self.seed, *where)
        self.wait()
        return read_trajectories(folder, settings, self.seed)


class Method(ABC):
    """Roles, steps, and the stock scheduler with which the student is sampled; free of devices, processes and diffusers."""

    name: ClassVar[str]
    paper: ClassVar[str]
    needs_images: bool = True
    """Whether losses read `Batch.x0`; a method may decide it from its config."""
    student_guidance: StudentGuidance = UNGUIDED
    """What export folds into the student, and whether its caller guides it."""

    last_stage: int = 0
    """First iteration of the last stage: early stopping is off before it."""

    def __init__(self, config: MethodConfig, teacher: Teacher) -> None:
        self.config, self.teacher = config, teacher

    @abstractmethod
    def roles(self) -> dict[str, Role]:
        """Name -> role, in a fixed order; holds "student"."""

    @abstractmethod
    def steps(self) -> tuple[Step, ...]:
        """The updates of one iteration, in order."""

    @abstractmethod
    def scheduler(self) -> "SchedulerMixin":
        """The stock scheduler: training grid, validation, scores and export all ask it."""

    @abstractmethod
    def allowed_steps(self) -> tuple[int, ...]:
        """The counts of `num_inference_steps` that the student was trained for; any other must fail in stock diffusers."""

    def prepare(self, at: Preparation) -> None:  # noqa: B027  # most methods have nothing to prepare
        """Called once before the first iteration, also of a resumed run, on every process."""

    def health(self, nets: Networks, iteration: int) -> dict[str, Scalar]:
        """Scalars that are computed only where a line of the log is written, for their cost; called without gradient.

        They may draw nothing at random: how often a run logs must not change what it learns.
        """
        return {}

    def warnings(self, figures: Mapping[str, float]) -> list[str]:
        """Sentences, each with the key to change, about the means of one log window (losses, health); usually none."""
        return []

    def state(self) -> dict[str, Tensor]:
        """Tensors for exact resume beyond roles and random states, of this process only; usually none."""
        return {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:  # noqa: B027  # most methods have none
        """Go on from what `state` gave."""
