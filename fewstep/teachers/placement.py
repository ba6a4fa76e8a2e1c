"""Placement of the networks of a teacher's pipeline: on the device, in main memory, or not loaded."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin

NETWORKS = ("unet", "transformer")
"""Names of the denoising network in pipelines."""

Reload = Callable[[Sequence[str]], Mapping[str, nn.Module]]
"""Loads parts of a pipeline again, by name, in float32 on the CPU."""


class Placement:
    """Freezes the networks of one pipeline and moves them.

    A part that is away is None in the pipeline: a stray use fails at once.

    Attributes:
        text_parts: names of the parts that turn prompts into conditions; some of them may be None in the pipeline.
        image_parts: names of the parts that turn images into latents and back.
        reload: loads parts again, which then leave main memory too; None = they wait in main memory.
        away: name -> the part that waits in main memory, or None for one that will be loaded again.
        moved: called after the pipeline was moved: what was computed before is on another device or of another type.
    """

    def __init__(
        self,
        pipeline: "DiffusionPipeline",
        network: nn.Module,
        text_parts: Sequence[str] = (),
        image_parts: Sequence[str] = (),
    ) -> None:
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
        self.pipeline, self.network = pipeline, network
        self.text_parts, self.image_parts = tuple(text_parts), tuple(image_parts)
        self.reload: Reload | None = None
        self.away: dict[str, nn.Module | None] = {}
        self.moved: list[Callable[[], None]] = []
        self._execution_device: torch.device | None = None
        self._float32: dict[str, ModelMixin] = {}

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of all parts beside the denoising network."""
        return self.text_parts + self.image_parts

    @property
    def device(self) -> torch.device:
        """Device of the network, of conditions and of latents."""
        return self._execution_device or next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the network's weights."""
        return next(self.network.parameters()).dtype

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the pipeline, but for parts that are away."""
        # A type it has already is not asked for: diffusers would warn of layers that it keeps in float32, and name none.
        self.pipeline.to(device=device, dtype=None if self.pipeline.dtype == dtype else dtype)
        self._float32.clear()
        for callback in self.moved:
            callback()

    # The denoising network --------------------------------------------------------------------------------------------

    @property
    def offloaded(self) -> bool:
        """Whether the network's weights are in main memory, see `offload`."""
        return self._execution_device is not None

    def offload(self) -> None:
        """Keep the network's weights in main memory; each layer's are on its device only while it is called.

        Gradients may pass through it: what a backward pass needs stays on the device until it is over.
        """
        from accelerate import cpu_offload

        self._execution_device = self.device
        cpu_offload(self.network, self._execution_device)

    def onload(self) -> None:
        """Undo `offload`, if the network is offloaded."""
        from accelerate.hooks import remove_hook_from_submodules

        if self.offloaded:
            remove_hook_from_submodules(self.network)
            self._execution_device = None

    # The other parts --------------------------------------------------------------------------------------------------

    def part(self, name: str) -> "ModelMixin":
        """A part of the pipeline, recalled if it was released."""
        self.recall((name,))
        return self.pipeline.components[name]

    def part_in_float32(self, name: str) -> "ModelMixin":
        """The part itself, or a copy of it in float32 that is kept until the part moves or leaves."""
        own = self.part(name)
        if own.dtype == torch.float32:
            return own
        if name not in self._float32:
            self._float32[name] = in_dtype(own, torch.float32)
        return self._float32[name]

    def release(self, names: Sequence[str]) -> None:
        """Take parts off the device, and out of main memory where they can be loaded again.

        `Teacher.condition`, `encode`, `decode` and `students.pipeline` recall what they need, and keep it. Whoever calls the
        pipeline itself does so within `whole`. Names of parts that the pipeline does not have, or no longer, are ignored.
        """
        for name in names:
            self._float32.pop(name, None)
            part = self.pipeline.components.get(name)
            if part is not None:
                self.away[name] = None if self.reload is not None else part.to("cpu")
                self.pipeline.register_modules(**{name: None})

    def recall(self, names: Sequence[str]) -> None:
        """Bring those of these parts that are away to the network's device and type, frozen."""
        needed = [name for name in names if name in self.away]
        gone = [name for name in needed if self.away[name] is None]
        back: dict[str, nn.Module | None] = {name: self.away[name] for name in needed}
        if gone and self.reload is not None:
            back |= self.reload(gone)
        for name, part in back.items():
            assert part is not None  # parts leave main memory only where they can be loaded again
            part.requires_grad_(False).eval().to(device=self.device, dtype=self.dtype)
            self.pipeline.register_modules(**{name: part})
            del self.away[name]

    @contextmanager
    def whole(self) -> Iterator[None]:
        """A block in which the pipeline has all of its parts; those that were away leave again after it."""
        away, offloaded = tuple(self.away), self.offloaded
        self.onload()
        self.recall(away)
        try:
            yield
        finally:
            self.release(away)
            if offloaded:
                self.offload()


def in_dtype(module: "ModelMixin", dtype: torch.dtype) -> "ModelMixin":
    """The module itself where it has that dtype, otherwise a converted copy: the teacher's own must not change."""
    return module if module.dtype == dtype else copy.deepcopy(module).to(dtype)
