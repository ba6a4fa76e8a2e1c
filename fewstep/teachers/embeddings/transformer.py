"""How a transformer is told the target time within a segment and the guidance scale, and how that is folded away for export.

The transformers of diffusers have no place for either. Both enter where the timestep does: the network is given
timesteps [B, n], a column for each thing that it is told, and its two modules of time read them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn

from fewstep.teachers.denoiser import Scale
from fewstep.teachers.embeddings.unet import HARMONICS, ProgressEmbedding, waves
from fewstep.teachers.families.sd import EMBEDDING_DIM, guidance_embedding


class ToldProjection(nn.Module):
    """Sinusoids of timesteps [B]; of [B, n], those of the first column and behind them those of the other things told."""

    def __init__(self, inner: nn.Module, progress: bool, guidance: bool) -> None:
        super().__init__()
        self.inner, self.progress, self.guidance = inner, progress, guidance

    def forward(self, timestep: Tensor) -> Tensor:
        if timestep.ndim == 1:
            return self.inner(timestep)  # type: ignore[no-any-return]
        columns = timestep.unbind(1)
        parts = [self.inner(columns[0])]
        if self.progress:
            parts.append(waves(columns[1]))
        if self.guidance:
            parts.append(guidance_embedding(columns[-1]))
        return torch.cat(parts, dim=1)


class ToldEmbedding(TimestepEmbedding):  # type: ignore[misc]  # diffusers is not typed
    """A TimestepEmbedding, under its own weights' names, plus embeddings that are zero at the start of training."""

    def __init__(self, plain: TimestepEmbedding, progress: bool, guidance: bool) -> None:
        width, dim = plain.linear_1.in_features, plain.linear_2.out_features
        super().__init__(width, dim)
        # The very modules, which may be another network's, too.
        self.linear_1, self.linear_2 = plain.linear_1, plain.linear_2
        self.width = width
        self.progress = ProgressEmbedding(dim) if progress else None
        self.guidance = nn.Linear(EMBEDDING_DIM, dim, bias=False) if guidance else None
        if self.guidance is not None:
            nn.init.zeros_(self.guidance.weight)
        for added in (self.progress, self.guidance):
            if added is not None:
                added.to(plain.linear_1.weight.device, plain.linear_1.weight.dtype)

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        embedded: Tensor = super().forward(sample[:, : self.width], condition)
        if self.progress is not None:
            embedded = embedded + self.progress.of_waves(sample[:, self.width : self.width + HARMONICS])
        if self.guidance is not None:
            embedded = embedded + self.guidance(sample[:, -EMBEDDING_DIM:])
        return embedded

    @torch.no_grad()
    def folded(self, guidance_scale: float | None) -> TimestepEmbedding:
        """The plain embedding that tells the end of a segment and one guidance scale: constants in its last bias."""
        state, bias = self.state_dict(), self.linear_2.bias.double()
        one = torch.ones(1, device=bias.device)
        if self.progress is not None:
            bias = bias + self.progress(one)[0].double()
        if self.guidance is not None and guidance_scale is not None:
            bias = bias + self.guidance.weight.double() @ guidance_embedding(guidance_scale * one)[0].double()
        plain = TimestepEmbedding(self.width, self.linear_2.out_features).to(bias.device, self.linear_2.bias.dtype)
        state = {key: state[key] for key in plain.state_dict()} | {"linear_2.bias": bias.to(self.linear_2.bias.dtype)}
        plain.load_state_dict(state)
        return plain


def attach(parents: Sequence[Any], progress: bool, guidance: bool) -> None:
    """Give networks' modules of time (those with a `time_proj` and a `timestep_embedder`) a place for what is told."""
    for parent in parents:
        parent.time_proj = ToldProjection(parent.time_proj, progress, guidance)
        parent.timestep_embedder = ToldEmbedding(parent.timestep_embedder, progress, guidance)


def fold(parents: Sequence[Any], guidance_scale: Scale | None) -> None:
    """Undo `attach`: what was told becomes part of the weights, in place.

    Raises ValueError for a guidance_scale that was never embedded, for one embedded of which none is given: no stock
    pipeline would tell it, and for one that differs between timesteps.
    """
    if isinstance(guidance_scale, Mapping):
        raise ValueError("a guidance scale for each timestep cannot be folded into a transformer: give one number")
    embeds = isinstance(parents[0].time_proj, ToldProjection) and parents[0].time_proj.guidance
    if guidance_scale is not None and not embeds:
        raise ValueError(f"guidance_scale is {guidance_scale}, but the student has no guidance embedding")
    if guidance_scale is None and embeds:
        raise ValueError("the student embeds the guidance scale, which its stock pipeline cannot pass: set one to fold")
    for parent in parents:
        if isinstance(parent.time_proj, ToldProjection):
            parent.time_proj = parent.time_proj.inner
            parent.timestep_embedder = parent.timestep_embedder.folded(guidance_scale)


def columns(parent: Any, t: Tensor, guidance_scale: Tensor | None, progress: Tensor | None) -> Tensor:
    """The timestep argument of a network whose first module of time is `parent`: [B], or [B, n] with what is told.

    Raises ValueError where a guidance_scale or progress is given and not embedded, or embedded and not given.
    """
    told = isinstance(parent.time_proj, ToldProjection)
    for name, value, embeds in (
        ("guidance", guidance_scale, told and parent.time_proj.guidance),
        ("progress", progress, told and parent.time_proj.progress),
    ):
        if embeds != (value is not None):
            raise ValueError(
                f"the network has {'a' if embeds else 'no'} {name} embedding and was given "
                f"{'none' if value is None else 'one'}"
            )
    if not told:
        return t
    given = [v.float() for v in (t, progress, guidance_scale) if v is not None]
    return torch.stack(given, dim=1)
