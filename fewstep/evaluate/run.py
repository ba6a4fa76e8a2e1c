"""One pipeline, one protocol, several step counts: the rows of a report."""

import itertools
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from fewstep import io
from fewstep.evaluate.generate import (
    ConditionKind,
    batches,
    condition_kind,
    counted,
    network,
    num_labels,
    remaining_batches,
    sample,
)
from fewstep.evaluate.protocol import Protocol
from fewstep.evaluate.references import (
    NOTHING,
    Given,
    Subjects,
    count_images,
    protocol_of,
    real_images,
    resolve,
    subjects,
)
from fewstep.evaluate.resume import Keeper, Measured
from fewstep.evaluate.reuse import fingerprints
from fewstep.evaluate.scores import Instruments, Scores

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from accelerate import Accelerator


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _place(accelerator: "Accelerator | None") -> tuple[int, int]:
    """This process's rank, and how many there are."""
    return (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)


def _peak_memory(device: torch.device) -> float:
    """GiB: what torch allocated on a GPU since the row began, or the most that this process ever had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # Windows has none, and no use for it on a GPU

    # In KiB but on a Mac, where it is in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def check_indices(indices: "Sequence[int]", num_images: int) -> None:
    """RuntimeError unless every index 0 ... num_images - 1 stands there exactly once, in any order."""
    if sorted(indices) != list(range(num_images)):
        missing, extra = set(range(num_images)) - set(indices), len(indices) - len(set(indices))
        raise RuntimeError(
            f"scored {len(indices)} images instead of {num_images}: {len(missing)} missing, {extra} twice"
        )


class _Run:
    """What all rows of one evaluation share."""

    def __init__(
        self,
        pipeline: Any,
        protocol: Protocol,
        what: Subjects,
        instruments: Instruments,
        example: dict[str, Tensor],
        *,
        name: str,
        batch_size: int,
        guidance_scale: float | None,
        accelerator: "Accelerator | None",
        keep: Path | None,
    ) -> None:
        self.pipeline, self.protocol, self.what, self.instruments = pipeline, protocol, what, instruments
        self.example = example
        self.name, self.batch_size, self.guidance_scale = name, batch_size, guidance_scale
        self.accelerator, self.keep = accelerator, keep
        self.device = torch.device(pipeline.device)
        self.rank, self.world = _place(accelerator)
        self.fingerprints = fingerprints(pipeline) if keep is not None else {}

    def row(self, steps: int, bar: "tqdm[Any]") -> dict[str, Any]:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        # Without an accelerator this process scores alone, even where torch.distributed is up.
        sync = self.world > 1
        scores = Scores(self.instruments, self.what, self.example, sync=sync, device=self.device)
        seconds, count, indices = 0.0, 0, list[int]()
        for batch in self._measured(steps):
            scores.update(batch.indices, batch.values)
            seconds, count, indices = seconds + batch.seconds, count + batch.evaluations, indices + batch.indices
            bar.update(len(batch.indices))
        memory = _peak_memory(self.device)
        if self.world > 1:
            from accelerate.utils import gather_object

            shares = gather_object([(indices, seconds, count, memory)])
            indices = [i for share in shares for i in share[0]]
            seconds, count = sum(share[1] for share in shares), sum(share[2] for share in shares)
            memory = max(share[3] for share in shares)
        n = self.protocol.images
        check_indices(indices, n)
        computed = scores.compute()
        return {
            "model": self.name,
            "steps": steps,
            "guidance_scale": self.guidance_scale,
            "fid": computed.pop("fid"),
            "clip_score": computed.pop("clip_score"),
            "images": n,
            "seconds_per_image": seconds / n,
            "network_evaluations": count / n,
            "peak_memory_gib": memory,
            **computed,
        }

    def _measured(self, steps: int) -> "Iterator[Measured]":
        """This process's batches: those that were kept, then those that are left to draw."""
        if self.keep is None:
            yield from map(self._draw(steps), batches(self.protocol.images, self.batch_size, self.rank, self.world))
            return
        settings = {
            "protocol": self.protocol.hash(),
            "conditions": fingerprint_of(self.what),
            "pipeline": self.fingerprints,
            "steps": steps,
            "guidance_scale": self.guidance_scale,
        }
        keeper = Keeper(self.keep / f"{steps}_steps", settings)
        files = keeper.files()
        done = [i for file in files for i in keeper.indices(file)]
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()  # all have listed before any goes on
        for file in files[self.rank :: self.world]:
            yield keeper.load(file)
        draw = self._draw(steps)
        for part in remaining_batches(done, self.protocol.images, self.batch_size, self.rank, self.world):
            batch = draw(part)
            keeper.save(batch)
            yield batch

    def _draw(self, steps: int) -> Any:
        def draw(part: "Sequence[int]") -> Measured:
            with counted(self.pipeline) as evaluations:
                _synchronize(self.device)
                start = time.perf_counter()
                images = self.sample(part, steps)
                _synchronize(self.device)
                seconds = time.perf_counter() - start
            prompts = None if self.what.prompts is None else [self.what.prompts[i] for i in part]
            values = self.instruments.measure(images.to(self.device), prompts)
            return Measured(list(part), values, seconds, evaluations.count)

        return draw

    def sample(self, part: "Sequence[int]", steps: int) -> Tensor:
        return sample(
            self.pipeline,
            [self.what.conditions[i] for i in part],
            part,
            steps=steps,
            seed=self.protocol.seed,
            guidance_scale=self.guidance_scale,
            uint8=self.protocol.uint8,
        )


def scoring_dtype(pipeline: Any) -> torch.dtype:
    """float64 for a pipeline of float64, else float32."""
    return torch.float64 if next(network(pipeline).parameters()).dtype == torch.float64 else torch.float32


def fingerprint_of(what: Subjects) -> str:
    return io.sha256(repr((list(what.conditions), what.prompts)), 16)


def evaluate_protocol(
    pipeline: Any,
    protocol: Protocol,
    *,
    protocol_name: str = "custom",
    given: Given = NOTHING,
    name: str,
    steps: "Sequence[int]",
    batch_size: int = 100,
    guidance_scale: float | None = None,
    accelerator: "Accelerator | None" = None,
    keep: Path | None = None,
) -> list[dict[str, Any]]:
    """The protocol's scores, time, network evaluations and memory of a diffusers pipeline, one row per step count.

    The pipeline is on its device already; scoring is in float32, or beside a pipeline of float64 in float64. With an
    accelerator of several processes, all of them call this: each draws its share of the batches, and all return the same
    rows; scores do not depend on how many they are.
    `guidance_scale` None leaves the pipeline's own default; `seconds_per_image` is process time, scoring not included;
    `network_evaluations` is per image, two per step under classifier-free guidance; `peak_memory_gib` is the largest of the
    processes, on a GPU what torch allocated, else what was ever resident.
    given: where the protocol's files lie. keep: a folder for the features of finished batches, from which the same call goes on.

    Raises ValueError for what is missing or does not fit: files, conditions, resolution, features.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    device = torch.device(pipeline.device)
    what = subjects(protocol, condition_kind(pipeline), num_labels(pipeline), protocol_name, given)
    # Training resumes bit for bit only if scoring in between draws nothing from its random state.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        # The first call of a process pays for kernels and caches; it is not timed.
        first = sample(
            pipeline, what.conditions[:1], [0], steps=steps[0], seed=protocol.seed, guidance_scale=guidance_scale
        )
        side = first.shape[-1]
        if protocol.resolution is not None and first.shape[-2:] != (protocol.resolution,) * 2:
            raise ValueError(
                f"protocol {protocol_name} is for images of {protocol.resolution} pixels; the pipeline draws {side}"
            )
        instruments = Instruments(protocol_name, protocol, given, side, device, scoring_dtype(pipeline))
        run = _Run(
            pipeline,
            protocol,
            what,
            instruments,
            instruments.measure(first.to(device), what.prompts and what.prompts[:1]),
            name=name,
            batch_size=batch_size,
            guidance_scale=guidance_scale,
            accelerator=accelerator,
            keep=keep,
        )
        share = sum(map(len, batches(protocol.images, batch_size, run.rank, run.world)))
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
    given: Given = NOTHING,
    name: str,
    batch_size: int = 100,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    accelerator: "Accelerator | None" = None,
) -> list[dict[str, Any]]:
    """The protocol's scores of the first images of a folder, of parquet files or of ADM's .npz, as one row.

    With an accelerator of several processes, all of them call this, each measures its share, and all return the same row.
    Prompts are the protocol's, in the order of the images' names. dtype: of the networks that score, float32 or float64.
    ValueError for too few images, or of another resolution.
    """
    place = device or torch.device("cpu")
    n = protocol.images
    kind: ConditionKind = "none" if protocol.conditions.source in ("labels", "none") else "prompt"
    what = subjects(protocol, kind, None, protocol_name, given)
    found = count_images(source)
    if found < n:
        raise ValueError(f"{source} holds {found} images, and {n} are wanted: too few")
    first = next(real_images(source, (0,)))
    side = first.shape[-1]
    if protocol.resolution is not None and first.shape[-2:] != (protocol.resolution,) * 2:
        raise ValueError(f"protocol {protocol_name} is for images of {protocol.resolution} pixels; {source} has {side}")
    instruments = Instruments(protocol_name, protocol, given, side, place, dtype)
    example = instruments.measure(first[None].to(place), what.prompts and what.prompts[:1])
    rank, world = _place(accelerator)
    scores = Scores(instruments, what, example, sync=world > 1, device=place)
    shares = batches(n, batch_size, rank, world)
    images = real_images(source, {i for share in shares for i in share})
    for share in shares:
        part = list(itertools.islice(images, len(share)))
        if any(image.shape != first.shape for image in part):
            raise ValueError(f"{source}: the images are of several sizes; scores want one")
        prompts = None if what.prompts is None else [what.prompts[i] for i in share]
        scores.update(share, instruments.measure(torch.stack(part).to(place), prompts))
    nothing = {"steps": None, "guidance_scale": None, "seconds_per_image": None, "network_evaluations": None}
    return [{"model": name, "images": n, **nothing, **scores.compute()}]


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
    keep: Path | None = None,
) -> list[dict[str, Any]]:
    """`evaluate_protocol` by FID against one reference and CLIP score.

    `reference`, `features`, `clip`, `prompts`: see `fewstep.evaluate.reference.resolve`.

    Raises ValueError for an unknown reference, and for conditions that reference and pipeline do not share.
    """
    if num_images < 2 or batch_size < 1:
        raise ValueError(f"num_images must be at least 2 and batch_size at least 1, got {num_images} and {batch_size}")
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
    pipeline: Any,
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
    conditions = subjects(protocol, condition_kind(pipeline), num_labels(pipeline)).conditions[:count]
    return sample(pipeline, conditions, range(count), steps=steps, seed=seed, guidance_scale=guidance_scale)
