"""Stage 2: a CLIP of the captions, whose text tower conditions the UNet."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextModel,
    CLIPTokenizer,
)

from fewstep.data.fashion import CLASSES, TEMPLATES, caption
from fewstep.io import atomic
from fewstep.pretrain.config import TeacherTraining
from fewstep.pretrain.data import Data, scaled
from fewstep.pretrain.loop import fit

MAX_TOKENS = 16
CAPTIONS = [caption(label, t) for label in range(len(CLASSES)) for t in range(len(TEMPLATES))]
"""Every distinct caption; that of `label` and template `t` is number `label * len(TEMPLATES) + t`."""


def build_tokenizer() -> CLIPTokenizer:
    """Byte-pair merges learnt from the captions until each of their words is one token."""
    words = sorted({word for text in CAPTIONS for word in text.replace("-", " - ").split()})
    split = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges: list[tuple[str, str]] = []
    while any(len(parts) > 1 for parts in split.values()):
        pairs = Counter(pair for parts in split.values() for pair in pairwise(parts))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word, parts in split.items():
            merged: list[str] = []
            for part in parts:
                # Greedy from the left, as the tokenizer applies a merge.
                if merged and (merged[-1], part) == best:
                    merged[-1] += part
                else:
                    merged.append(part)
            split[word] = merged
    alphabet = [chr(c) for c in range(33, 127)]
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *(a + b for a, b in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=MAX_TOKENS)


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_TOKENS,
        # The pooled output is read at the first of these; the default ids are those of the large vocabulary.
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "image_size": 32,
        "patch_size": 4,
        "hidden_size": 96,
        "intermediate_size": 288,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def caption_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    encoded = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    ids: Tensor = encoded.input_ids
    return ids


def image_embeddings(model: CLIPModel, pixels: Tensor) -> Tensor:
    pooled = model.vision_model(pixel_values=pixels).pooler_output
    return F.normalize(model.visual_projection(pooled), dim=-1)


def text_embeddings(model: CLIPModel, ids: Tensor) -> Tensor:
    pooled = model.text_model(input_ids=ids).pooler_output
    return F.normalize(model.text_projection(pooled), dim=-1)


def train_clip(config: TeacherTraining, data: Data, folder: Path) -> None:
    torch.manual_seed(config.seed + 1)
    tokenizer = build_tokenizer()
    model = build_clip(tokenizer)
    ids = caption_ids(tokenizer, CAPTIONS)
    batch = config.clip.batch_size

    def loss(generator: torch.Generator) -> Tensor:
        i = torch.randint(len(data.train_images), (batch,), generator=generator)
        labels = data.train_labels[i]
        templates = torch.randint(len(TEMPLATES), (batch,), generator=generator)
        texts = text_embeddings(model, ids)[labels * len(TEMPLATES) + templates]
        images = image_embeddings(model, scaled(data.train_images[i]))
        logits = model.logit_scale.clamp(max=4.6).exp() * images @ texts.T
        # Ten classes repeat within every batch: each caption of the same class is a positive.
        target = (labels[:, None] == labels[None]).float()
        target = target / target.sum(1, keepdim=True)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    fit("clip", model, loss, config.clip, folder, config.seed + 1, config.checkpoint_seconds)
    size = {"height": 32, "width": 32}
    processor = CLIPImageProcessor(size=size, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    with atomic(folder / "clip") as part:
        tokenizer.save_pretrained(part)
        processor.save_pretrained(part)
        model.save_pretrained(part)


def load_clip(folder: Path) -> tuple[CLIPModel, CLIPTokenizer]:
    model = CLIPModel.from_pretrained(folder / "clip").eval().requires_grad_(False)
    return model, CLIPTokenizer.from_pretrained(folder / "clip")


def text_tower(model: CLIPModel) -> CLIPTextModel:
    """The text encoder as Stable Diffusion uses it: without the projection."""
    tower = CLIPTextModel(model.config.text_config)
    weights = {k: v for k, v in model.state_dict().items() if k.startswith("text_model.")}
    tower.load_state_dict({k: weights[k if k in weights else f"text_model.{k}"] for k in tower.state_dict()})
    return tower.eval().requires_grad_(False)


@torch.no_grad()
def clip_scores(model: CLIPModel, tokenizer: CLIPTokenizer, images: Tensor, captions: list[str]) -> Tensor:
    """Cosine similarity [N, M] of uint8 images and captions."""
    texts = text_embeddings(model, caption_ids(tokenizer, captions))
    parts = [image_embeddings(model, scaled(part)) for part in images.split(500)]
    return torch.cat(parts) @ texts.T
