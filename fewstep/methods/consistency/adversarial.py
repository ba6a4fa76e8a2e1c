"""The adversarial loss of phased consistency (Wang et al. 2024, PCM): phases' ends by the student against their targets.

The discriminator is a head on each of some feature maps of the frozen teacher, which looks at both with more noise on them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewstep.diffusion.prediction import more_noise
from fewstep.diffusion.shapes import FeatureMap, Logits, Samples, Times
from fewstep.methods.discriminator import Head, features
from fewstep.methods.noisy_batch import NoisyBatch
from fewstep.teachers.base import Teacher
from fewstep.teachers.denoiser import Cond


@dataclass(frozen=True)
class Ends:
    """States at the end of a phase by the student and by its target, at timesteps t."""

    fake: Samples
    real: Samples
    t: Times
    cond: Cond

    def carried(self) -> dict[str, Tensor]:
        """The tensors that a batch carries to the discriminator's step, without gradient."""
        named = {"fake": self.fake.detach(), "real": self.real, "end": self.t}
        return named | {f"cond.{key}": value for key, value in self.cond.items()}

    @staticmethod
    def from_carried(tensors: Mapping[str, Tensor]) -> "Ends":
        cond = {k.removeprefix("cond."): v for k, v in tensors.items() if k.startswith("cond.")}
        return Ends(tensors["fake"], tensors["real"], tensors["end"], cond)


class Discriminator(nn.Module):
    """Feature maps to logits, which rise with realism."""

    def __init__(self, heads: Sequence[Head]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, given: Sequence[FeatureMap]) -> Logits:
        with torch.autocast(given[0].device.type, enabled=False):
            return torch.cat([head(f) for head, f in zip(self.heads, given, strict=True)], dim=1)


def new_discriminator(teacher: Teacher, layers: Sequence[str]) -> Discriminator:
    """Fresh heads, of the size that a probe finds."""
    device = teacher.placement.device
    x, t = torch.zeros(1, *teacher.latent_shape, device=device), torch.zeros(1, dtype=torch.long, device=device)
    with torch.no_grad():
        found = features(teacher.denoiser, layers, NoisyBatch(x, t, teacher.null_condition(1)))
    return Discriminator([Head(*f.shape[1:]).to(device) for f in found])


def times_in_phase(end: Times, span: int, total: int) -> Times:
    """A time for each end, drawn uniformly from the end's own to the last of its phase of `span` timesteps."""
    step = (torch.rand(len(end), device=end.device) * span).floor()
    return (end + step.to(end.dtype)).clamp(0, total - 1)


def judge(teacher: Teacher, layers: Sequence[str], x: Samples, ends: Ends, t: Times) -> list[FeatureMap]:
    """The teacher's features of x, at the ends' timesteps, with noise added up to timesteps t.

    The noise comes by the exact kernel. As in the paper, t is the same for real and fake, the noise another.
    """
    x_t = more_noise(teacher.schedule, x, torch.randn_like(x), ends.t, t)
    return features(teacher.denoiser, layers, NoisyBatch(x_t, t, ends.cond))
