"""Extra inputs of transformers: the guidance scale, and the target time's progress within a segment; attached and folded.

The transformers of diffusers have no place for either. Both enter where the timestep does: the network gets timesteps
[B, n], a column for each input, and its two modules of time read them.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn

from fewstep.diffusion.shapes import Embedded, Sinusoids, TimeInputs, Times
from fewstep.errors import FewstepError
from fewstep.teachers.denoiser import Inputs, Scale
from fewstep.teachers.embeddings.unet import EMBEDDING_DIM, HARMONICS, ProgressEmbedding, guidance_embedding, waves


class TimeModules(Protocol):
    """A module of a transformer that embeds the timestep."""

    time_proj: nn.Module
    timestep_embedder: nn.Module


class ExtraTimeProjection(nn.Module):
    """Sinusoids of timesteps [B]; of [B, n], those of the first column and behind them those of the extra inputs."""

    def __init__(self, inner: nn.Module, progress: bool, guidance: bool) -> None:
        super().__init__()
        self.inner, self.progress, self.guidance = inner, progress, guidance

    def forward(self, timestep: TimeInputs) -> Sinusoids:
        if timestep.ndim == 1:
            sinusoids: Tensor = self.inner(timestep)
            return sinusoids
        columns = timestep.unbind(1)
        parts = [self.inner(columns[0])]
        if self.progress:
            parts.append(waves(columns[1]))
        if self.guidance:
            parts.append(guidance_embedding(columns[-1]))
        return torch.cat(parts, dim=1)


class ExtraTimeEmbedding(TimestepEmbedding):
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

    def forward(self, sample: Sinusoids, condition: Tensor | None = None) -> Embedded:
        embedded: Tensor = super().forward(sample[:, : self.width], condition)
        if self.progress is not None:
            embedded = embedded + self.progress.of_waves(sample[:, self.width : self.width + HARMONICS])
        if self.guidance is not None:
            embedded = embedded + self.guidance(sample[:, -EMBEDDING_DIM:])
        return embedded

    @torch.no_grad()
    def folded(self, guidance_scale: float | None) -> TimestepEmbedding:
        """The plain embedding at the end of a segment and one guidance scale: constants in its last bias."""
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


def attach_inputs(parents: Sequence[TimeModules], progress: bool, guidance: bool) -> None:
    """Give a network's modules of time a place for extra inputs, in place."""
    for parent in parents:
        parent.time_proj = ExtraTimeProjection(parent.time_proj, progress, guidance)
        parent.timestep_embedder = ExtraTimeEmbedding(parent.timestep_embedder, progress, guidance)


def fold_inputs(parents: Sequence[TimeModules], guidance_scale: Scale | None) -> None:
    """Undo `attach_inputs`: the extra inputs become part of the weights, in place.

    Raises ValueError for a guidance_scale that was never embedded, for one embedded of which none is given: no stock
    pipeline would pass it, and for one that differs between timesteps.
    """
    if isinstance(guidance_scale, Mapping):
        raise FewstepError(
            "guidance_scale", "one for each timestep", "one number, which can be folded into a transformer"
        )
    embeds = _embeds(parents[0])[1]
    if guidance_scale is not None and not embeds:
        raise FewstepError("guidance_scale", guidance_scale, "null, for the student embeds no guidance")
    if guidance_scale is None and embeds:
        raise FewstepError(
            "guidance_scale",
            "null",
            "a number, for the stock pipeline cannot pass one to the student",
            "Set the one to fold",
        )
    for parent in parents:
        if isinstance(parent.time_proj, ExtraTimeProjection):
            parent.time_proj = parent.time_proj.inner
            assert isinstance(parent.timestep_embedder, ExtraTimeEmbedding)
            parent.timestep_embedder = parent.timestep_embedder.folded(guidance_scale)


def time_input(parent: TimeModules, time: Times, inputs: Inputs) -> TimeInputs:
    """The timestep argument of a network whose first module of time is `parent`: [B], or [B, n] with the extra inputs.

    time: the timesteps [B] in the network's own units. Raises ValueError where a guidance_scale or progress is given and
    not embedded, or embedded and not given.
    """
    progress, guidance = _embeds(parent)
    for name, value, embeds in (
        ("guidance", inputs.guidance_scale, guidance), ("progress", inputs.progress, progress)
    ):  # fmt: skip
        if embeds != (value is not None):
            raise ValueError(
                f"{name}: found {'none' if value is None else 'one'}; expected {'one' if embeds else 'none'} for this network"
            )
    if not isinstance(parent.time_proj, ExtraTimeProjection):
        return time
    given = [v.float() for v in (time, inputs.progress, inputs.guidance_scale) if v is not None]
    return torch.stack(given, dim=1)


def _embeds(parent: TimeModules) -> tuple[bool, bool]:
    """Whether a network embeds the progress, and the guidance scale."""
    projection = parent.time_proj
    if not isinstance(projection, ExtraTimeProjection):
        return False, False
    return projection.progress, projection.guidance
