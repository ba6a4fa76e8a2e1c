"""What a run will need, before it: one round of its iterations by the trainer itself, on networks without values."""

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from fewstep import io
from fewstep.config import DataConfig, OptimConfig, RunConfig, Strict
from fewstep.data import Raw, Source
from fewstep.methods.base import Batch, Carry, Method, Networks, Step, StepOutput
from fewstep.plan.fake_tensors import EightBitStates, Meter, Untroubled, convertible, cuda_types, held, without_values
from fewstep.plan.weightless import Within, unweighted_teacher
from fewstep.teachers.base import Teacher
from fewstep.teachers.denoiser import Posterior
from fewstep.teachers.prompt_cache import CACHED, CACHED_BYTES
from fewstep.training.optim import new_optimizer
from fewstep.training.trainer import Trainer

GIB = 2**30
CARDS = (16, 24, 40, 80)
"""Memory of common GPUs in GiB."""
BESIDE = GIB
"""What CUDA's context and its libraries take beside the tensors, about."""
FRAGMENTED = 1.05
"""What the allocator holds over what tensors take, about."""


@dataclass(frozen=True)
class RolePlan:
    """One network. Bytes; operations are in F, one forward of the teacher on a batch, per iteration.

    Attributes:
        kind: "learnt", "frozen" or "average".
        weights: without those that an earlier role holds already.
        activations: what its update has kept when its loss is known: for the backward, and weights cast by autocast.
        forward: its own forwards, in anyone's update. backward: those of its updates, through whichever networks.
    """

    kind: str
    parameters: int
    trainable: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    forward: float
    backward: float


@dataclass(frozen=True)
class Plan:
    """What one process of a run will hold (bytes) and compute.

    Attributes:
        parts: what else stays in memory, by the pipeline's names.
        waiting: weights of the teacher's network in main memory, with `offload_teacher`.
        buckets: copies of gradients for their exchange among processes.
        prompts: to what the kept conditions of prompts may grow in a long run.
        resident: weights and states of optimizers, between iterations.
        peaks: phase -> most bytes during it; all in all.
        forward_tflop: F. elsewhere: operations of encoders and autoencoder, in F.
        timesteps: of the student, at each number of steps that it is trained for.
        fits: size of a card in GiB -> whether the run fits.
    """

    method: str
    device: str
    mixed_precision: str
    batch_size: int
    accumulate: int
    processes: int
    roles: dict[str, RolePlan]
    parts: dict[str, int]
    waiting: int
    buckets: int
    prompts: int
    resident: int
    peaks: dict[str, int]
    forward_tflop: float
    elsewhere: float
    timesteps: dict[int, list[float]]

    @property
    def peak(self) -> int:
        return self.buckets + max(self.peaks.values())

    @property
    def total_forwards(self) -> float:
        """F per iteration."""
        return self.elsewhere + sum(role.forward + role.backward for role in self.roles.values())

    @property
    def fits(self) -> dict[int, bool]:
        need = (self.peak + self.prompts) * FRAGMENTED + BESIDE
        return {card: need <= card * GIB for card in CARDS}

    def as_dict(self) -> dict[str, Any]:
        total = {"forwards": self.total_forwards, "tflop": self.total_forwards * self.forward_tflop}
        return asdict(self) | {"peak": self.peak, "fits": self.fits, "per_iteration": total}


def plan(
    method_class: type[Method],
    config: RunConfig[Any],
    device: str = "cuda",
    processes: int = 1,
    whole_round: bool = True,
) -> Plan:
    """The plan of a run on "cuda" or "cpu"; only configs and vocabularies are read, nothing is written.

    whole_round: rehearse a round, as a count of operations wants it; else the iteration that has all updates, enough for memory.

    Has to be called where accelerate takes the CPU (ACCELERATE_USE_CPU), with one mixed_precision per program.
    """
    precision = config.train.mixed_precision
    precision = ("bf16" if device == "cuda" else "no") if precision == "auto" else precision
    changes: dict[str, Strict] = {
        # Autocast of fp16 keeps as much as that of bf16, which needs no GPU.
        "train": config.train.model_copy(
            update={
                "mixed_precision": "no" if precision == "no" else "bf16",
                "init_from": None, "compile": False, "cpu_threads": torch.get_num_threads(),
            }
        ),
        "log": config.log.model_copy(update={"tracker": None}),
        "checkpoint": config.checkpoint.model_copy(update={"resume": None}),
    }  # fmt: skip
    meter = Meter()
    # How tensors without values are copied makes torch warn, though it is its own way.
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
    with ExitStack() as stack:
        stack.enter_context(Untroubled())
        stack.enter_context(convertible())
        if device == "cuda":
            stack.enter_context(cuda_types())
        stack.enter_context(meter)
        rehearsal = _Rehearsal(method_class, config.model_copy(update=changes), device, meter)
        rehearsal.run(whole_round)
        return rehearsal.plan(precision, processes)


class _Rehearsed(Trainer):
    @staticmethod
    def new_optimizer(parameters: Sequence[nn.Parameter], o: OptimConfig) -> torch.optim.Optimizer:
        return EightBitStates(parameters) if o.optimizer == "adamw8bit" else new_optimizer(parameters, o)


class _Rehearsal:
    """A trainer on networks without values, and what it was seen to hold and to compute."""

    def __init__(self, method_class: type[Method], config: RunConfig[Any], device: str, meter: Meter) -> None:
        self.config, self.device, self.meter = config, device, meter
        self.teacher = unweighted_teacher(config.teacher)
        self.method = method_class(config.method, self.teacher)
        if device == "cuda":  # parts reach it in their type there: those in float32, as they are loaded, do not
            self._enter("loading")
            self.teacher.placement.to(torch.device("cpu"), io.torch_dtype(config.train.base_dtype))
            self._enter("start")
        source = Anything(self.teacher, config.data, without_values)
        cached = config.data.cache is not None
        if cached:
            self._cache()
            config = config.model_copy(update={"data": config.data.model_copy(update={"cache": None})})
        offloads = self.config.memory.offload and device == "cuda"
        if offloads:
            self.teacher.placement.release(self.teacher.placement.parts)
        with without_values():
            self.trainer = _Rehearsed(config, self.method, self.teacher, source)
        self.trainer.offloads = offloads
        self.lends = self.config.memory.offload_teacher and device == "cuda"
        # Roles whose backward passes lead through the teacher's network, and so keep its weights on the GPU.
        self.through: set[str] = set()
        self.teacher.denoiser.net.register_forward_pre_hook(self._hear, with_kwargs=True)
        self.trainer.rest()
        if cached and self.method.needs_images:
            self.trainer.batches.latents = self._latents
        self.method.rehearse()
        self.iterations = 0
        self.activations: dict[str, int] = defaultdict(int)
        for name, optimizer in self.trainer.optimizers.items():
            optimizer.optimizer.register_step_pre_hook(lambda *_, name=name: self._enter(f"{name}: optimizer"))

    def _cache(self) -> None:
        """Conditions and latents as if `data.cache` held them: without encoders, and without a file."""
        prompts = self.teacher.prompts
        if prompts is not None:
            row = self.teacher.condition([""])
            prompts.clear()
            prompts.stored = lambda texts: {key: torch.cat([value] * len(texts)) for key, value in row.items()}
        self.teacher.placement.release(self.teacher.placement.parts)

    def _latents(self, indices: list[int]) -> Posterior:
        with without_values():
            return Posterior(*(torch.zeros(len(indices), *self.teacher.latent_shape) for _ in range(2)))

    def run(self, whole_round: bool) -> None:
        """One round of iterations, or its first, which has all updates; the optimizers' states are there from the beginning."""
        self._make_states()
        self.meter.flops.clear()
        steps = [replace(step, loss=self._marked(step)) for step in self.method.steps()]
        with self.meter.watched(self.trainer.raw):
            rounds = max(step.every for step in steps) if whole_round else 1
            self._iterate_all(steps, rounds)
            if whole_round and self.method.state():  # made once, such as trajectories: no part of later iterations
                self.meter.flops.clear()
                self.iterations = 0
                self._iterate_all(steps, rounds)
        self._enter("resident")

    def _iterate_all(self, steps: Sequence[Step], iterations: int) -> None:
        for _ in range(iterations):
            self._iterate(steps)
            self.iterations += 1
            self.trainer.iteration += 1

    def _make_states(self) -> None:
        """What the optimizers keep from their first step on."""
        for optimizer in self.trainer.optimizers.values():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
            optimizer.optimizer.step()
            optimizer.zero_grad()

    def _iterate(self, steps: Sequence[Step]) -> None:
        self._enter("data")
        self.trainer.iterate(steps)

    def _hear(self, net: nn.Module, *given: Any) -> None:
        if torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in tree_iter(given)):
            self.through.add(self.meter.phase.partition(":")[0])

    def _waiting(self, phase: str, weights: int, layer: int) -> int:
        """Of the teacher's network, what is not on the GPU in a phase."""
        role = phase.partition(":")[0]
        return 0 if phase == "start" or role in self.through else weights - layer

    def _enter(self, phase: str) -> None:
        self.meter.phase = phase

    def _marked(self, step: Step) -> Callable[[Networks, Batch, Carry], StepOutput]:
        def loss(nets: Networks, batch: Batch, carry: Carry) -> StepOutput:
            before = self.meter.alive
            self._enter(f"{step.role}: forward")
            output = step.loss(nets, batch, carry)
            self.activations[step.role] = max(self.activations[step.role], self.meter.alive - before)
            self._enter(f"{step.role}: backward")
            return output

        return loss

    def plan(self, precision: str, processes: int) -> Plan:
        flops, trainer = Counter(self.meter.flops), self.trainer
        unit = self._one_forward()
        per_iteration = self.iterations * unit
        counted: set[int] = set()
        roles: dict[str, RolePlan] = {}
        for name, role in trainer.roles.items():
            net, optimizer = trainer.raw[name], trainer.optimizers.get(name)
            learnt = {p for group in optimizer.param_groups for p in group["params"]} if optimizer else set()
            states = chain.from_iterable(state.values() for state in optimizer.state.values()) if optimizer else ()
            forward = sum(n for (phase, label), n in flops.items() if label == name and "backward" not in phase)
            roles[name] = RolePlan(
                kind="learnt" if optimizer else "average" if role.follows else "frozen",
                parameters=sum(p.numel() for p in net.parameters()),
                trainable=sum(p.numel() for p in learnt),
                weights=held(chain(net.parameters(), net.buffers()), counted),
                gradients=sum(p.numel() * p.element_size() for p in learnt),
                optimizer=held((v for v in states if isinstance(v, Tensor)), counted),
                activations=self.activations[name],
                forward=forward / per_iteration,
                backward=sum(n for (phase, _), n in flops.items() if phase == f"{name}: backward") / per_iteration,
            )
        parts = {
            name: held(chain(part.parameters(), part.buffers()), counted)
            for name, part in self.teacher.pipeline.components.items()
            if isinstance(part, nn.Module)
        }
        waiting, layer = self._lent()
        if waiting:
            roles["teacher"] = replace(roles["teacher"], weights=roles["teacher"].weights - waiting)
        within = sum(role.forward + role.backward for role in roles.values())
        return Plan(
            method=self.method.name,
            device=self.device,
            mixed_precision=precision,
            batch_size=self.config.batch_size,
            accumulate=self.config.train.accumulate,
            processes=processes,
            roles=roles,
            parts={name: size for name, size in parts.items() if size},
            waiting=waiting,
            buckets=sum(role.gradients for role in roles.values()) if processes > 1 else 0,
            prompts=self._kept_prompts(),
            resident=sum(r.weights + r.optimizer for r in roles.values()) + sum(parts.values()),
            peaks={
                phase: size - self._waiting(phase, waiting, layer)
                for phase, size in self.meter.peaks.items()
                if phase not in ("loading", "resident", "unit")
            },
            forward_tflop=unit / 1e12,
            elsewhere=sum(flops.values()) / per_iteration - within,
            timesteps=self._timesteps(),
        )

    def _lent(self) -> tuple[int, int]:
        """Bytes of the teacher's network that `offload_teacher` keeps in main memory, and those of its largest layer."""
        if not self.lends:
            return 0, 0
        layers = [held(module.parameters(recurse=False), set()) for module in self.teacher.denoiser.net.modules()]
        return sum(layers), max(layers)

    def _one_forward(self) -> int:
        """Operations of the teacher's network on one batch."""
        teacher, size = self.teacher, self.config.batch_size
        self._enter("unit")
        with torch.no_grad():
            cond = teacher.null_condition(size)
            before = self.meter.total_flops()
            teacher.denoiser(torch.zeros(size, *teacher.latent_shape), torch.zeros(size, dtype=torch.long), cond)
        return self.meter.total_flops() - before

    def _kept_prompts(self) -> int:
        prompts, data = self.teacher.prompts, self.config.data
        if prompts is None or prompts.stored is not None or data.source == "fashion":
            return 0
        each = sum(value.nbytes for value in self.teacher.condition([""]).values())
        return each * min(CACHED, CACHED_BYTES // each, data.limit or CACHED)

    def _timesteps(self) -> dict[int, list[float]]:
        scheduler = self.method.scheduler()
        return {n: self.teacher.samplers.grid(scheduler, n)[:-1].tolist() for n in self.method.allowed_steps()}


class Anything(Source):
    """As many samples as one asks for, of the kind that the config's source gives; images are made `within`."""

    def __init__(self, teacher: Teacher, config: DataConfig, within: Within) -> None:
        self.image_size, self.within = teacher.image_size, within
        self.conditions = teacher.conditions  # type: ignore[assignment]
        self.has_images = config.source in ("fashion", "folder", "parquet")

    def __len__(self) -> int:
        return 256

    def image_key(self, index: int) -> str:
        return str(index)

    def get(self, indices: Sequence[int]) -> Raw:
        with self.within():
            images = torch.zeros(len(indices), 3, self.image_size, self.image_size)
        return Raw(images, self.conditions_at(indices), list(indices))

    def conditions_at(self, indices: Sequence[int]) -> list[Any]:
        return [{"prompt": str(i), "label": 0, "none": None}[self.conditions] for i in indices]
