"""Placement of the teacher during training: its device, and CPU offloading."""

from dataclasses import dataclass

import torch

from fewstep import io
from fewstep.config import MemoryConfig, TrainConfig
from fewstep.teachers.base import Teacher


@dataclass(frozen=True)
class Offloading:
    """CPU offloading of the teacher's pipeline.

    Attributes:
        parts: whether text encoders and autoencoder leave the device after each use.
        network: whether the weights of the teacher's network do, layer by layer.
    """

    teacher: Teacher
    parts: bool = False
    network: bool = False

    @classmethod
    def of(cls, memory: MemoryConfig, teacher: Teacher, device: torch.device) -> "Offloading":
        """Offloading by the settings, on devices that have a memory of their own."""
        separate = device.type != "cpu"
        offloading = cls(teacher, memory.offload and separate, memory.offload_teacher and separate)
        if offloading.parts:
            teacher.placement.reload = None  # keep them in main memory instead of reading their files again
        return offloading

    def move_teacher(self, device: torch.device, train: TrainConfig, encoded: bool, needs_images: bool) -> None:
        """The teacher to the device, but for parts that nothing will call: they never take the device's memory.

        encoded: whether prompts and images are encoded already.
        """
        placement = self.teacher.placement
        placement.release(placement.text_parts if encoded else ())
        placement.release(placement.image_parts if encoded or not needs_images else ())
        self.release_parts()
        placement.to(device, io.torch_dtype(train.base_dtype))

    def release_parts(self) -> None:
        """Take parts that were used off the device."""
        if self.parts:
            self.teacher.placement.release(self.teacher.placement.parts)

    def offload_network(self) -> None:
        if self.network:
            self.teacher.placement.offload()
