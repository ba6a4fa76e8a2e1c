"""CLIP score: how well images fit their prompts (Hessel et al. 2021, without the paper's factor 2.5)."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from fewstep.assets import ASSETS, asset_path
from fewstep.evaluate.features import Preprocess, load_preprocess

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer


def _embedding(output: Any) -> Tensor:
    # transformers 4 returns the projected embedding, transformers 5 an output that holds it as its pooled output.
    embedding: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return F.normalize(embedding.float(), dim=-1)


class Clip(nn.Module):
    """A transformers CLIPModel with its tokenizer and preprocessing: unit embeddings [B, D] of images and texts."""

    def __init__(self, name: str, model: "CLIPModel", tokenizer: "CLIPTokenizer", preprocess: Preprocess) -> None:
        super().__init__()
        self.name, self.model, self.tokenizer, self.preprocess = name, model, tokenizer, preprocess
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def image_embeddings(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> [B, D]."""
        pixels = self.preprocess(images.to(self.preprocess.mean.device))
        return _embedding(self.model.get_image_features(pixel_values=pixels))

    @torch.no_grad()
    def text_embeddings(self, texts: Sequence[str]) -> Tensor:
        """B texts -> [B, D]; a long text loses its last words, never the end token at which CLIP reads it."""
        tokens = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.preprocess.mean.device)
        features = self.model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return _embedding(features)


def clip_folder(name: str) -> Path:
    """An asset's CLIP, or the folder of that name."""
    if name in ASSETS:
        return asset_path(name) / "clip"
    if not (Path(name) / "config.json").exists():
        raise ValueError(f"clip {name!r}: neither one of {', '.join(ASSETS)} nor a folder of a transformers CLIPModel")
    return Path(name)


def load_clip(name: str) -> Clip:
    """`fashion`, or the folder of a transformers CLIPModel with tokenizer and image processor."""
    from transformers import CLIPModel, CLIPTokenizer

    folder = clip_folder(name)
    model = CLIPModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    return Clip(name, model, tokenizer, load_preprocess(folder))


class ClipScore(Metric):
    """Mean over pairs of 100 * max(cosine, 0); sums over the processes of torch.distributed."""

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    count: Tensor
    sum: Tensor

    def __init__(self, clip: Clip, *, sync_on_compute: bool = True) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        self.clip = clip
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, images: Tensor, prompts: Sequence[str]) -> None:
        """uint8 images [B, 3, H, W] and their B prompts."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        cosine = (self.clip.image_embeddings(images) * self.clip.text_embeddings(prompts)).sum(1)
        self.sum += (100 * cosine.double().clamp(min=0)).sum()
        self.count += len(images)

    def compute(self) -> Tensor:
        return self.sum / self.count
