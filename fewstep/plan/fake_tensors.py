"""Computations without arithmetic: what they would hold in memory, and how many operations they would be.

Tensors of FakeTensorMode have shapes, types and storages but no values, so that the very code of a training runs on
networks that no machine at hand could hold. Mixed with ordinary tensors they give more of their kind; what is drawn or decided
on ordinary ones stays as it is.
"""

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

FLOAT32_ON_CUDA = (
    "group_norm", "layer_norm", "softmax", "log_softmax", "interpolate", "softplus", "cosine_similarity", "l1_loss",
    "smooth_l1_loss", "huber_loss", "mse_loss",
)  # fmt: skip
"""Functions of torch.nn.functional to which autocast gives float32 on CUDA and not, or not all, on the CPU."""


@cache
def without_values() -> FakeTensorMode:
    """Modules that are built within have weights without values. One for all: tensors of two such modes do not mix."""
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def convertible() -> Iterator[None]:
    """Modules can convert weights without values, which torch exchanges for others only where no weak reference leads to them."""
    swap = torch.utils.swap_tensors
    torch.utils.swap_tensors = _replace
    try:
        yield
    finally:
        torch.utils.swap_tensors = swap


def _replace(old: Tensor, new: Tensor) -> None:
    if (old.dtype, old.device) != (new.dtype, new.device):
        old.data = new.data


@contextmanager
def cuda_types() -> Iterator[None]:
    """Autocast of the CPU gives normalisations and their like float32, as CUDA's does: networks keep their arguments.

    The functions themselves are exchanged, since no mode reaches what checkpointing computes again in the backward.
    """
    own = {name: getattr(nn.functional, name) for name in FLOAT32_ON_CUDA}
    for name, function in own.items():
        setattr(nn.functional, name, _in_float32(function))
    try:
        yield
    finally:
        for name, function in own.items():
            setattr(nn.functional, name, function)


def _in_float32(function: Any) -> Any:
    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(_float, (args, kwargs))
        return function(*args, **kwargs)

    return called


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16) else value


class Untroubled(TorchFunctionMode):
    """What tensors without values cannot do by themselves.

    Whether one is true is answered yes: who asks wants to know whether a gradient is finite. Copied are their shapes alone, for
    torch would also copy the FakeTensorMode that is behind them, which ends in a crash; and ordinary tensors are copied as
    ordinary ones while tensors without values are made.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__bool__ and isinstance(args[0], FakeTensor):
            return True
        if func is Tensor.__deepcopy__:
            return _copied(*args)
        return func(*args, **(kwargs or {}))


def _copied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    if not isinstance(tensor, FakeTensor):
        with unset_fake_temporarily():
            return tensor.__deepcopy__(memo)  # type: ignore[no-any-return, no-untyped-call]
    same = tensor.detach().clone()
    learnable = isinstance(tensor, nn.Parameter)
    memo[id(tensor)] = (
        nn.Parameter(same, tensor.requires_grad) if learnable else same.requires_grad_(tensor.requires_grad)
    )
    return memo[id(tensor)]  # type: ignore[no-any-return]


class EightBitStates(torch.optim.Optimizer):
    """Keeps what bitsandbytes' AdamW8bit does, which itself needs values: two moments of one byte a value, and the scale of each
    block of them; those of small tensors in float32."""

    SMALL, BLOCK = 4096, 256

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for parameter in chain.from_iterable(group["params"] for group in self.param_groups):
            state, n = self.state[parameter], parameter.numel()
            if parameter.grad is None or state:
                continue
            for moment in ("1", "2"):
                small = n < self.SMALL
                state[f"state{moment}"] = torch.zeros_like(parameter, dtype=torch.float32 if small else torch.uint8)
                if not small:
                    state[f"absmax{moment}"] = torch.zeros(-(-n // self.BLOCK), device=parameter.device)


class Meter(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and floating-point operations (2 for a multiply-add).

    Attributes:
        alive: bytes now.
        peaks: phase -> most bytes during it.
        flops: (phase, label) -> operations; labels are those of the modules in `watched` whose forward was running.
        phase: what is going on, set by whoever knows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.phase = 0, "start"
        self.peaks: dict[str, int] = defaultdict(int)
        self.flops: Counter[tuple[str, str]] = Counter()
        self._known: dict[int, Any] = {}
        self._labels: list[str] = [""]

    @property
    def peak(self) -> int:
        return max(self.peaks.values(), default=0)

    @contextmanager
    def watched(self, modules: dict[str, nn.Module]) -> Iterator[None]:
        """Operations in these modules' forwards are counted under their names."""
        handles = []
        for name, module in modules.items():
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: self._labels.append(name)))  # type: ignore[misc]
            handles.append(module.register_forward_hook(lambda *_: self._labels.pop() and None, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def total_flops(self) -> int:
        return sum(self.flops.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in (out,) if isinstance(out, Tensor) else tree_iter(out):
            if isinstance(value, Tensor):
                self._see(value)
        if self.alive > self.peaks[self.phase]:
            self.peaks[self.phase] = self.alive
        count = COUNTS.get(func._overloadpacket)
        if count is not None:
            self.flops[self.phase, self._labels[-1]] += count(*args, **(kwargs or {}), out_val=out)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        size = storage.nbytes()

        def freed(_: object) -> None:
            del self._known[key]
            self.alive -= size

        self._known[key] = weakref.ref(storage, freed)
        self.alive += size


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


COUNTS: dict[Any, Any] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""torch's own, and fused attention on the CPU, which it lacks."""


def held(tensors: Iterator[Tensor], counted: set[int]) -> int:
    """Bytes of these tensors' storages that are not in `counted` yet, to which they are added."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if id(storage) not in counted:
            counted.add(id(storage))
            total += storage.nbytes()
    return total
