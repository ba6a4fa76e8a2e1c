"""One pipeline, one reference, several step counts: the rows of a report."""

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from fewstep.evaluate.clip_score import ClipScore
from fewstep.evaluate.frechet import FrechetDistance
from fewstep.evaluate.generate import batches, condition_kind, counted, num_labels, sample
from fewstep.evaluate.reference import Reference, Subjects, load_reference, resolve, subjects

if TYPE_CHECKING:
    from collections.abc import Sequence

    from accelerate import Accelerator

log = logging.getLogger(__name__)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _place(accelerator: "Accelerator | None") -> tuple[int, int]:
    """This process's rank, and how many there are."""
    return (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)


def check_indices(indices: "Sequence[int]", num_images: int) -> None:
    """RuntimeError unless every index 0 ... num_images - 1 stands there exactly once, in any order."""
    if sorted(indices) != list(range(num_images)):
        missing, extra = set(range(num_images)) - set(indices), len(indices) - len(set(indices))
        raise RuntimeError(
            f"scored {len(indices)} images instead of {num_images}: {len(missing)} missing, {extra} twice"
        )


def _row(
    pipeline: Any,
    reference: Reference,
    what: Subjects,
    bar: "tqdm[Any]",
    *,
    name: str,
    steps: int,
    num_images: int,
    seed: int,
    batch_size: int,
    guidance_scale: float | None,
    accelerator: "Accelerator | None",
) -> dict[str, Any]:
    rank, world = _place(accelerator)
    device = torch.device(pipeline.device)
    # Without an accelerator this process scores alone, even where torch.distributed is up.
    fid = FrechetDistance(reference.features, reference.moments, sync_on_compute=world > 1).to(device)
    clip: ClipScore | None = None
    if reference.clip is not None and what.prompts is not None:
        clip = ClipScore(reference.clip, sync_on_compute=world > 1).to(device)
    seconds, indices = 0.0, list[int]()
    with counted(pipeline) as evaluations:
        for part in batches(num_images, batch_size, rank, world):
            _synchronize(device)
            start = time.perf_counter()
            images = sample(
                pipeline,
                [what.conditions[i] for i in part],
                part,
                steps=steps,
                seed=seed,
                guidance_scale=guidance_scale,
            )
            _synchronize(device)
            seconds += time.perf_counter() - start
            images = images.to(device)
            fid.update(images)
            if clip is not None and what.prompts is not None:
                clip.update(images, [what.prompts[i] for i in part])
            indices += part
            bar.update(len(part))
    count = evaluations.count
    if world > 1:
        from accelerate.utils import gather_object

        shares = gather_object([(indices, seconds, count)])
        indices = [i for share in shares for i in share[0]]
        seconds, count = sum(share[1] for share in shares), sum(share[2] for share in shares)
    check_indices(indices, num_images)
    return {
        "model": name,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "fid": float(fid.compute()),
        "clip_score": None if clip is None else float(clip.compute()),
        "images": num_images,
        "seconds_per_image": seconds / num_images,
        "network_evaluations": count / num_images,
    }


def evaluate(
    pipeline: Any,
    *,
    name: str,
    reference: str,
    steps: "Sequence[int]",
    num_images: int,
    seed: int = 0,
    batch_size: int = 100,
    guidance_scale: float | None = None,
    accelerator: "Accelerator | None" = None,
    features: str | None = None,
    clip: str | None = None,
    prompts: Path | str | None = None,
) -> list[dict[str, Any]]:
    """FID, CLIP score, time and network evaluations of a diffusers pipeline, one row per step count.

    The pipeline is on its device already. With an accelerator of several processes, all of them call this: each draws
    its share of the batches, and all return the same rows; scores do not depend on how many they are.
    `guidance_scale` None leaves the pipeline's own default; `seconds_per_image` is process time, scoring not included;
    `network_evaluations` is per image, two per step under classifier-free guidance.
    `reference`, `features`, `clip`, `prompts`: see `fewstep.evaluate.reference.resolve`.

    Raises ValueError for an unknown reference, and for conditions that reference and pipeline do not share.
    """
    if num_images < 2 or batch_size < 1:
        raise ValueError(f"num_images must be at least 2 and batch_size at least 1, got {num_images} and {batch_size}")
    sources = resolve(reference, features, clip, prompts)
    device = torch.device(pipeline.device)
    what = subjects(sources, condition_kind(pipeline), num_images, num_labels(pipeline))
    # Training resumes bit for bit only if scoring in between draws nothing from its random state.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        loaded = load_reference(sources, device)
        dimensions = len(loaded.moments.mean)
        if num_images <= dimensions:
            log.warning("FID of %d images in %d dimensions: compare only with the same number", num_images, dimensions)
        # The first call of a process pays for kernels and caches; it is not timed.
        sample(pipeline, what.conditions[:1], [0], steps=steps[0], seed=seed, guidance_scale=guidance_scale)
        rank, world = _place(accelerator)
        share = sum(map(len, batches(num_images, batch_size, rank, world)))
        rows = []
        with tqdm(total=share * len(steps), unit="image", disable=rank > 0) as bar:
            for n in steps:
                bar.set_description(f"{name}, {n} step{'s' * (n > 1)}")
                row = _row(
                    pipeline,
                    loaded,
                    what,
                    bar,
                    name=name,
                    steps=n,
                    num_images=num_images,
                    seed=seed,
                    batch_size=batch_size,
                    guidance_scale=guidance_scale,
                    accelerator=accelerator,
                )
                rows.append(row)
    return rows


def first_images(
    pipeline: Any, *, reference: str, steps: int, count: int, seed: int = 0, guidance_scale: float | None = None
) -> Tensor:
    """The first `count` images of `evaluate` with the same arguments: uint8 [count, 3, H, W]."""
    what = subjects(resolve(reference), condition_kind(pipeline), count, num_labels(pipeline))
    return sample(pipeline, what.conditions, range(count), steps=steps, seed=seed, guidance_scale=guidance_scale)
