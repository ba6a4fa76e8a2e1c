"""Tiny pipelines of other families, from the real classes, scored as any pipeline is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.evaluate import evaluate_protocol
from fewstep.evaluate.generate import sample
from fewstep.evaluate.protocol import Protocol


def word_pieces(folder: Path) -> Any:
    """A CLIP tokenizer of single letters."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=8)


def text_config(tokenizer: Any, **more: Any) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, projection_dim=16, **more,
    )  # fmt: skip


def vae(channels: int) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=channels, sample_size=16, shift_factor=0.0,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def sdxl(folder: Path) -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    words = word_pieces(folder / "words")
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 2), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 16,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=vae(4), text_encoder=CLIPTextModel(text_config(words)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(words)), tokenizer=words, tokenizer_2=words, unet=unet,
        scheduler=EulerDiscreteScheduler(), add_watermarker=False,
    )  # fmt: skip


def sd3(folder: Path) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    words = word_pieces(folder / "words")
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, out_channels=4,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae(4),
        text_encoder=CLIPTextModelWithProjection(text_config(words)), tokenizer=words,
        text_encoder_2=CLIPTextModelWithProjection(text_config(words)), tokenizer_2=words,
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def dit(folder: Path) -> Any:
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000, norm_num_groups=4,
    )  # fmt: skip
    return DiTPipeline(transformer, vae(4), DDIMScheduler())


@pytest.mark.parametrize(("build", "guided"), [(sdxl, 2), (sd3, 2), (dit, 2)])
def test_every_family_is_scored_by_a_protocol(build: Any, guided: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    pipeline = build(tmp_path)
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps(p) + "\n" for p in ("a bag", "", "x, y")))
    labels = build is dit
    protocol = Protocol.model_validate(
        {
            "about": "a test",
            "images": 5,
            "conditions": {"source": "labels", "num_labels": 10, "draw": "random"}
            if labels
            else {"source": "prompts", "file": str(prompts)},
            "comparisons": [{"features": "fashion", "reference": "fashion", "metrics": ["fid"]}],
            "clip": None if labels else {"model": "fashion"},
        }
    )
    (row,) = evaluate_protocol(pipeline, protocol, name="x", steps=(2,), batch_size=3, guidance_scale=3.0)
    assert row["fid"] > 0 and row["images"] == 5 and row["network_evaluations"] == 2 * guided
    assert (row["clip_score"] is None) == labels


@pytest.mark.parametrize("build", [sdxl, sd3])
def test_images_of_other_families_depend_on_seed_and_index_only(build: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    pipeline = build(tmp_path)
    prompts = ["a bag", "", "x, y"]
    whole = sample(pipeline, prompts, range(3), steps=2, seed=1)
    for i in range(3):
        alone = sample(pipeline, [prompts[i]], [i], steps=2, seed=1)
        assert (alone[0].int() - whole[i].int()).abs().max() <= 1
    assert not torch.equal(sample(pipeline, prompts, range(3), steps=2, seed=2), whole)
