"""What the losses are given: conditions and latents, in the order of a stream that resumes exactly."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fewstep.config import RunConfig
from fewstep.data import Raw, Source, Stream
from fewstep.methods.base import Batch
from fewstep.teachers.base import Posterior, Teacher


class _Cache(NamedTuple):
    """Every sample of a source, on the CPU, as its latents [N, C, h, w] and its condition."""

    posterior: Posterior
    conditions: list[Any]


class Batches:
    """The batches of one process out of `processes`.

    With `data.cache_latents`, images are encoded here, once; without `needs_images`, none is opened.
    """

    def __init__(
        self,
        config: RunConfig[Any],
        teacher: Teacher,
        source: Source,
        needs_images: bool,
        device: torch.device,
        process: int,
        processes: int,
    ) -> None:
        self.teacher, self.needs_images, self.device, self.seed = teacher, needs_images, device, config.seed
        self.stream = Stream(source, config.batch_size, config.seed, process, processes)
        self.cache = self._encode_all(source, quiet=process > 0) if needs_images and config.data.cache_latents else None

    @torch.no_grad()
    def draw(self, iteration: int, part: int) -> Batch:
        """The next batch of the stream, as micro-batch `part` of an iteration."""
        posterior = None
        if self.cache is not None:
            indices = self.stream.next_indices()
            posterior = Posterior(*(v[indices].to(self.device) for v in self.cache.posterior))
            conditions = [self.cache.conditions[i] for i in indices]
        elif self.needs_images:
            raw = next(self.stream)
            conditions, posterior = raw.conditions, self._encode(raw)
        else:
            conditions = self.stream.source.conditions_at(self.stream.next_indices())
        latents = None if posterior is None else posterior.sample(torch.randn_like(posterior.mean))
        size = len(conditions)
        cond, uncond = self.teacher.condition(conditions), self.teacher.null_condition(size)
        shared = torch.Generator().manual_seed(((self.seed << 40) + (iteration << 12) + part) % 2**63)
        return Batch(size, cond, uncond, self.device, iteration, latents, shared)

    @torch.no_grad()
    def _encode_all(self, source: Source, quiet: bool) -> _Cache:
        parts: list[list[Tensor]] = []
        conditions: list[Any] = []
        for start in tqdm(range(0, len(source), 256), "encoding images", disable=quiet, dynamic_ncols=True):
            raw = source.get(range(start, min(start + 256, len(source))))
            parts.append([v.cpu() for v in self._encode(raw)])
            conditions += raw.conditions
        mean, std = (torch.cat(v) for v in zip(*parts, strict=True))
        return _Cache(Posterior(mean, std), conditions)

    def _encode(self, raw: Raw) -> Posterior:
        assert raw.images is not None  # the trainer refuses sources without images where they are needed
        return self.teacher.encode(raw.images.to(self.device))
