"""Encoded prompts and latents of a teacher, made ahead of training by `fewstep cache` and read by it.

Below the folder, prompts/<identity> and latents/<identity> hold the rows of one teacher's text encoders and of one
autoencoder; so several data sources, and several teachers, can share a folder.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fewstep.data.sources import Source
from fewstep.data.tensor_store import Shards
from fewstep.data.validate import OnError, without
from fewstep.teachers.base import Teacher
from fewstep.teachers.denoiser import Cond, Posterior
from fewstep.teachers.fingerprint import image_identity, text_identity, text_key

SHOWN = 3
"""Missing entries that are named."""


class Cache:
    """What a folder holds for one teacher, all of whose parts have to be in memory when this is made."""

    SHARD_BYTES: ClassVar[int] = 2**26
    SHARD_ROWS: ClassVar[int] = 1024
    CHUNK: ClassVar[int] = 32
    """Prompts that are encoded at a time."""

    def __init__(self, folder: Path, teacher: Teacher) -> None:
        self.folder = folder
        self.encodes_prompts = teacher.conditions == "prompt"
        self.null = teacher.negative("")
        self.texts = Shards(folder / "prompts" / text_identity(teacher))
        self.images = Shards(folder / "latents" / image_identity(teacher))
        self.image_keys: list[str] = []

    # Reading ----------------------------------------------------------------------------------------------------------

    def open(self, source: Source, needs_images: bool, on_error: OnError = "fail", quiet: bool = False) -> Source:
        """Know what is there. Raises ValueError, with how many and which, where anything of the source is missing.

        on_error: with "skip", the source is returned without those samples whose latents are missing.
        """
        self.texts.read_index()
        self.images.read_index()
        prompts = unique_prompts(source, self.null) if self.encodes_prompts else []
        _complain(self.folder, "prompts", prompts, [text_key(p) for p in prompts], self.texts)
        names = [source.image_key(i) for i in range(len(source))] if needs_images else []
        keys = [text_key(n) for n in names]
        missing = set(self.images.missing(keys))
        if on_error == "skip" and missing:
            gone = [(i, name) for i, name in enumerate(names) if keys[i] in missing]
            source = without(source, gone, on_error, f"are not in data.cache, {self.folder}", quiet)
            keys = [key for key in keys if key not in missing]
        else:
            _complain(self.folder, "images", names, keys, self.images)
        self.image_keys = keys
        return source

    def conditions(self, prompts: Sequence[str]) -> Cond:
        """Conditions [B, ...] of prompts, on the CPU. Raises ValueError for one that is not there."""
        keys = [text_key(p) for p in prompts]
        _complain(self.folder, "prompts", prompts, keys, self.texts)
        return self.texts.read(keys)

    def latents(self, indices: Sequence[int]) -> Posterior:
        """Of the images at indices of the source that `open` returned, on the CPU."""
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
        process: int = 0,
        processes: int = 1,
        wait: Callable[[], None] = lambda: None,
    ) -> None:
        """Encode what is missing, `process`'s part of it; when all have, the first writes the indices.

        prompts: to be encoded beside those of the source.
        images: whether the source's images are, too.
        batch_size: images that are encoded at a time, always: one image alone would differ in its last bits from the same
            image in a batch of a training.
        wait: returns when every process has called it.
        """
        if self.encodes_prompts:
            wanted = list(dict.fromkeys([*prompts, *unique_prompts(source, self.null)]))
            mine = _mine(self.texts, wanted, process, processes, wait)
            bar = tqdm(total=len(mine), desc="prompts", disable=process > 0, dynamic_ncols=True)
            _write(self.texts, _encoded(teacher, mine, self.CHUNK, bar))
        if images:
            names = {source.image_key(i): i for i in range(len(source))}
            left = _mine(self.images, list(names), process, processes, wait)
            bar = tqdm(total=len(left), desc="images", disable=process > 0, dynamic_ncols=True)
            _write(self.images, _latents(teacher, source, left, names, batch_size, bar))
        wait()
        if process == 0:
            for shards, written in ((self.texts, self.encodes_prompts), (self.images, images)):
                if written:
                    shards.write_index({"pipeline": type(teacher.pipeline).__name__})
        wait()


def unique_prompts(source: Source, null: str) -> list[str]:
    """A source's prompts, each once, and the one that guidance takes for none."""
    found: dict[str, None] = {null: None}
    for start in range(0, len(source), 4096):
        found |= dict.fromkeys(source.conditions_at(range(start, min(start + 4096, len(source)))))
    return list(found)


def _complain(folder: Path, what: str, names: Sequence[str], keys: Sequence[str], shards: Shards) -> None:
    missing = set(shards.missing(keys))
    if not missing:
        return
    shown = [repr(name) for name, key in zip(names, keys, strict=True) if key in missing][:SHOWN]
    raise ValueError(
        f"data.cache: {folder} lacks {len(missing)} of {len(names)} {what} of this teacher and this data, such as "
        f"{', '.join(shown)}: run `fewstep cache` with this config, to its end"
    )


def _mine(shards: Shards, names: Sequence[str], process: int, processes: int, wait: Callable[[], None]) -> list[str]:
    """Of what no file holds yet, this process's part. Every process has looked before any of them writes."""
    if process == 0:
        shards.clean()
    known = {key for keys in shards.written().values() for key in keys}
    missing = [name for name in names if text_key(name) not in known]
    wait()
    return missing[process::processes]


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


def _write(shards: Shards, found: Iterable[Rows]) -> None:
    keys: list[str] = []
    parts: list[dict[str, Tensor]] = []
    held = 0

    def flush() -> None:
        if keys:
            shards.write(keys, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    for some, rows in found:
        keys += some
        parts.append(rows)
        held += sum(v.nbytes for v in rows.values())
        if held >= Cache.SHARD_BYTES or len(keys) >= Cache.SHARD_ROWS:
            flush()
            keys, parts, held = [], [], 0
    flush()
