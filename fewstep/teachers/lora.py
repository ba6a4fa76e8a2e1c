"""Low-rank adapters (Hu et al. 2021) on a network whose weights stay the teacher's.

Each learnt network is a tree of modules of its own, whose frozen leaves are the teacher's very tensors: one base in memory
for any number of networks, and nothing to switch between their calls or between a forward pass and its recomputation.
"""

import copy
import difflib
from collections.abc import Iterator, Sequence
from itertools import chain
from types import ModuleType
from typing import TYPE_CHECKING

from torch import nn

from fewstep.config import LoraConfig
from fewstep.errors import FewstepError, MissingError
from fewstep.teachers.denoiser import Denoiser

if TYPE_CHECKING:
    from diffusers import ModelMixin
    from peft.tuners.lora import LoraLayer

NAME = "default"
"""Name of the adapter in peft; each tree has one."""

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD = ("net.0.proj", "net.2")
UNET = (
    *ATTENTION, *FEED_FORWARD, "proj_in", "proj_out", "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv",
    "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip
"""Targets of LCM-LoRA (Luo et al. 2023): attention, feed-forward, convolutions, and each block's projection of the time."""


def adapted_modules(net: nn.Module, targets: Sequence[str]) -> list[str]:
    """Names of the linear and convolutional modules that end in one of `targets`; of the uppermost, only if no others do.

    Raises ValueError for a target that names none, with the nearest that does, and where peft is not installed.
    """
    _peft()
    names = [name for name, module in net.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    found = {
        target: [name for name in names if name.endswith(f".{target}")] or [name for name in names if name == target]
        for target in targets
    }
    for target, matches in found.items():
        if not matches:
            ends = {name.split(".")[-1] for name in names} | {".".join(name.split(".")[-2:]) for name in names}
            close = difflib.get_close_matches(target, ends, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else f"The network has {', '.join(sorted(ends)[:20])}"
            raise FewstepError(
                "train.student.targets", repr(target), "the end of a linear or convolutional module's name", hint
            )
    return list(dict.fromkeys(chain.from_iterable(found.values())))


def under_adapters(denoiser: Denoiser, lora: LoraConfig, targets: Sequence[str]) -> Denoiser:
    """The denoiser's network under fresh adapters, which do nothing yet; all other tensors are its own, frozen."""
    shared = tuple(chain(denoiser.net.parameters(), denoiser.net.buffers()))
    net = copy.deepcopy(denoiser.net, {id(tensor): tensor for tensor in shared})
    peft = _peft()
    settings = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.rank if lora.alpha is None else lora.alpha, lora_dropout=lora.dropout,
        target_modules=adapted_modules(net, targets),
    )  # fmt: skip
    peft.inject_adapter_in_model(settings, net, NAME)
    student = denoiser.with_net(net)
    student.shared = shared
    return student.learnable()


def adapters(net: nn.Module) -> Iterator[tuple[str, "LoraLayer"]]:
    """Names, as the plain network has them, and adapted modules."""
    layer = _peft().tuners.lora.LoraLayer
    yield from ((name, module) for name, module in net.named_modules() if isinstance(module, layer))


def plain_copy(denoiser: Denoiser) -> "ModelMixin":
    """A frozen copy of the network in eval mode that shares nothing; adapters are merged into its weights."""
    net: ModelMixin = copy.deepcopy(denoiser.net)
    if denoiser.shared:
        for name, module in list(adapters(net)):
            module.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(net.get_submodule(parent), child, module.get_base_layer())
        for parameter in net.parameters():
            parameter.data = parameter.data.to(net.dtype)  # embeddings learn in float32 beside a base of any type
    return net.requires_grad_(False).eval()


def _peft() -> ModuleType:
    try:
        import peft
    except ImportError:
        raise MissingError(
            "train.student.kind", "lora without the package peft", "its package", "pip install peft"
        ) from None
    return peft
