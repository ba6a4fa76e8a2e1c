"""What the losses are given: conditions and latents, in the order of a stream that resumes exactly."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fewstep.config import RunConfig
from fewstep.data import Raw, Source, Stream
from fewstep.data.encoding_cache import EncodingCache
from fewstep.methods.base import Batch
from fewstep.teachers.base import Teacher
from fewstep.teachers.denoiser import Posterior


class Batches:
    """The batches of one process out of `processes`.

    Latents are read from `cache`, if there is one; with `data.cache_latents`, all of them are held in memory, encoded here
    where they are not read. Without `needs_images`, no image is opened.
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
        cache: EncodingCache | None = None,
    ) -> None:
        self.teacher, self.needs_images, self.device, self.seed = teacher, needs_images, device, config.seed
        self.stream = Stream(source, config.batch_size, config.seed, process, processes)
        # Latents of the samples at some indices, on the CPU, where no image has to be opened for them.
        self.latents: Callable[[list[int]], Posterior] | None = None
        if needs_images and cache is not None:
            self.latents = cache.latents
        if needs_images and config.data.cache_latents:
            whole = self._all_latents(source, quiet=process > 0)
            self.latents = lambda indices: Posterior(*(v[indices] for v in whole))

    @torch.no_grad()
    def draw(self, iteration: int, part: int) -> Batch:
        """The next batch of the stream, as micro-batch `part` of an iteration."""
        posterior = None
        if self.needs_images and self.latents is None:
            raw = next(self.stream)
            conditions, posterior = raw.conditions, self._encode(raw)
        else:
            indices = self.stream.next_indices()
            conditions = self.stream.source.conditions_at(indices)
            if self.latents is not None:
                posterior = Posterior(*(v.to(self.device) for v in self.latents(indices)))
        latents = None if posterior is None else posterior.sample(torch.randn_like(posterior.mean))
        size = len(conditions)
        cond, uncond = self.teacher.condition(conditions), self.teacher.null_condition(size)
        shared = torch.Generator().manual_seed(((self.seed << 40) + (iteration << 12) + part) % 2**63)
        return Batch(size, cond, uncond, self.device, iteration, latents, shared, raw=conditions)

    @torch.no_grad()
    def _all_latents(self, source: Source, quiet: bool) -> Posterior:
        parts: list[list[Tensor]] = []
        doing = "encoding images" if self.latents is None else "reading latents"
        for start in tqdm(range(0, len(source), 256), doing, disable=quiet, dynamic_ncols=True):
            indices = list(range(start, min(start + 256, len(source))))
            posterior = self._encode(source.get(indices)) if self.latents is None else self.latents(indices)
            parts.append([v.cpu() for v in posterior])
        return Posterior(*(torch.cat(v) for v in zip(*parts, strict=True)))

    def _encode(self, raw: Raw) -> Posterior:
        assert raw.images is not None  # the trainer refuses sources without images where they are needed
        # In the layout of what is read back: noise that is drawn "like" latents of another would be other noise.
        return Posterior(*(v.contiguous() for v in self.teacher.encode(raw.images.to(self.device))))
