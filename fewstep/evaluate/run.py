"""Scores of a pipeline at several step counts, or of a folder of images, by a protocol: the rows of a report."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from fewstep.data.base import ConditionKind
from fewstep.errors import FewstepError
from fewstep.evaluate.conditions import load_conditions
from fewstep.evaluate.generate import batches, condition_kind, network, num_labels, sample
from fewstep.evaluate.protocol import NO_OVERRIDES, PathOverrides, Protocol
from fewstep.evaluate.real_images import count_images, real_images
from fewstep.evaluate.references import protocol_of, resolve
from fewstep.evaluate.report import Row
from fewstep.evaluate.rows import RowRunner, rank_and_world_size, sample_first
from fewstep.evaluate.scores import Scores, ScoringModels

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import DiffusionPipeline


def scoring_dtype(pipeline: "DiffusionPipeline") -> torch.dtype:
    """float64 for a pipeline of float64, otherwise float32."""
    return torch.float64 if next(network(pipeline).parameters()).dtype == torch.float64 else torch.float32


def evaluate_protocol(
    pipeline: "DiffusionPipeline",
    protocol: Protocol,
    *,
    protocol_name: str = "custom",
    overrides: PathOverrides = NO_OVERRIDES,
    name: str,
    steps: Sequence[int],
    batch_size: int = 100,
    guidance_scale: float | None = None,
    accelerator: "Accelerator | None" = None,
    keep: Path | None = None,
) -> list[Row]:
    """The protocol's scores, time, network evaluations and memory of a diffusers pipeline, one row per step count.

    The pipeline is on its device already; scoring is in float32, or beside a pipeline of float64 in float64. With an
    accelerator of several processes, all of them call this: each draws its share of the batches, and all return the same
    rows; scores do not depend on how many they are.
    `guidance_scale` None leaves the pipeline's own default; `seconds_per_image` is process time, scoring not included;
    `network_evaluations` is per image, two per step under classifier-free guidance; `peak_memory_gib` is the largest of the
    processes, on a GPU what torch allocated, otherwise what was ever resident.
    overrides: where the protocol's files lie. keep: a folder for the features of finished batches; the same call continues
    from them.

    Raises ValueError for what is missing or does not fit: files, conditions, resolution, features.
    """
    if batch_size < 1:
        raise FewstepError("batch_size", batch_size, "at least 1")
    device = torch.device(pipeline.device)
    conditions = load_conditions(protocol, condition_kind(pipeline), num_labels(pipeline), protocol_name, overrides)
    # Training resumes bit for bit only if scoring in between draws nothing from its random state.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        # The first call of a process pays for kernels and caches; it is not timed.
        first = sample_first(pipeline, protocol, conditions, steps[0], guidance_scale)
        side = first.shape[-1]
        if protocol.resolution is not None and first.shape[-2:] != (protocol.resolution,) * 2:
            raise FewstepError(
                "pipeline", f"images of {side} pixels", f"{protocol.resolution}, by protocol {protocol_name}"
            )
        models = ScoringModels(protocol_name, protocol, overrides, side, device, scoring_dtype(pipeline))
        run = RowRunner(
            pipeline,
            protocol,
            conditions,
            models,
            models.measure(first.to(device), conditions.prompts and conditions.prompts[:1]),
            name=name,
            batch_size=batch_size,
            guidance_scale=guidance_scale,
            accelerator=accelerator,
            keep=keep,
        )
        share = sum(map(len, batches(protocol.images, batch_size, run.rank, run.world_size)))
        rows = []
        with tqdm(total=share * len(steps), unit="image", disable=run.rank > 0) as bar:
            for n in steps:
                bar.set_description(f"{name}, {n} step{'s' * (n > 1)}")
                rows.append(run.row(n, bar))
    return rows


def evaluate_images(
    source: str,
    protocol: Protocol,
    *,
    protocol_name: str = "custom",
    overrides: PathOverrides = NO_OVERRIDES,
    name: str,
    batch_size: int = 100,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    accelerator: "Accelerator | None" = None,
) -> list[Row]:
    """The protocol's scores of the first images of a folder, of parquet files or of ADM's .npz, as one row.

    With an accelerator of several processes, all of them call this, each measures its share, and all return the same row.
    Prompts are the protocol's, in the order of the images' names. dtype: of the networks that score, float32 or float64.
    ValueError for too few images, or of another resolution.
    """
    place = device or torch.device("cpu")
    n = protocol.images
    kind: ConditionKind = "none" if protocol.conditions.source in ("labels", "none") else "prompt"
    conditions = load_conditions(protocol, kind, None, protocol_name, overrides)
    found = count_images(source)
    if found < n:
        raise FewstepError("images", f"{found} in {source}", f"at least {n}, by protocol {protocol_name}")
    first = next(real_images(source, (0,)))
    side = first.shape[-1]
    if protocol.resolution is not None and first.shape[-2:] != (protocol.resolution,) * 2:
        raise FewstepError(
            "images", f"{side} pixels in {source}", f"{protocol.resolution}, by protocol {protocol_name}"
        )
    models = ScoringModels(protocol_name, protocol, overrides, side, place, dtype)
    example = models.measure(first[None].to(place), conditions.prompts and conditions.prompts[:1])
    rank, world_size = rank_and_world_size(accelerator)
    scores = Scores(models, conditions, example, sync=world_size > 1, device=place)
    shares = batches(n, batch_size, rank, world_size)
    images = real_images(source, {i for share in shares for i in share})
    for share in shares:
        part = list(itertools.islice(images, len(share)))
        if any(image.shape != first.shape for image in part):
            raise FewstepError("images", f"several sizes in {source}", "one")
        values = models.measure(torch.stack(part).to(place), conditions.prompts_at(share))
        scores.update(share, values)
    nothing = {"steps": None, "guidance_scale": None, "seconds_per_image": None, "network_evaluations": None}
    return [{"model": name, "images": n, **nothing, **scores.compute()}]


def evaluate(
    pipeline: "DiffusionPipeline",
    *,
    name: str,
    reference: str,
    steps: Sequence[int],
    num_images: int,
    seed: int = 0,
    batch_size: int = 100,
    guidance_scale: float | None = None,
    accelerator: "Accelerator | None" = None,
    features: str | None = None,
    clip: str | None = None,
    prompts: Path | str | None = None,
    keep: Path | None = None,
) -> list[Row]:
    """`evaluate_protocol` by FID against one reference and CLIP score.

    `reference`, `features`, `clip`, `prompts`: see `fewstep.evaluate.reference.resolve`.

    Raises ValueError for an unknown reference, and for conditions that reference and pipeline do not share.
    """
    if num_images < 2 or batch_size < 1:
        raise FewstepError("num_images, batch_size", f"{num_images}, {batch_size}", "at least 2 and at least 1")
    return evaluate_protocol(
        pipeline,
        protocol_of(resolve(reference, features, clip, prompts), num_images=num_images, seed=seed),
        name=name,
        steps=steps,
        batch_size=batch_size,
        guidance_scale=guidance_scale,
        accelerator=accelerator,
        keep=keep,
    )


def first_images(
    pipeline: "DiffusionPipeline",
    *,
    reference: str,
    steps: int,
    count: int,
    seed: int = 0,
    guidance_scale: float | None = None,
    features: str | None = None,
    prompts: Path | str | None = None,
) -> Tensor:
    """The first `count` images of `evaluate` with the same arguments: uint8 [count, 3, H, W]."""
    protocol = protocol_of(resolve(reference, features, "none", prompts), num_images=max(2, count), seed=seed)
    conditions = load_conditions(protocol, condition_kind(pipeline), num_labels(pipeline)).conditions[:count]
    return sample(pipeline, conditions, range(count), steps=steps, seed=seed, guidance_scale=guidance_scale)
