"""Tensors without values, on which the code of a training runs for networks larger than any memory here.

Tensors of FakeTensorMode have shapes, types and storages. Mixed with ordinary tensors they give more of their kind; what is
drawn or decided on ordinary ones is unchanged. torch's own support has gaps, which `fake_tensor_fixes` closes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

P = ParamSpec("P")
T = TypeVar("T")

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
def fake_tensor_fixes(cuda: bool = False) -> Iterator[None]:
    """Close the gaps of torch's fake tensors, for the block: truth values, copies, and conversions of modules.

    cuda: autocast of the CPU gives the number types of CUDA's, too.
    """
    with ExitStack() as stack:
        stack.enter_context(FakeTensorFixes())
        stack.enter_context(_convertible())
        if cuda:
            stack.enter_context(_cuda_types())
        yield


@contextmanager
def _convertible() -> Iterator[None]:
    """Let modules convert fake weights, which torch swaps only where no weak reference leads to them."""
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
def _cuda_types() -> Iterator[None]:
    """Let autocast of the CPU give normalisations and similar functions float32, as CUDA's does.

    The functions themselves are replaced, since no mode reaches what gradient checkpointing computes in the backward pass.
    """
    own = {name: getattr(nn.functional, name) for name in FLOAT32_ON_CUDA}
    for name, function in own.items():
        setattr(nn.functional, name, _in_float32(function))
    try:
        yield
    finally:
        for name, function in own.items():
            setattr(nn.functional, name, function)


def _in_float32(function: Callable[P, T]) -> Callable[P, T]:
    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(_float, (args, kwargs))
        return function(*args, **kwargs)

    return called


def _float(value: object) -> object:
    return value.float() if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16) else value


class FakeTensorFixes(TorchFunctionMode):
    """Truth values and copies of fake tensors.

    A fake tensor is true: the question is whether a gradient is finite. Copies take shapes alone, since torch would also copy
    the FakeTensorMode behind a tensor, which crashes; ordinary tensors are copied as such even while fake ones are made.
    """

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if func is Tensor.__bool__ and isinstance(args[0], FakeTensor):
            return True
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            assert isinstance(tensor, Tensor) and isinstance(memo, dict)
            return _copied(tensor, memo)
        return func(*args, **(kwargs or {}))


def _copied(tensor: Tensor, memo: dict[int, object]) -> Tensor:
    copied: Tensor
    if not isinstance(tensor, FakeTensor):
        with unset_fake_temporarily():
            copied = tensor.__deepcopy__(memo)  # type: ignore[no-untyped-call]
            return copied
    same = tensor.detach().clone()
    learnable = isinstance(tensor, nn.Parameter)
    copied = nn.Parameter(same, tensor.requires_grad) if learnable else same.requires_grad_(tensor.requires_grad)
    memo[id(tensor)] = copied
    return copied
