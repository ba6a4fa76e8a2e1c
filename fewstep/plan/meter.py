"""Memory and operations of a computation, counted tensor by tensor."""

import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


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
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._labels: list[str] = [""]

    @property
    def peak(self) -> int:
        return max(self.peaks.values(), default=0)

    @contextmanager
    def watched(self, modules: dict[str, nn.Module]) -> Iterator[None]:
        """Operations in these modules' forwards are counted under their names."""
        handles = []
        for name, module in modules.items():
            handles.append(module.register_forward_pre_hook(partial(self._enter, name)))
            handles.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, label: str, *_: object) -> None:
        self._labels.append(label)

    def _leave(self, *_: object) -> None:
        self._labels.pop()

    def total_flops(self) -> int:
        return sum(self.flops.values())

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
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


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


COUNTS: dict[OpOverloadPacket, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""torch's own, and fused attention on the CPU, which it lacks."""


def bytes_of(tensors: Iterator[Tensor], counted: set[int]) -> int:
    """Bytes of these tensors' storages that are not in `counted` yet, to which they are added."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if id(storage) not in counted:
            counted.add(id(storage))
            total += storage.nbytes()
    return total
