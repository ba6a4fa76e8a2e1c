"""One row of a report: sampling and measuring the images of one pipeline at one step count."""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from fewstep.evaluate.conditions import Conditions
from fewstep.evaluate.generate import batches, counted, remaining_batches, sample
from fewstep.evaluate.protocol import Protocol
from fewstep.evaluate.report import Row
from fewstep.evaluate.resume import BatchStore, MeasuredBatch
from fewstep.evaluate.reuse import fingerprints
from fewstep.evaluate.scores import Scores, ScoringModels

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import DiffusionPipeline


@dataclass
class Costs:
    """Costs of sampling some images.

    Attributes:
        indices: of the images.
        seconds: process time.
        evaluations: of the network, per sample.
        memory: peak, in GiB.
    """

    indices: list[int] = field(default_factory=list)
    seconds: float = 0.0
    evaluations: int = 0
    memory: float = 0.0

    def add(self, batch: MeasuredBatch) -> None:
        self.indices = self.indices + batch.indices
        self.seconds += batch.seconds
        self.evaluations += batch.evaluations

    def gathered(self) -> "Costs":
        """The costs of all processes together; the memory is the largest."""
        from accelerate.utils import gather_object

        shares: list[Costs] = gather_object([self])
        indices = [i for share in shares for i in share.indices]
        seconds, evaluations = sum(s.seconds for s in shares), sum(s.evaluations for s in shares)
        return Costs(indices, seconds, evaluations, max(s.memory for s in shares))


@dataclass(frozen=True)
class RowRunner:
    """Samples and scores the images of one evaluation, a row for each step count.

    Attributes:
        pipeline: on its device.
        models: of the protocol's scores.
        example: `models.measure` of any image.
        name: of the model, in the report.
        guidance_scale: of the pipeline's call; None = its default.
        accelerator: of several processes, each of which samples its share.
        keep: folder for finished batches.
    """

    pipeline: "DiffusionPipeline"
    protocol: Protocol
    conditions: Conditions
    models: ScoringModels
    example: dict[str, Tensor]
    name: str
    batch_size: int
    guidance_scale: float | None = None
    accelerator: "Accelerator | None" = None
    keep: Path | None = None

    @property
    def device(self) -> torch.device:
        return torch.device(self.pipeline.device)

    @property
    def rank(self) -> int:
        return rank_and_world_size(self.accelerator)[0]

    @property
    def world_size(self) -> int:
        return rank_and_world_size(self.accelerator)[1]

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        return fingerprints(self.pipeline) if self.keep is not None else {}

    def row(self, steps: int, bar: "tqdm[None]") -> Row:
        """Sample, measure and score all images at one step count."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        # Without an accelerator this process scores alone, even where torch.distributed is up.
        sync = self.world_size > 1
        scores = Scores(self.models, self.conditions, self.example, sync=sync, device=self.device)
        costs = Costs()
        for batch in self._measured(steps):
            scores.update(batch.indices, batch.values)
            costs.add(batch)
            bar.update(len(batch.indices))
        costs.memory = peak_memory(self.device)
        if sync:
            costs = costs.gathered()
        n = self.protocol.images
        check_indices(costs.indices, n)
        computed = scores.compute()
        return {
            "model": self.name,
            "steps": steps,
            "guidance_scale": self.guidance_scale,
            "fid": computed.pop("fid"),
            "clip_score": computed.pop("clip_score"),
            "images": n,
            "seconds_per_image": costs.seconds / n,
            "network_evaluations": costs.evaluations / n,
            "peak_memory_gib": costs.memory,
            **computed,
        }

    def _measured(self, steps: int) -> Iterator[MeasuredBatch]:
        """The batches of this process: those that were kept, then those that are left to sample."""
        n, size = self.protocol.images, self.batch_size
        if self.keep is None:
            for part in batches(n, size, self.rank, self.world_size):
                yield self._batch(part, steps)
            return
        settings = {
            "protocol": self.protocol.hash(),
            "conditions": self.conditions.fingerprint(),
            "pipeline": self.fingerprints,
            "steps": steps,
            "guidance_scale": self.guidance_scale,
        }
        store = BatchStore(self.keep / f"{steps}_steps", settings)
        files = store.files()
        done = [i for file in files for i in store.indices(file)]
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()  # all have listed before any goes on
        for file in files[self.rank :: self.world_size]:
            yield store.load(file)
        for remaining in remaining_batches(done, n, size, self.rank, self.world_size):
            batch = self._batch(remaining, steps)
            store.save(batch)
            yield batch

    def _batch(self, part: Sequence[int], steps: int) -> MeasuredBatch:
        with counted(self.pipeline) as evaluations:
            _synchronize(self.device)
            start = time.perf_counter()
            images = self._sample(part, steps)
            _synchronize(self.device)
            seconds = time.perf_counter() - start
        values = self.models.measure(images.to(self.device), self.conditions.prompts_at(part))
        return MeasuredBatch(list(part), values, seconds, evaluations.count)

    def _sample(self, part: Sequence[int], steps: int) -> Tensor:
        return sample(
            self.pipeline,
            [self.conditions.conditions[i] for i in part],
            part,
            steps=steps,
            seed=self.protocol.seed,
            guidance_scale=self.guidance_scale,
            uint8=self.protocol.uint8,
        )


def sample_first(
    pipeline: "DiffusionPipeline", protocol: Protocol, conditions: Conditions, steps: int, guidance_scale: float | None
) -> Tensor:
    """The first image alone, uint8 [1, 3, H, W]: for its size, and so that no row pays for kernels and caches."""
    first = conditions.conditions[:1]
    return sample(pipeline, first, [0], steps=steps, seed=protocol.seed, guidance_scale=guidance_scale)


def rank_and_world_size(accelerator: "Accelerator | None") -> tuple[int, int]:
    return (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)


def check_indices(indices: Sequence[int], num_images: int) -> None:
    """RuntimeError unless every index 0 ... num_images - 1 occurs exactly once, in any order."""
    if sorted(indices) != list(range(num_images)):
        missing, extra = set(range(num_images)) - set(indices), len(indices) - len(set(indices))
        raise RuntimeError(
            f"images: found {len(indices)} scored, {len(missing)} missing and {extra} repeated; expected {num_images}, each once"
        )


def peak_memory(device: torch.device) -> float:
    """GiB: on a GPU what torch allocated since the row began, otherwise the most that this process ever had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # Windows has none, and no use for it on a GPU

    # In KiB, on a Mac in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
