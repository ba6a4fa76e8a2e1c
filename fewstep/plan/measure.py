"""The measurement of a plan: a round of a run's iterations by the trainer itself, on networks without values."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from fewstep import io
from fewstep.config import MethodConfig, OptimConfig, RunConfig
from fewstep.methods.base import Batch, Carry, Method, Networks, Step, StepOutput
from fewstep.plan.eight_bit import EightBitStates
from fewstep.plan.fake_tensors import without_values
from fewstep.plan.figures import Plan, RolePlan
from fewstep.plan.meter import Meter, bytes_of
from fewstep.plan.placeholders import (
    PlaceholderEncodings,
    PlaceholderPreparation,
    PlaceholderSource,
    placeholder_reward,
)
from fewstep.plan.weightless import weightless_teacher
from fewstep.teachers.prompt_cache import CACHED, CACHED_BYTES
from fewstep.training.offloading import Offloading
from fewstep.training.optim import new_optimizer
from fewstep.training.trainer import Trainer


class MeasuredRun:
    """A trainer on networks without values, and the memory and operations that its iterations were measured to take."""

    def __init__(self, method_class: type[Method], config: RunConfig[MethodConfig], device: str, meter: Meter) -> None:
        self.config, self.device, self.meter = config, device, meter
        self.teacher = weightless_teacher(config.teacher)
        self.method = method_class(config.method, self.teacher)
        if device == "cuda":  # parts reach it in their type there: those in float32, as they are loaded, do not
            self._enter("loading")
            self.teacher.placement.to(torch.device("cpu"), io.torch_dtype(config.train.base_dtype))
            self._enter("start")
        source = PlaceholderSource(self.teacher, config.data, without_values)
        encodings = PlaceholderEncodings(self.teacher, without_values) if config.data.cache is not None else None
        offloading = Offloading(self.teacher, parts=config.memory.offload and device == "cuda")
        offloading.release_parts()
        with without_values():
            self.trainer = Trainer(
                config, self.method, self.teacher, source,
                optimizer_factory=optimizer_without_values, encodings=encodings, offloading=offloading,
            )  # fmt: skip
        self.offloads_network = config.memory.offload_teacher and device == "cuda"
        # Roles whose backward passes lead through the teacher's network, and so keep its weights on the GPU.
        self.through: set[str] = set()
        self.teacher.denoiser.net.register_forward_pre_hook(self._note_gradients, with_kwargs=True)
        offloading.release_parts()
        preparation = vars(self.trainer.preparation()) | {"load_reward": placeholder_reward}
        self.method.prepare(PlaceholderPreparation(**preparation))
        self.iterations = 0
        self.activations: dict[str, int] = defaultdict(int)
        for name, optimizer in self._optimizers().items():
            optimizer.register_step_pre_hook(partial(self._enter_optimizer, name))

    def run(self, whole_round: bool) -> None:
        """One round of iterations, or its first, which has all updates; the optimizers' states are there from the beginning."""
        self._make_states()
        self.meter.flops.clear()
        steps = [replace(step, loss=self._marked(step)) for step in self.method.steps()]
        with self.meter.watched({name: role.net for name, role in self.trainer.roles.items()}):
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
        """Memory of the optimizers' state from their first step on."""
        for optimizer in self._optimizers().values():
            for parameter in _parameters(optimizer):
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad()

    def _iterate(self, steps: Sequence[Step]) -> None:
        self._enter("data")
        self.trainer.iterate(steps)

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Of the roles that learn, without accelerate's wrappers."""
        roles = self.trainer.roles.items()
        return {name: role.optimizer.optimizer for name, role in roles if role.optimizer is not None}

    def _note_gradients(self, net: nn.Module, *given: object) -> None:
        if torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in tree_iter(given)):
            self.through.add(self.meter.phase.partition(":")[0])

    def _waiting(self, phase: str, weights: int, layer: int) -> int:
        """Of the teacher's network, what is not on the GPU in a phase."""
        role = phase.partition(":")[0]
        return 0 if phase == "start" or role in self.through else weights - layer

    def _enter(self, phase: str) -> None:
        self.meter.phase = phase

    def _enter_optimizer(self, name: str, *_: object) -> None:
        self._enter(f"{name}: optimizer")

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
        optimizers = self._optimizers()
        for name, role in trainer.roles.items():
            net, optimizer = role.net, optimizers.get(name)
            learnt = set(_parameters(optimizer)) if optimizer else set()
            states = chain.from_iterable(state.values() for state in optimizer.state.values()) if optimizer else ()
            forward = sum(n for (phase, label), n in flops.items() if label == name and "backward" not in phase)
            roles[name] = RolePlan(
                kind="learnt" if optimizer else "average" if role.role.follows else "frozen",
                parameters=sum(p.numel() for p in net.parameters()),
                trainable=sum(p.numel() for p in learnt),
                weights=bytes_of(chain(net.parameters(), net.buffers()), counted),
                gradients=sum(p.numel() * p.element_size() for p in learnt),
                optimizer=bytes_of((v for v in states if isinstance(v, Tensor)), counted),
                activations=self.activations[name],
                forward=forward / per_iteration,
                backward=sum(n for (phase, _), n in flops.items() if phase == f"{name}: backward") / per_iteration,
            )
        parts = {
            name: bytes_of(chain(part.parameters(), part.buffers()), counted)
            for name, part in self.teacher.pipeline.components.items()
            if isinstance(part, nn.Module)
        }
        waiting, layer = self._offloaded()
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

    def _offloaded(self) -> tuple[int, int]:
        """Bytes of the teacher's network that `offload_teacher` keeps in main memory, and those of its largest layer."""
        if not self.offloads_network:
            return 0, 0
        layers = [bytes_of(module.parameters(recurse=False), set()) for module in self.teacher.denoiser.net.modules()]
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


def optimizer_without_values(parameters: Sequence[nn.Parameter], o: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer that the settings name; that of bitsandbytes, which needs values, by one that keeps as much."""
    return EightBitStates(parameters) if o.optimizer == "adamw8bit" else new_optimizer(parameters, o)


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
