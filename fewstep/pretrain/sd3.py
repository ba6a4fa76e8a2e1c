"""A small MMDiT, a rectified flow (Esser et al. 2024), on Fashion-MNIST's latents and captions: a stock SD3 pipeline."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from fewstep.data.fashion import TEMPLATES
from fewstep.pretrain.clip import CAPTIONS, MAX_TOKENS, load_clip
from fewstep.pretrain.config import SD3Training
from fewstep.pretrain.loop import best_device, stratified
from fewstep.pretrain.transformer import ASSET, load_latents, load_vae, run_stages, start_at_zero, train

WIDTH = 128
"""Width of text tokens: SD3 concatenates those of two CLIP encoders, here twice the same one."""
T5_TOKENS = 256
"""Tokens of the third encoder in the pipeline's call."""


def build_sd3(config: SD3Training) -> SD3Transformer2DModel:
    net = SD3Transformer2DModel(
        sample_size=8,
        patch_size=config.patch_size,
        in_channels=4,
        out_channels=4,
        num_layers=config.layers,
        num_attention_heads=config.heads,
        attention_head_dim=config.head_width,
        caption_projection_dim=config.heads * config.head_width,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=8 // config.patch_size,
    )
    norms = [norm for block in net.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    start_at_zero([*(norm.linear for norm in norms), net.norm_out.linear, net.proj_out])
    return net


def load_encoder() -> tuple[CLIPTextModelWithProjection, CLIPTokenizer]:
    """The text tower of the embedded CLIP, with its projection."""
    clip, tokenizer = load_clip(ASSET)
    config = clip.config.text_config.to_dict() | {"projection_dim": clip.config.projection_dim}
    encoder = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config))
    weights = clip.state_dict()
    encoder.load_state_dict({name: weights[name] for name in encoder.state_dict()})
    return encoder.eval().requires_grad_(False), tokenizer


def build_silent_t5() -> tuple[T5EncoderModel, T5Tokenizer]:
    """A T5 whose states are all zero, as where SD3 is used without: a folder that lacks it would not load."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    tokenizer = T5Tokenizer(vocab=[*pieces, *((c, -3.0) for c in "abcdefghijklmnopqrstuvwxyz")], extra_ids=0)
    config = T5Config(vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    encoder = T5EncoderModel(config)
    nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder.eval().requires_grad_(False), tokenizer


def build_pipeline(config: SD3Training, vae: AutoencoderKL) -> StableDiffusion3Pipeline:
    clip, clip_tokenizer = load_encoder()
    t5, t5_tokenizer = build_silent_t5()
    return StableDiffusion3Pipeline(
        transformer=build_sd3(config),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=config.shift),
        vae=vae,
        text_encoder=clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=clip,
        tokenizer_2=clip_tokenizer,
        text_encoder_3=t5,
        tokenizer_3=t5_tokenizer,
    )


@torch.no_grad()
def caption_states(pipeline: StableDiffusion3Pipeline) -> tuple[Tensor, Tensor]:
    """Tokens and pooled states of every caption, then of the empty prompt, with one token of the T5's 256 equal ones:
    [len(CAPTIONS) + 1, 17, 128] and [len(CAPTIONS) + 1, 128]."""
    states, _, pooled, _ = pipeline.encode_prompt(
        [*CAPTIONS, ""], None, None, do_classifier_free_guidance=False, max_sequence_length=T5_TOKENS
    )
    return states[:, : MAX_TOKENS + 1], pooled


class LastTextToken:
    """SD3's attention with a last text token that stands for `count` equal ones.

    Tokens without positions that are equal at first are equal after every block. Instead of 256 such, one is computed and
    its key counts 256 times: the same, ten times faster.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: object
    ) -> tuple[Tensor, Tensor]:
        """Image tokens [B, N, C] and text tokens [B, M, C] to what the block adds to each."""
        image, text = hidden_states, encoder_hidden_states

        def heads(of_image: nn.Linear, of_text: nn.Linear) -> Tensor:
            return torch.cat([of_image(image), of_text(text)], 1).unflatten(2, (attn.heads, -1)).transpose(1, 2)

        query, key = heads(attn.to_q, attn.add_q_proj), heads(attn.to_k, attn.add_k_proj)
        bias = query.new_zeros(1, key.shape[2])
        bias[0, -1] = math.log(self.count)
        mixed = F.scaled_dot_product_attention(query, key, heads(attn.to_v, attn.add_v_proj), attn_mask=bias)
        to_image, to_text = mixed.transpose(1, 2).flatten(2).split([image.shape[1], text.shape[1]], 1)
        return attn.to_out[0](to_image), to_text if attn.context_pre_only else attn.to_add_out(to_text)


def train_sd3(config: SD3Training, folder: Path) -> None:
    torch.manual_seed(config.seed)
    device, n = best_device(), config.denoiser.batch_size
    vae = load_vae()
    latents = load_latents(config, vae, folder, centred=True)
    pipeline = build_pipeline(config, vae)
    states, pooled = (x.to(device) for x in caption_states(pipeline))
    net = pipeline.transformer.to(device)
    net.set_attn_processor(LastTextToken(T5_TOKENS))  # a saved pipeline has the stock one again
    network = torch.compile(net, mode="reduce-overhead") if config.compile else net

    def loss(generator: torch.Generator) -> Tensor:
        x0, labels = latents.draw(n, generator)
        texts = labels * len(TEMPLATES) + torch.randint(len(TEMPLATES), (n,), generator=generator)
        texts[torch.rand(n, generator=generator) < config.no_condition] = len(CAPTIONS)
        # Logit-normal (Esser et al. 2024, equation 19, with location 0 and scale 1), by the inverse of its distribution.
        sigma = torch.special.ndtri(stratified(n, generator).clamp(1e-5, 1 - 1e-5)).sigmoid()
        noise = torch.randn(x0.shape, generator=generator)
        noisy = x0.lerp(noise, sigma[:, None, None, None])
        noisy, target, t, texts = (x.to(device, non_blocking=True) for x in (noisy, noise - x0, 1000 * sigma, texts))
        text = {"encoder_hidden_states": states[texts], "pooled_projections": pooled[texts]}
        return F.mse_loss(network(noisy, timestep=t, **text).sample, target)

    train(config, pipeline, loss, folder)


def run(config: SD3Training) -> None:
    """Write the trained pipeline to output_dir/pipeline, then its figures and its samples beside it."""
    run_stages(config, train_sd3)
