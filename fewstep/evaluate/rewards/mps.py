"""The network of the Multi-dimensional Preference Score (Zhang et al. 2024), around transformers' CLIP.

A CLIP ViT-H-14 gives tokens of the image and words of the prompt, both projected to one width. Layers of attention let the
image's tokens attend to those words that have to do with a condition, a list of what people judge images by. The score is the
cosine between the first token, as it then is, and the prompt's embedding, times the CLIP's scale.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.evaluate.rewards.files import MPS_CONVERSION, part_of, read_tensors

if TYPE_CHECKING:
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, texture, "
    "quantity, attributes, position, number, location, word, things."
)
"""The overall preference, the only one whose weights are published."""
THRESHOLD = 0.3
"""A word is looked at if its product with any of the condition's is above this share of the prompt's largest one, as in the
authors' benchmarks, which score one image at a time. (The forward of their module, for pairs, has 0.01.)"""
NAMES = (
    (r"^layers\.(\d+)\.0\.fn\.", r"\1.look."),
    (r"^layers\.(\d+)\.1\.fn\.", r"\1.think."),
    (r"rotary_emb\.inv_freq$", "frequencies"),
)
"""From the names of the published weights to those of `Cross`."""


class Gate(nn.Module):
    """SwiGLU: [..., 2 D] -> [..., D], the second half's SiLU times the first."""

    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return F.silu(gate) * value


def heads_of(x: Tensor, heads: int) -> Tensor:
    """[B, n, heads d] -> [B, heads, n, d]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    """Several queries, one key and value: q [B, heads, n, d], k and v [B, 1, m, d], seen [B, m] true where one may look ->
    [B, n, heads d]."""
    k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
    mask = None if seen is None else seen[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021): x [B, heads, n, d] whose halves are the pairs' parts; angles [n, d / 2]."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Look(nn.Module):
    """Image tokens [B, n, D] attend to words [B, m, D]; a feed-forward beside it."""

    def __init__(self, width: int, heads: int, head: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * head, bias=False)
        self.to_kv = nn.Linear(width, 2 * head, bias=False)
        self.to_out = nn.Linear(heads * head, width, bias=False)
        self.ff = nn.Sequential(nn.Linear(width, 2 * inner, bias=False), Gate(), nn.Linear(inner, width, bias=False))

    def forward(self, x: Tensor, words: Tensor, seen: Tensor) -> Tensor:
        x = self.norm(x)
        k, v = self.to_kv(words)[:, None].chunk(2, dim=-1)  # words are not normalised
        result: Tensor = self.to_out(attend(heads_of(self.to_q(x), self.heads), k, v, seen)) + self.ff(x)
        return result


class Think(nn.Module):
    """Image tokens [B, n, D] attend to each other; a feed-forward beside it, out of the same product."""

    frequencies: Tensor

    def __init__(self, width: int, heads: int, head: int, inner: int) -> None:
        super().__init__()
        self.heads, self.parts = heads, (heads * head, head, head, 2 * inner)
        self.norm = nn.LayerNorm(width)
        self.register_buffer("frequencies", torch.zeros(head // 2))  # the file has them
        self.fused_attn_ff_proj = nn.Linear(width, sum(self.parts), bias=False)
        self.attn_out = nn.Linear(heads * head, width, bias=False)
        self.ff_out = nn.Sequential(Gate(), nn.Linear(inner, width, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, ff = self.fused_attn_ff_proj(self.norm(x)).split(self.parts, dim=-1)
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * self.frequencies
        attended = attend(rotated(heads_of(q, self.heads), angles), rotated(k[:, None], angles), v[:, None])
        result: Tensor = self.attn_out(attended) + self.ff_out(ff)
        return result


class Layer(nn.Module):
    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.look, self.think = Look(*sizes), Think(*sizes)

    def forward(self, x: Tensor, words: Tensor, seen: Tensor) -> Tensor:
        x = x + self.look(x, words, seen)
        result: Tensor = x + self.think(x)
        return result


class Cross(nn.ModuleList):
    """Image tokens [B, n, D], words [B, m, D] and which of these are looked at, [B, m] -> image tokens."""

    def __init__(self, layers: int, width: int, heads: int, head: int, inner: int) -> None:
        super().__init__(Layer(width, heads, head, inner) for _ in range(layers))

    def forward(self, x: Tensor, words: Tensor, seen: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, words, seen)
        return x


class MpsNet(nn.Module):
    """Preprocessed pixels [B, 3, side, side] and B prompts -> [B], differentiable in the pixels."""

    def __init__(self, clip: "CLIPModel", cross: Cross, tokenizer: "CLIPTokenizer") -> None:
        super().__init__()
        self.clip, self.cross, self.tokenizer = clip, cross, tokenizer

    def forward(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        words, ends, seen = self.read(prompts, pixels.device)
        # Not the norm that CLIP itself puts behind its first token.
        tokens = self.clip.visual_projection(self.clip.vision_model(pixel_values=pixels).last_hidden_state)
        result: Tensor = self.clip.logit_scale.exp() * F.cosine_similarity(self.cross(tokens, words, seen)[:, 0], ends)
        return result

    @torch.no_grad()
    def read(self, prompts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Words [B, n, D], the embeddings [B, D] at their ends, and which of the words are looked at, [B, n].

        Padding counts as words, as in training. Products are divided by the largest of each prompt, so that no prompt matters
        to another.
        """
        ids = self.tokenizer(
            [*prompts, CONDITION], padding="max_length", truncation=True, return_tensors="pt",
            max_length=self.clip.config.text_config.max_position_embeddings,
        ).input_ids.to(device)  # fmt: skip
        words = self.clip.text_projection(self.clip.text_model(input_ids=ids).last_hidden_state)
        # The first end token has the largest number; configs of the day named another.
        ends = words[torch.arange(len(ids), device=device), ids.argmax(1)]
        words, condition = words[:-1], words[-1]
        nearest = (words @ condition.T).amax(2)
        return words, ends[:-1], nearest / nearest.amax(1, keepdim=True) > THRESHOLD


def build(state: dict[str, Tensor], config: "CLIPConfig", tokenizer: "CLIPTokenizer") -> MpsNet:
    """The network of a state dict with a CLIP of this CLIPConfig; KeyError or RuntimeError for another network's weights."""
    from transformers import CLIPModel

    clip = CLIPModel(config)
    # Older versions of transformers keep 0, 1, 2, ... among the weights.
    clip.load_state_dict({k: v for k, v in part_of(state, "model.").items() if not k.endswith(".position_ids")})
    weights = {}
    for key, value in part_of(state, "cross_model.").items():
        for pattern, replacement in NAMES:
            key = re.sub(pattern, replacement, key)
        weights[key] = value
    inner_heads, width = weights["0.look.to_q.weight"].shape
    head, inner = len(weights["0.look.to_kv.weight"]) // 2, weights["0.look.ff.2.weight"].shape[1]
    layers = len({key.split(".")[0] for key in weights})
    cross = Cross(layers, width, inner_heads // head, head, inner)
    cross.load_state_dict(weights)
    return MpsNet(clip, cross, tokenizer)


def load_mps(file: Path, clip: Path) -> MpsNet:
    """The network of a file of tensors, with the config and the tokenizer of the CLIP in a folder.

    ValueError, in one sentence, for a file that holds something else, such as the published one, a whole pickled module.
    """
    from transformers import CLIPConfig, CLIPTokenizer

    try:
        state = read_tensors(file)
    except ValueError:
        raise FewstepError(
            "reward 'mps'", f"{file}, which cannot be read as tensors alone", "tensors of MPS", MPS_CONVERSION
        ) from None
    try:
        config = CLIPConfig.from_pretrained(clip, local_files_only=True)
        return build(state, config, CLIPTokenizer.from_pretrained(clip, local_files_only=True))
    except (KeyError, RuntimeError, OSError) as e:
        raise FewstepError("reward 'mps'", f"{file} ({str(e).strip().splitlines()[0]})", "the weights of MPS") from None
