"""The state of a role during training: its network, the tensors that learn, its optimizer and its updates."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from fewstep.config import MemoryConfig, MethodConfig, OptimConfig, RunConfig
from fewstep.methods.base import Method, Networks, Role
from fewstep.teachers.denoiser import Denoiser, own_tensors
from fewstep.training.init_from import start_from
from fewstep.training.offloading import Offloading

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from diffusers import ModelMixin

OptimizerFactory = Callable[[Sequence[nn.Parameter], OptimConfig], torch.optim.Optimizer]
AVERAGE = "ema"
"""The role that the trainer adds to every method's: the student's moving average."""


@dataclass(frozen=True)
class TrainableTensors:
    """The tensors of a network that are not another's: all of them, or its adapters and its other trained tensors."""

    parameters: list[nn.Parameter]
    buffers: list[Tensor]

    @classmethod
    def of(cls, net: nn.Module) -> "TrainableTensors":
        tensors = own_tensors(net).values()
        parameters = [tensor for tensor in tensors if isinstance(tensor, nn.Parameter)]
        return cls(parameters, [tensor for tensor in tensors if not isinstance(tensor, nn.Parameter)])

    def requires_grad_(self, on: bool) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(on)

    @torch.no_grad()
    def follow(self, leader: "TrainableTensors", decay: float) -> None:
        """Move to the leader's values, as their exponential moving average; buffers are copied."""
        followers: list[Tensor] = [*self.parameters]
        torch._foreach_lerp_(followers, [*leader.parameters], 1 - decay)
        for a, b in zip(self.buffers, leader.buffers, strict=True):
            a.copy_(b)


@dataclass
class RoleState:
    """One role of a run.

    Attributes:
        role: as the method declares it.
        net: the network itself.
        tensors: what of it is its own.
        wrapped: the network as its own updates call it: for distributed training, inside a wrapper.
        optimizer: None where nothing learns.
        updates: optimizer updates so far.
    """

    role: Role
    net: nn.Module
    tensors: TrainableTensors
    wrapped: nn.Module
    optimizer: "AcceleratedOptimizer | None" = None
    updates: int = 0

    @property
    def changes(self) -> bool:
        """Whether its weights change during training, and belong to a checkpoint."""
        return self.role.optim is not None or self.role.follows is not None


Roles = dict[str, RoleState]


def new_roles(
    config: RunConfig[MethodConfig],
    method: Method,
    accelerator: "Accelerator",
    offloading: Offloading,
    new_optimizer: OptimizerFactory,
) -> Roles:
    """A method's roles and the student's moving average, on the device."""
    train, teacher = config.train, method.teacher
    if train.lora is not None:
        teacher.students.adapt(train.lora)
    roles = method.roles()
    if train.init_from is not None:
        start_from(roles, train.init_from)
    student = roles["student"].net
    assert isinstance(student, Denoiser)
    roles = {**roles, AVERAGE: Role(student.clone(), follows="student", decay=train.ema_decay)}

    def compiled(net: nn.Module) -> bool:
        """Layers that come and go are not compiled."""
        return train.compile and not (offloading.network and net is teacher.denoiser)

    return _prepare(roles, accelerator, config.memory, new_optimizer, compiled)


def _prepare(
    roles: Mapping[str, Role],
    accelerator: "Accelerator",
    memory: MemoryConfig,
    new_optimizer: OptimizerFactory,
    compiled: Callable[[nn.Module], bool],
) -> Roles:
    """Move the networks to the device; those that learn get an optimizer, the others are frozen.

    compiled: whether a network is to run compiled.
    """
    states = {}
    for name, role in roles.items():
        net = role.net.to(accelerator.device)
        state = states[name] = RoleState(role, net, TrainableTensors.of(net), net)
        _set_up(net, memory.gradient_checkpointing, compiled(net))
        if role.optim is None:
            net.requires_grad_(False).eval()
            continue
        state.tensors.requires_grad_(True)
        net.train()
        optimizer = new_optimizer(state.tensors.parameters, role.optim)
        state.wrapped, state.optimizer = accelerator.prepare(net, optimizer)
    return states


def _set_up(net: nn.Module, checkpointing: bool, compiled: bool) -> None:
    """Gradient checkpointing and compilation of the denoisers in `net`, if asked for."""
    for part in net.modules():
        if isinstance(part, Denoiser):
            if checkpointing:
                cast("ModelMixin", part.net).enable_gradient_checkpointing()
            if compiled:
                part.compile_net()


def networks(roles: Roles, learner: str | None = None) -> Networks:
    """The networks by role, as a loss gets them; that of `learner` as its update calls it."""
    nets = {name: state.wrapped if name == learner else state.net for name, state in roles.items()}
    return cast(Networks, nets)


def follow(roles: Roles, leader: str) -> None:
    """Move the averages of a role that was updated."""
    for state in roles.values():
        if state.role.follows == leader:
            state.tensors.follow(roles[leader].tensors, state.role.decay)


def require_grad_only(roles: Roles, learner: str) -> None:
    """Among the roles that learn, let gradients reach the learner's tensors alone."""
    learnt = {name: state for name, state in roles.items() if state.optimizer is not None}
    if len(learnt) > 1:
        for name, state in learnt.items():
            state.tensors.requires_grad_(name == learner)
