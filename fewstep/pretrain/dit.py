"""A small DiT (Peebles & Xie 2023) on Fashion-MNIST's latents and labels: a stock DiTPipeline."""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import Tensor, nn

from fewstep.data.fashion import CLASSES
from fewstep.pretrain.config import DiTTraining
from fewstep.pretrain.loop import best_device, stratified
from fewstep.pretrain.transformer import load_latents, load_vae, run_stages, start_at_zero, train

NULL_LABEL = 1000
"""The unconditional label of DiTPipeline, fixed by its code: so the network has 1,000 classes, of which ten are used."""


def build_dit(config: DiTTraining) -> DiTTransformer2DModel:
    net = DiTTransformer2DModel(
        num_layers=config.layers,
        num_attention_heads=config.heads,
        attention_head_dim=config.head_width,
        in_channels=4,
        out_channels=4,
        sample_size=8,
        patch_size=config.patch_size,
        num_embeds_ada_norm=NULL_LABEL,
    )
    for block in net.transformer_blocks:
        labels = block.norm1.emb.class_embedder
        # Its own dropout would leave out a label in some blocks and not in others.
        labels.dropout_prob = 0.0
        nn.init.normal_(labels.embedding_table.weight, std=0.02)
    start_at_zero([*(block.norm1.linear for block in net.transformer_blocks), net.proj_out_1, net.proj_out_2])
    return net


def build_scheduler(config: DiTTraining) -> DDIMScheduler:
    """DiT's 1,000 linear betas; trailing timesteps, so that one step starts at t = 999, where training ends."""
    return DDIMScheduler(
        beta_schedule="linear",
        beta_start=0.0001,
        beta_end=0.02,
        prediction_type=config.prediction_type,
        timestep_spacing="trailing",
        clip_sample=False,
    )


def train_dit(config: DiTTraining, folder: Path) -> None:
    torch.manual_seed(config.seed)
    device, n = best_device(), config.denoiser.batch_size
    vae = load_vae()
    latents = load_latents(config, vae, folder)
    net, scheduler = build_dit(config).to(device), build_scheduler(config)
    network = torch.compile(net, mode="reduce-overhead") if config.compile else net

    def loss(generator: torch.Generator) -> Tensor:
        x0, labels = latents.draw(n, generator)
        labels[torch.rand(n, generator=generator) < config.no_condition] = NULL_LABEL
        t = (stratified(n, generator) * 1000).long()
        noise = torch.randn(x0.shape, generator=generator)
        noisy = scheduler.add_noise(x0, noise, t)
        target = noise if config.prediction_type == "epsilon" else scheduler.get_velocity(x0, noise, t)
        noisy, target, t, labels = (x.to(device, non_blocking=True) for x in (noisy, target, t, labels))
        return F.mse_loss(network(noisy, timestep=t, class_labels=labels).sample, target)

    names = dict(enumerate(CLASSES))
    pipeline = DiTPipeline(transformer=net, vae=vae, scheduler=scheduler, id2label=names)
    pipeline.register_to_config(id2label=names)  # the class itself keeps them for this object only
    train(config, pipeline, loss, folder)


def run(config: DiTTraining) -> None:
    """Write the trained pipeline to output_dir/pipeline, then its figures and its samples beside it."""
    run_stages(config, train_dit)
