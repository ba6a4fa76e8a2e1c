"""Small networks where every image reward looks for its real one."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from fewstep.assets import asset_path
from fewstep.evaluate.rewards.files import AESTHETIC_CLIP, DOWNLOADS, IMAGE_REWARD_WORDS, PICKSCORE, PICKSCORE_PROCESSOR


def image_reward_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of ImageReward.pt, in a small size: two layers of width 128, images of 32 pixels."""
    vision, text, shapes = "blip.visual_encoder", "blip.text_encoder", dict[str, tuple[int, ...]]()

    def linear(name: str, out: int, of: int) -> None:
        shapes.update({f"{name}.weight": (out, of), f"{name}.bias": (out,)})

    def norm(name: str) -> None:
        shapes.update({f"{name}.weight": (128,), f"{name}.bias": (128,)})

    shapes |= {f"{vision}.cls_token": (1, 1, 128), f"{vision}.pos_embed": (1, 5, 128)}
    shapes |= {f"{vision}.patch_embed.proj.weight": (128, 3, 16, 16), f"{vision}.patch_embed.proj.bias": (128,)}
    for block in (f"{vision}.blocks.{i}" for i in range(2)):
        norm(f"{block}.norm1")
        linear(f"{block}.attn.qkv", 384, 128)
        linear(f"{block}.attn.proj", 128, 128)
        norm(f"{block}.norm2")
        linear(f"{block}.mlp.fc1", 512, 128)
        linear(f"{block}.mlp.fc2", 128, 512)
    norm(f"{vision}.norm")
    shapes |= {f"{text}.embeddings.{k}_embeddings.weight": (n, 128) for k, n in (("word", 60), ("position", 64))}
    norm(f"{text}.embeddings.LayerNorm")
    for layer in (f"{text}.encoder.layer.{i}" for i in range(2)):
        for attention in ("attention", "crossattention"):
            for part in ("self.query", "self.key", "self.value", "output.dense"):
                linear(f"{layer}.{attention}.{part}", 128, 128)
            norm(f"{layer}.{attention}.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", 256, 128)
        linear(f"{layer}.output.dense", 128, 256)
        norm(f"{layer}.output.LayerNorm")
    for i, of, out in ((0, 128, 1024), (2, 1024, 128), (4, 128, 64), (6, 64, 16), (7, 16, 1)):
        linear(f"mlp.layers.{i}", out, of)
    return shapes


def image_reward_state() -> dict[str, Tensor]:
    """Weights that numpy draws, so that they are the same wherever the library's numbers were made."""
    rng = np.random.RandomState(0)
    state = {}
    for name, shape in image_reward_shapes().items():
        scale = 0.3 if len(shape) < 2 or "embed" in name else shape[-1] ** -0.5
        drawn = scale * rng.standard_normal(shape).astype(np.float32)
        one = name.endswith("weight") and len(shape) == 1
        state[name] = torch.from_numpy(drawn + np.float32(one))
    return state


def mps_state(clip: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    """Names and kinds of MPS's state dict as transformers 4.27 and its own modules wrote it: two layers, four heads of 16."""
    g = torch.Generator().manual_seed(0)
    state = {f"model.{key}": value.clone() for key, value in clip.items()}
    for part, n in (("text", 16), ("vision", 65)):
        state[f"model.{part}_model.embeddings.position_ids"] = torch.arange(n)[None]

    def linear(name: str, out: int, of: int) -> None:
        state[f"{name}.weight"] = torch.randn(out, of, generator=g) * of**-0.5

    linear("model.text_projection", width, 64)  # in which words differ enough for some of them to be masked
    for layer in (f"cross_model.layers.{i}" for i in range(2)):
        for block in (f"{layer}.0.fn", f"{layer}.1.fn"):
            state[f"{block}.norm.weight"] = 1 + 0.1 * torch.randn(width, generator=g)
            state[f"{block}.norm.bias"] = torch.zeros(width)
        linear(f"{layer}.0.fn.to_q", 64, width)
        linear(f"{layer}.0.fn.to_kv", 32, width)
        linear(f"{layer}.0.fn.to_out", width, 64)
        linear(f"{layer}.0.fn.ff.0", 8 * width, width)
        linear(f"{layer}.0.fn.ff.2", width, 4 * width)
        state[f"{layer}.1.fn.rotary_emb.inv_freq"] = 10000.0 ** (-torch.arange(8) / 8)
        linear(f"{layer}.1.fn.fused_attn_ff_proj", 64 + 16 + 16 + 8 * width, width)
        linear(f"{layer}.1.fn.attn_out", width, 64)
        linear(f"{layer}.1.fn.ff_out.1", width, 4 * width)
    return state


def letters(folder: Path) -> None:
    """A BERT vocabulary of letters."""
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *alphabet, *(f"##{letter}" for letter in alphabet)]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))


def small_rewards(root: Path) -> None:
    """Fills a folder for $FEWSTEP_DATA."""
    from transformers import CLIPModel

    models, clip = root / "models", asset_path("fashion") / "clip"
    for name in (AESTHETIC_CLIP, PICKSCORE_PROCESSOR):
        (models / name).parent.mkdir(parents=True, exist_ok=True)
        (models / name).symlink_to(clip)
    model = CLIPModel.from_pretrained(clip)
    with torch.no_grad():
        model.logit_scale.fill_(1.5)
    model.save_pretrained(models / PICKSCORE)  # without tokenizer and image processor, as the hub's
    torch.manual_seed(0)
    width = model.config.projection_dim
    head = torch.nn.Sequential(
        torch.nn.Linear(width, 16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 4), torch.nn.Linear(4, 1)
    )
    torch.save({f"layers.{key}": value for key, value in head.state_dict().items()}, models / "head.pth")
    (models / "head.pth").rename(models / DOWNLOADS["aesthetic"].file)
    mps = mps_state(model.state_dict(), width)
    save_file({key: value.contiguous() for key, value in mps.items()}, models / DOWNLOADS["mps"].file)
    letters(models / IMAGE_REWARD_WORDS)
    torch.save(image_reward_state(), models / DOWNLOADS["image_reward"].file)
