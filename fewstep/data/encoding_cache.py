"""Encoded prompts and latents of a teacher, written before training by `fewstep cache` and read by it.

Below the folder, prompts/<identity> and latents/<identity> hold the rows of one teacher's text encoders and of one
autoencoder; so several data sources, and several teachers, can share a folder.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fewstep.data.base import Source
from fewstep.data.tensor_store import TensorStore
from fewstep.data.validate import OnError, drop_broken
from fewstep.errors import MissingError
from fewstep.teachers.base import Teacher
from fewstep.teachers.denoiser import Cond, Posterior
from fewstep.teachers.fingerprint import image_identity, text_identity, text_key

SHOWN = 3
"""Number of missing entries that a message names."""


class EncodingCache:
    """The encodings of one teacher in a folder; all parts of the teacher have to be in memory when this is constructed."""

    SHARD_BYTES: ClassVar[int] = 2**26
    SHARD_ROWS: ClassVar[int] = 1024
    CHUNK: ClassVar[int] = 32
    """Prompts that are encoded at a time."""

    def __init__(self, folder: Path, teacher: Teacher) -> None:
        self.folder = folder
        self.encodes_prompts = teacher.conditions == "prompt"
        self.null = teacher.negative("")
        self.texts = TensorStore(folder / "prompts" / text_identity(teacher))
        self.images = TensorStore(folder / "latents" / image_identity(teacher))
        self.image_keys: list[str] = []

    # Reading ----------------------------------------------------------------------------------------------------------

    def open(self, source: Source, needs_images: bool, on_error: OnError = "fail", quiet: bool = False) -> Source:
        """Read the indices. Raises FewstepError, with how many and which, where anything of the source is missing.

        on_error: with "skip", the source is returned without those samples whose latents are missing.
        """
        self.texts.read_index()
        self.images.read_index()
        prompts = unique_prompts(source, self.null) if self.encodes_prompts else []
        _check_complete(self.folder, "prompts", prompts, [text_key(p) for p in prompts], self.texts)
        names = [source.image_key(i) for i in range(len(source))] if needs_images else []
        keys = [text_key(n) for n in names]
        missing = set(self.images.missing(keys))
        if on_error == "skip" and missing:
            gone = [(i, name) for i, name in enumerate(names) if keys[i] in missing]
            source = drop_broken(source, gone, on_error, f"are not in data.cache, {self.folder},", quiet)
            keys = [key for key in keys if key not in missing]
        else:
            _check_complete(self.folder, "images", names, keys, self.images)
        self.image_keys = keys
        return source

    def conditions(self, prompts: Sequence[str]) -> Cond:
        """Conditions [B, ...] of prompts, on the CPU. Raises FewstepError for a missing one."""
        keys = [text_key(p) for p in prompts]
        _check_complete(self.folder, "prompts", prompts, keys, self.texts)
        return self.texts.read(keys)

    def latents(self, indices: Sequence[int]) -> Posterior:
        """Latents of the images at indices of the source that `open` returned, on the CPU."""
        rows = self.images.read([self.image_keys[i] for i in indices])
        return Posterior(rows["mean"], rows["std"])

    # Writing ----------------------------------------------------------------------------------------------------------

    def fill(
        self,
        source: Source,
        teacher: Teacher,
        prompts: Sequence[str],
        images: bool,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        wait: Callable[[], None] = lambda: None,
    ) -> None:
        """Encode what is missing, the part of `rank`; when all ranks have, the first writes the indices.

        prompts: to be encoded beside those of the source.
        images: whether the source's images are, too.
        batch_size: images that are encoded at a time, always: one image alone would differ in its last bits from the same
            image in a batch of a training.
        wait: returns when every rank has called it.
        """
        if self.encodes_prompts:
            prompts = list(dict.fromkeys([*prompts, *unique_prompts(source, self.null)]))
            mine = _mine(self.texts, prompts, rank, world_size, wait)
            bar = tqdm(total=len(mine), desc="prompts", disable=rank > 0, dynamic_ncols=True)
            _write(self.texts, _encoded(teacher, mine, self.CHUNK, bar))
        if images:
            names = {source.image_key(i): i for i in range(len(source))}
            left = _mine(self.images, list(names), rank, world_size, wait)
            bar = tqdm(total=len(left), desc="images", disable=rank > 0, dynamic_ncols=True)
            _write(self.images, _latents(teacher, source, left, names, batch_size, bar))
        wait()
        if rank == 0:
            for store, written in ((self.texts, self.encodes_prompts), (self.images, images)):
                if written:
                    store.write_index({"pipeline": type(teacher.pipeline).__name__})
        wait()


def unique_prompts(source: Source, null: str) -> list[str]:
    """The prompts of a source, each once, and the empty one of guidance."""
    found: dict[str, None] = {null: None}
    for start in range(0, len(source), 4096):
        found |= dict.fromkeys(map(str, source.conditions_at(range(start, min(start + 4096, len(source))))))
    return list(found)


def _check_complete(folder: Path, what: str, names: Sequence[str], keys: Sequence[str], store: TensorStore) -> None:
    missing = set(store.missing(keys))
    if not missing:
        return
    shown = [repr(name) for name, key in zip(names, keys, strict=True) if key in missing][:SHOWN]
    raise MissingError(
        "data.cache",
        f"{len(names) - len(missing)} of {len(names)} {what} in {folder}, without {', '.join(shown)}",
        "all of this teacher and this data",
        "Run `fewstep cache` with this config, to its end",
    )


def _mine(store: TensorStore, names: Sequence[str], rank: int, world_size: int, wait: Callable[[], None]) -> list[str]:
    """The part of `rank` of what no file holds yet. Every rank has looked before any of them writes."""
    if rank == 0:
        store.clean()
    known = {key for keys in store.written().values() for key in keys}
    missing = [name for name in names if text_key(name) not in known]
    wait()
    return missing[rank::world_size]


Rows = tuple[list[str], dict[str, Tensor]]
"""Keys, and tensors of each name with as many rows."""


def _encoded(teacher: Teacher, prompts: Sequence[str], chunk: int, bar: "tqdm[None]") -> Iterator[Rows]:
    for start in range(0, len(prompts), chunk):
        some = list(prompts[start : start + chunk])
        yield [text_key(p) for p in some], {k: v.cpu() for k, v in teacher.condition(some).items()}
        bar.update(len(some))


@torch.no_grad()
def _latents(
    teacher: Teacher, source: Source, left: Sequence[str], index: dict[str, int], size: int, bar: "tqdm[None]"
) -> Iterator[Rows]:
    for start in range(0, len(left), size):
        names = left[start : start + size]
        # The last batch is as large as the others: see `fill`.
        indices = [index[name] for name in names] + [index[names[-1]]] * (size - len(names))
        raw = source.get(indices)
        assert raw.images is not None  # asked for sources with images only
        posterior = teacher.encode(raw.images.to(teacher.placement.device))
        yield [text_key(n) for n in names], {k: v[: len(names)].cpu() for k, v in posterior._asdict().items()}
        bar.update(len(names))


def _write(store: TensorStore, found: Iterable[Rows]) -> None:
    keys: list[str] = []
    parts: list[dict[str, Tensor]] = []
    held = 0

    def flush() -> None:
        if keys:
            store.write(keys, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    for some, rows in found:
        keys += some
        parts.append(rows)
        held += sum(v.nbytes for v in rows.values())
        if held >= EncodingCache.SHARD_BYTES or len(keys) >= EncodingCache.SHARD_ROWS:
            flush()
            keys, parts, held = [], [], 0
    flush()
