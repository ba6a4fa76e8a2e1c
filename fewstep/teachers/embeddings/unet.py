"""Extra inputs of UNets: the guidance scale, and the target time's progress within a segment; attached and folded."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from fewstep.diffusion.shapes import Embedded, Scales, Sinusoids, Times
from fewstep.errors import FewstepError
from fewstep.teachers.denoiser import Scale
from fewstep.teachers.placement import in_dtype

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel, UNet2DModel

# Progress ---------------------------------------------------------------------------------------------------------------

HARMONICS = 16


def waves(progress: Times) -> Sinusoids:
    """HARMONICS cosines of progress in float32."""
    order = torch.arange(HARMONICS, device=progress.device, dtype=torch.float32)
    return torch.cos(math.pi * order * progress.float()[:, None])


class ProgressEmbedding(nn.Module):
    """Progress in [0, 1] to a vector that is added to the time embedding; zero at the start of training."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.inner = nn.Linear(HARMONICS, dim)
        self.outer = nn.Linear(dim, dim)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, progress: Times) -> Embedded:
        return self.of_waves(waves(progress))

    def of_waves(self, waves: Sinusoids) -> Embedded:
        embedded: Tensor = self.outer(nn.functional.silu(self.inner(waves.to(self.inner.weight.dtype))))
        return embedded


class LabelProgressEmbedding(nn.Embedding):
    """A UNet's embedding of labels, under its own weight's name; of (label, progress) [B, 2], plus that of the progress."""

    def __init__(self, plain: nn.Embedding) -> None:
        super().__init__(plain.num_embeddings, plain.embedding_dim)
        self.weight = plain.weight  # the very tensor, which may be another network's, too
        self.progress = ProgressEmbedding(plain.embedding_dim).to(plain.weight.device, plain.weight.dtype)

    def forward(self, labels: Shaped[Tensor, "b 2"]) -> Embedded:
        return super().forward(labels[:, 0].long()) + self.progress(labels[:, 1])

    def plain(self) -> nn.Embedding:
        return nn.Embedding(self.num_embeddings, self.embedding_dim, _weight=self.weight.detach()).requires_grad_(False)


def attach_progress(unet: "UNet2DModel | UNet2DConditionModel") -> None:
    """Give a UNet a ProgressEmbedding, in place.

    It takes the slot of a class embedding, whose output those networks add to the time embedding. Raises ValueError
    where that slot is taken, or where something else follows the time embedding.
    """
    if unet.class_embedding is not None or unet.config.get("class_embed_type") is not None:
        raise FewstepError(
            "UNet", "class labels in the slot of the target time's embedding", "a UNet without class_embed_type"
        )
    if unet.time_embedding.post_act is not None:
        raise FewstepError(
            "UNet",
            "an activation after its time embedding (time_embedding_act_fn)",
            "none, so that a target time can be folded",
        )
    unet.class_embedding = ProgressEmbedding(unet.time_embedding.linear_2.out_features).to(unet.device, unet.dtype)


@torch.no_grad()
def fold_progress(unet: "UNet2DModel | UNet2DConditionModel") -> None:
    """Make the end of a segment (progress 1) part of the UNet's weights, in place; nothing for one without the embedding.

    The embedding is added after the time embedding's last linear layer, so at one progress it is a constant in its bias.
    """
    embedding = unet.class_embedding
    labelled = isinstance(embedding, LabelProgressEmbedding)
    if not labelled and not isinstance(embedding, ProgressEmbedding):
        return
    bias = unet.time_embedding.linear_2.bias
    bias += (embedding.progress if labelled else embedding)(torch.ones(1, device=bias.device))[0].to(bias.dtype)
    unet.class_embedding = embedding.plain() if labelled else None


# Guidance scale ---------------------------------------------------------------------------------------------------------

EMBEDDING_DIM = 256
"""Width of the guidance scale's embedding (Luo et al. 2023); also `time_cond_proj_dim` of an exported UNet."""

COND_PROJ = "time_embedding.cond_proj.weight"


def guidance_embedding(guidance_scale: Scales, dim: int = EMBEDDING_DIM) -> Sinusoids:
    """Sinusoids of w = guidance_scale - 1 in float32: sin, then cos, of 1000 w 10000^(-j / (H - 1))."""
    half = dim // 2
    frequencies = torch.exp(
        torch.arange(half, dtype=torch.float32) * -(torch.log(torch.tensor(10000.0)) / (half - 1))
    ).to(guidance_scale.device)
    angles = (guidance_scale.float() - 1)[:, None] * 1000.0 * frequencies[None]
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return nn.functional.pad(embedding, (0, dim % 2))


def with_guidance_embedding(unet: "UNet2DConditionModel") -> "UNet2DConditionModel":
    """A copy of a UNet2DConditionModel with a zero-initialised guidance embedding: the same function for any scale."""
    from diffusers import UNet2DConditionModel

    # A keyword, not a key of the config: diffusers overrules config entries that the source left at their default.
    wider = UNet2DConditionModel.from_config(unet.config, time_cond_proj_dim=EMBEDDING_DIM)
    missing, unexpected = wider.load_state_dict(unet.state_dict(), strict=False)
    if set(missing) != {COND_PROJ} or unexpected:
        raise FewstepError(
            "UNet", f"missing weights {missing} and unexpected {unexpected}", "the weights of its config"
        )
    nn.init.zeros_(wider.time_embedding.cond_proj.weight)
    return in_dtype(wider, unet.dtype).to(unet.device)


def attach_guidance(unet: "UNet2DConditionModel") -> None:
    """Give a UNet2DConditionModel a zero-initialised guidance embedding, in place: the same function for any scale."""
    embedding = unet.time_embedding
    embedding.cond_proj = nn.Linear(EMBEDDING_DIM, embedding.linear_1.in_features, bias=False).to(unet.device)
    nn.init.zeros_(embedding.cond_proj.weight)
    unet.register_to_config(time_cond_proj_dim=EMBEDDING_DIM)


@torch.no_grad()
def fold_guidance(unet: "UNet2DConditionModel", guidance_scale: Scale) -> None:
    """Bake a guidance scale, or one for each timestep, into the UNet, in place; its embedding then has no effect.

    The embedding is added to the sinusoids of t before a linear layer. So it is a constant in that layer's bias; and as
    sinusoids of different timesteps are linearly independent, scales that differ are a part of its weight.
    """
    embedding = unet.time_embedding
    layer, projection = embedding.linear_1, embedding.cond_proj.weight.double()
    scales = list(guidance_scale.values()) if isinstance(guidance_scale, Mapping) else [guidance_scale]
    embedded = guidance_embedding(torch.tensor(scales, device=projection.device), projection.shape[1]).double()
    shifts = embedded @ projection.T @ layer.weight.double().T
    if isinstance(guidance_scale, Mapping):
        shift_at(layer, unet.time_proj(torch.tensor(list(guidance_scale), device=projection.device)), shifts)
    else:
        layer.bias += shifts[0].to(layer.bias.dtype)
    embedding.cond_proj.weight.zero_()


@torch.no_grad()
def shift_at(layer: nn.Linear, inputs: Float[Tensor, "n i"], shifts: Float[Tensor, "n o"]) -> None:
    """Move a layer's outputs at inputs by shifts, exactly, with the least change of its weight, in place.

    Raises ValueError where the inputs are linearly dependent, so that no weight does.
    """
    inputs, shifts = inputs.double(), shifts.double()
    mean = shifts.mean(dim=0)
    change = torch.linalg.pinv(inputs) @ (shifts - mean)
    error = (inputs @ change - (shifts - mean)).abs().max()
    if error > 1e-6 * shifts.abs().max():
        raise FewstepError(
            "inputs",
            f"{len(inputs)} of {inputs.shape[1]} numbers",
            "linearly independent ones, to shift each in a linear layer",
        )
    layer.weight.add_(change.T.to(layer.weight.dtype))
    layer.bias.add_(mean.to(layer.bias.dtype))
