"""B noisy samples with all that a denoiser is called with."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.diffusion.guidance import GuidedDenoiser, Network
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.shapes import Rows, Samples, Scales, Times
from fewstep.teachers.denoiser import Cond, DenoiserLike

CONDITION = "cond."


@dataclass(frozen=True)
class NoisyBatch:
    """B noisy samples at timesteps of their own.

    Attributes:
        x: states.
        t: timesteps.
        cond: conditions.
        guidance_scale: None = no guidance.
    """

    x: Samples
    t: Times
    cond: Cond
    guidance_scale: Scales | None = None

    def __len__(self) -> int:
        return len(self.x)

    def with_x(self, x: Samples, t: Times | None = None) -> "NoisyBatch":
        """Other states, and timesteps, of the same samples."""
        return replace(self, x=x, t=self.t if t is None else t)

    def rows(self, on: Rows) -> "NoisyBatch":
        """Some of the samples, by index or mask."""
        scale = None if self.guidance_scale is None else self.guidance_scale[on]
        return NoisyBatch(self.x[on], self.t[on], {key: v[on] for key, v in self.cond.items()}, scale)

    def to(self, device: torch.device) -> "NoisyBatch":
        scale = None if self.guidance_scale is None else self.guidance_scale.to(device)
        cond = {key: v.to(device) for key, v in self.cond.items()}
        return NoisyBatch(self.x.to(device), self.t.to(device), cond, scale)

    @staticmethod
    def cat(parts: "list[NoisyBatch]") -> "NoisyBatch":
        """The samples of all parts, which have the same conditions by name; guided only if all parts are."""
        if len(parts) == 1:
            return parts[0]
        scales = [p.guidance_scale for p in parts if p.guidance_scale is not None]
        return NoisyBatch(
            torch.cat([p.x for p in parts]),
            torch.cat([p.t for p in parts]),
            {key: torch.cat([p.cond[key] for p in parts]) for key in parts[0].cond},
            torch.cat(scales) if len(scales) == len(parts) else None,
        )

    def denoised(self, network: DenoiserLike, embedded: bool) -> Prediction:
        """A student's prediction; embedded: whether it receives the guidance scale."""
        return network(self.x, self.t, self.cond, self.guidance_scale if embedded else None)

    def guided(self, teacher: Network, uncond: Cond) -> GuidedDenoiser:
        """The teacher with the samples' conditions and guidance; uncond: null conditions of at least B samples."""
        null = {key: v[: len(self.x)] for key, v in uncond.items()}
        return GuidedDenoiser(teacher, self.cond, null, self.guidance_scale)

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors by name, for a checkpoint."""
        named = {"x": self.x, "t": self.t} | {CONDITION + key: v for key, v in self.cond.items()}
        return named if self.guidance_scale is None else named | {"scale": self.guidance_scale}

    @staticmethod
    def from_state_dict(tensors: Mapping[str, Tensor]) -> "NoisyBatch":
        """The inverse of `state_dict`; other names are left alone."""
        cond = {k.removeprefix(CONDITION): v for k, v in tensors.items() if k.startswith(CONDITION)}
        return NoisyBatch(tensors["x"], tensors["t"], cond, tensors.get("scale"))
