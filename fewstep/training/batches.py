"""Batches for the losses: conditions and latents, in the order of a stream that resumes exactly."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from fewstep.config import DataConfig, MethodConfig, RunConfig
from fewstep.data import Raw, Source, Stream
from fewstep.data.encoding_cache import EncodingCache
from fewstep.data.validate import OnError, check_images
from fewstep.errors import FewstepError
from fewstep.methods.base import Batch, Method
from fewstep.teachers.base import Teacher
from fewstep.teachers.denoiser import Cond, Posterior

if TYPE_CHECKING:
    from accelerate import Accelerator


class Encodings(Protocol):
    """Encoded prompts and images of a source, as `data.cache` holds them."""

    def open(self, source: Source, needs_images: bool, on_error: OnError = "fail", quiet: bool = False) -> Source:
        """Check that all is there; the source, or the part of it that can be read."""

    def conditions(self, prompts: Sequence[str]) -> Cond:
        """Conditions of prompts, on the CPU."""

    def latents(self, indices: Sequence[int]) -> Posterior:
        """Latents of the source's images at these indices, on the CPU."""


def check_source(config: DataConfig, method: Method, teacher: Teacher, source: Source) -> None:
    """Raises FewstepError for a source that has not what the method and the teacher need."""
    if method.needs_images and not source.has_images:
        raise FewstepError(
            "data.source", f"{config.source}, which has no images", f"fashion, folder or parquet for {method.name}"
        )
    if teacher.conditions not in ("none", source.conditions):
        raise FewstepError(
            "data.source", f"{config.source}, which has {source.conditions}s", f"{teacher.conditions}s for this teacher"
        )


def open_encodings(config: DataConfig, teacher: Teacher) -> Encodings | None:
    """The cache of `data.cache`, if one is set."""
    return None if config.cache is None else EncodingCache(config.cache, teacher)


def readable_source(
    source: Source,
    config: DataConfig,
    teacher: Teacher,
    needs_images: bool,
    encodings: Encodings | None,
    accelerator: "Accelerator",
) -> Source:
    """Data set of the source. With encodings, the teacher takes its conditions from them.

    Raises ValueError where images are broken, or encodings missing.
    """
    if encodings is None:
        if not needs_images:
            return source
        rank, world_size = accelerator.process_index, accelerator.num_processes
        return check_images(source, config.on_error, rank, world_size, gather_object)
    source = encodings.open(source, needs_images, config.on_error, quiet=not accelerator.is_main_process)
    if teacher.prompts is not None:
        teacher.prompts.stored = encodings.conditions
    return source


class Batches:
    """The batches of one process out of `world_size`.

    Latents are read from `encodings`, if there are any; with `data.cache_latents`, all of them are held in memory, encoded
    here where they are not read. Without `needs_images`, no image is opened.
    """

    def __init__(
        self,
        config: RunConfig[MethodConfig],
        teacher: Teacher,
        source: Source,
        needs_images: bool,
        device: torch.device,
        rank: int,
        world_size: int,
        encodings: Encodings | None = None,
    ) -> None:
        self.teacher, self.needs_images, self.device, self.seed = teacher, needs_images, device, config.seed
        self.stream = Stream(source, config.batch_size, config.seed, rank, world_size)
        # Latents of the samples at some indices, on the CPU, where no image has to be opened for them.
        self.latents: Callable[[list[int]], Posterior] | None = None
        if needs_images and encodings is not None:
            self.latents = encodings.latents
        if needs_images and config.data.cache_latents:
            whole = self._all_latents(source, quiet=rank > 0)
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
        assert raw.images is not None  # check_source refuses sources without images where they are needed
        # In the layout of what is read back: noise that is drawn "like" latents of another would be other noise.
        return Posterior(*(v.contiguous() for v in self.teacher.encode(raw.images.to(self.device))))
