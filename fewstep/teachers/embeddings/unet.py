"""How a UNet is told the target time within a segment, and how that is folded away for export."""

import math
from typing import Any

import torch
from torch import Tensor, nn

HARMONICS = 16


def waves(progress: Tensor) -> Tensor:
    """Cosines of progress [B] as [B, HARMONICS] in float32."""
    order = torch.arange(HARMONICS, device=progress.device, dtype=torch.float32)
    return torch.cos(math.pi * order * progress.float()[:, None])


class ProgressEmbedding(nn.Module):
    """Progress [B] in [0, 1] to a vector [B, dim] that is added to the time embedding; zero at the start of training."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.inner = nn.Linear(HARMONICS, dim)
        self.outer = nn.Linear(dim, dim)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, progress: Tensor) -> Tensor:
        return self.of_waves(waves(progress))

    def of_waves(self, waves: Tensor) -> Tensor:
        embedded: Tensor = self.outer(nn.functional.silu(self.inner(waves.to(self.inner.weight.dtype))))
        return embedded


class ToldLabels(nn.Embedding):
    """A UNet's embedding of labels, under its own weight's name; of (label, progress) [B, 2], plus that of the progress."""

    def __init__(self, plain: nn.Embedding) -> None:
        super().__init__(plain.num_embeddings, plain.embedding_dim)
        self.weight = plain.weight  # the very tensor, which may be another network's, too
        self.progress = ProgressEmbedding(plain.embedding_dim).to(plain.weight.device, plain.weight.dtype)

    def forward(self, labels: Tensor) -> Tensor:
        return super().forward(labels[:, 0].long()) + self.progress(labels[:, 1])

    def plain(self) -> nn.Embedding:
        return nn.Embedding(self.num_embeddings, self.embedding_dim, _weight=self.weight.detach()).requires_grad_(False)


def attach_progress(unet: Any) -> None:
    """Give a UNet2DModel or UNet2DConditionModel a ProgressEmbedding, in place.

    It takes the slot of a class embedding, whose output those networks add to the time embedding. Raises ValueError
    where that slot is taken, or where something else follows the time embedding.
    """
    if unet.class_embedding is not None or unet.config.get("class_embed_type") is not None:
        raise ValueError("the UNet embeds class labels in the place where the target time would go")
    if unet.time_embedding.post_act is not None:
        raise ValueError(
            "the UNet has an activation after its time embedding (time_embedding_act_fn), so a target time cannot be folded"
        )
    unet.class_embedding = ProgressEmbedding(unet.time_embedding.linear_2.out_features).to(unet.device, unet.dtype)


@torch.no_grad()
def fold_progress(unet: Any) -> None:
    """Make the end of a segment (progress 1) part of the UNet's weights, in place; without one that is told, nothing.

    The embedding is added after the time embedding's last linear layer, so at one progress it is a constant in its bias.
    """
    embedding = unet.class_embedding
    labelled = isinstance(embedding, ToldLabels)
    if not labelled and not isinstance(embedding, ProgressEmbedding):
        return
    bias = unet.time_embedding.linear_2.bias
    bias += (embedding.progress if labelled else embedding)(torch.ones(1, device=bias.device))[0].to(bias.dtype)
    unet.class_embedding = embedding.plain() if labelled else None
