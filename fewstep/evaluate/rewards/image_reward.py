"""ImageReward's network (Xu et al. 2023) out of transformers' BLIP: its own library does not import beside transformers 5."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.evaluate.rewards.files import not_weights, part_of, read_tensors

if TYPE_CHECKING:
    from transformers import BertTokenizer

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Mean and deviation by which its authors standardise the output."""
WORDS = 35
"""Tokens of a prompt, longer ones cut."""
HEAD_WIDTH = 64
"""Width of every attention head, in BERT and in the ViTs."""
VISION_NAMES = (
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^blocks\.(\d+)\.norm(\d)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
    (r"^norm\.", "post_layernorm."),
)
"""From the names of BLIP's own ViT to those of transformers."""


class ImageRewardNet(nn.Module):
    """The prompt's first token after BERT with attention to the image, through linear layers: [B]."""

    def __init__(
        self, vision: nn.Module, text: nn.Module, head: nn.Sequential, tokenizer: "BertTokenizer", side: int
    ) -> None:
        super().__init__()
        self.vision, self.text, self.head, self.tokenizer, self.side = vision, text, head, tokenizer, side

    def forward(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """pixels: preprocessed [B, 3, side, side]."""
        seen = self.vision(pixel_values=pixels).last_hidden_state
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=WORDS, return_tensors="pt"
        ).to(pixels.device)
        read = self.text(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
        ).last_hidden_state[:, 0]
        result: Tensor = (self.head(read).squeeze(1) - MEAN) / STD
        return result


def linear_stack(state: dict[str, Tensor]) -> nn.Sequential:
    """`layers.<i>.weight` and `.bias` in order, with nothing in between; KeyError where there is none, or one lacks its bias."""
    layers = []
    for i in sorted({int(key.split(".")[1]) for key in state}):
        weight, bias = state[f"layers.{i}.weight"], state[f"layers.{i}.bias"]
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
    if not layers:
        raise KeyError("layers.0.weight")
    return nn.Sequential(*layers)


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {}
    for key, value in state.items():
        for pattern, replacement in VISION_NAMES:
            if re.search(pattern, key):
                names[re.sub(pattern, replacement, key)] = value
    return names


def _layers(state: dict[str, Tensor], pattern: str) -> int:
    return len({m[1] for key in state if (m := re.match(pattern, key))})


def build(state: dict[str, Tensor], tokenizer: "BertTokenizer") -> ImageRewardNet:
    """The network whose sizes and weights are those of the file `ImageReward.pt`; KeyError or RuntimeError for another's."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    vision, text = part_of(state, "blip.visual_encoder."), part_of(state, "blip.text_encoder.")
    width, _, patch, _ = vision["patch_embed.proj.weight"].shape
    side = patch * round((vision["pos_embed"].shape[1] - 1) ** 0.5)
    words, hidden = text["embeddings.word_embeddings.weight"].shape
    eyes = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=width,
            intermediate_size=len(vision["blocks.0.mlp.fc1.weight"]),
            num_hidden_layers=_layers(vision, r"blocks\.(\d+)\."),
            num_attention_heads=width // HEAD_WIDTH,
            image_size=side,
            patch_size=patch,
            layer_norm_eps=1e-6,
        )
    )
    reader = BlipTextModel(
        BlipTextConfig(
            vocab_size=words,
            hidden_size=hidden,
            encoder_hidden_size=width,
            intermediate_size=len(text["encoder.layer.0.intermediate.dense.weight"]),
            num_hidden_layers=_layers(text, r"encoder\.layer\.(\d+)\."),
            num_attention_heads=hidden // HEAD_WIDTH,
            max_position_embeddings=len(text["embeddings.position_embeddings.weight"]),
            is_decoder=True,  # with attention to the image; its own attention still looks both ways
        ),
        add_pooling_layer=False,
    )
    eyes.load_state_dict(_renamed(vision))
    text.pop("embeddings.position_ids", None)  # 0, 1, 2, ...
    reader.load_state_dict(text)
    return ImageRewardNet(eyes, reader, linear_stack(part_of(state, "mlp.")), tokenizer, side)


def load_linear_stack(file: Path) -> nn.Sequential:
    """The linear layers of a file. Raises FewstepError for a file of other weights."""
    try:
        return linear_stack(read_tensors(file))
    except (KeyError, ValueError, RuntimeError) as e:
        raise not_weights(file, e, "weights of a stack of linear layers") from None


def load_image_reward(file: Path, words: Path) -> ImageRewardNet:
    """The network of a file, with the BERT tokenizer of a folder; ValueError for a file that holds something else."""
    from transformers import BertTokenizer

    try:
        return build(read_tensors(file), BertTokenizer.from_pretrained(words, local_files_only=True))
    except (KeyError, RuntimeError, OSError) as e:
        reason = str(e).strip().splitlines()[0]
        raise FewstepError(
            "reward", f"{file} and {words} ({reason})", "weights of ImageReward and the tokenizer of BERT"
        ) from None
