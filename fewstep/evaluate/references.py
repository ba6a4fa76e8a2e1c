"""What generated images are compared with: statistics of real images, and what both show."""

import hashlib
import io
import json
import sys
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.assets import ASSETS, asset_path
from fewstep.data.fashion import CLASSES, caption, load_embedded
from fewstep.data.hub import dataset_files, is_dataset
from fewstep.data.images import IMAGE_SUFFIXES, UNREADABLE, image_files, unreadable
from fewstep.data.prompts import read_prompts
from fewstep.evaluate.generate import ConditionKind
from fewstep.evaluate.metrics.frechet import Moments, load_moments, moments
from fewstep.evaluate.models.features import ImageFeatures, features_identity
from fewstep.evaluate.models.view import look
from fewstep.evaluate.protocol import (
    NEED_FEATURES,
    NEED_REFERENCE,
    ClipScoring,
    Comparison,
    Conditions,
    Protocol,
    View,
    find_data,
)
from fewstep.evaluate.statistics import SUFFIXES, Statistics, check_metadata, load_statistics
from fewstep.io import blake2b


@dataclass(frozen=True)
class Sources:
    """What a comparison is made of, by name: resolved and checked, nothing loaded yet.

    reference: `fashion`, or a .safetensors or .npz file of moments, or a folder of images, or a data set of the hub.
    features, clip: `fashion` or a folder; clip is None for no CLIP score.
    prompts: a text file with one prompt a line; None for the captions of `fashion`.
    """

    reference: str
    features: str
    clip: str | None
    prompts: Path | None


def resolve(
    reference: str, features: str | None = None, clip: str | None = None, prompts: Path | str | None = None
) -> Sources:
    """Fills in what the asset's reference implies; ValueError, in one sentence, for what is missing.

    clip: "none" turns the CLIP score off; None is the asset's own CLIP, or off for any other reference.
    """
    if prompts is not None and not Path(prompts).is_file():
        raise ValueError(f"prompts {str(prompts)!r} is not a file")
    file = None if prompts is None else Path(prompts)
    if reference in ASSETS:
        clip = None if clip == "none" else clip or reference
        if not (asset_path(reference) / "reference.safetensors").exists():
            raise ValueError(f"reference {reference!r}: this installation lacks its reference.safetensors")
        return Sources(reference, features or reference, clip, file)
    path = Path(reference)
    if is_dataset(reference):
        dataset_files(reference, "reference")
    elif not path.exists():
        raise ValueError(
            f"reference {reference!r} is neither bundled ({', '.join(ASSETS)}) nor a path: give that of its statistics (.npz "
            "with mu and sigma, .safetensors) or of a folder of images, or owner/name of a data set in the hub's cache"
        )
    if path.is_file() and path.suffix not in SUFFIXES:
        raise ValueError(f"reference {reference!r}: a file of statistics ends in {' or '.join(SUFFIXES)}")
    if features is None:
        raise ValueError(
            f"reference {reference!r} needs features: name those that it was made in (--features), such as fashion, inception or "
            "the folder of a transformers model"
        )
    return Sources(reference, features, None if clip == "none" else clip, file)


def protocol_of(sources: Sources, *, num_images: int, seed: int) -> Protocol:
    """The unnamed protocol of FID against one reference, and CLIP score."""
    if sources.prompts is not None:
        conditions = Conditions(source="prompts", file=str(sources.prompts))
    else:
        conditions = Conditions(source="fashion" if sources.reference in ASSETS else "labels")
    return Protocol(
        about="FID against one reference, and CLIP score",
        images=num_images,
        seed=seed,
        conditions=conditions,
        comparisons=(Comparison(features=sources.features, reference=sources.reference, metrics=("fid",)),),
        clip=None if sources.clip is None else ClipScoring(model=sources.clip),
    )


@dataclass(frozen=True)
class Given:
    """Paths that the command line gives in place of a protocol's own: they say where data lie, not what is measured.

    references: by the comparison's name, "" for the unnamed. folder: the name of the protocol that was changed, by which its own
    files are found; None for one that was not.
    """

    references: Mapping[str, str]
    prompts: Path | None = None
    folder: str | None = None


NOTHING = Given({})


# Real images ----------------------------------------------------------------------------------------------------------


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _read(file: Path | bytes, where: str) -> Tensor:
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            return _pixels(image)
    except UNREADABLE as e:
        raise unreadable(where, e) from None


def _files(source: str) -> tuple[list[Path], list[Path]]:
    """Files of images, and parquet files that hold them, of a path or of a data set of the hub; at most one is not empty."""
    path = Path(source)
    if is_dataset(source):
        path, shards = dataset_files(source, "images")
        if shards:  # beside which an image is an illustration
            return [], shards
    if not path.is_dir():
        return [], [path] if path.suffix == ".parquet" else []
    images = image_files(path)
    return images, [] if images else sorted(path.rglob("*.parquet"))


def _parquet(files: Sequence[Path], wanted: Container[int]) -> Iterator[Tensor]:
    import pyarrow.parquet as pq

    number = 0
    for file in files:
        parquet = pq.ParquetFile(file)
        if "image" not in parquet.schema_arrow.names:
            raise ValueError(f"{file} has no column image; it has {', '.join(parquet.schema_arrow.names)}")
        for batch in parquet.iter_batches(256, columns=["image"]):
            for cell in batch.column(0).to_pylist():
                if number in wanted:
                    yield _read(cell["bytes"] if isinstance(cell, dict) else cell, f"{file}, row {number}")
                number += 1


EVERY = range(sys.maxsize)


def count_images(source: str) -> int:
    """How many images `real_images` gives. Few are read."""
    images, shards = ([], []) if source in ASSETS else _files(source)
    if shards and shards[0].exists():
        import pyarrow.parquet as pq

        return sum(pq.read_metadata(file).num_rows for file in shards)
    return len(images) or sum(1 for _ in real_images(source))


def real_images(source: str, wanted: Container[int] = EVERY) -> Iterator[Tensor]:
    """uint8 [3, H, W] of every image of a folder, of parquet files, of ADM's .npz, or of the 2,000 of `fashion`, in order.

    source: a path, or owner/name[:split] of a data set of the hub that is on this machine (`fewstep.hub`).
    wanted: numbers of images, of which others are not decoded.
    Raises ValueError for a source without images, and for an image that cannot be read.
    """
    if source in ASSETS:
        yield from (image for i, image in enumerate(torch.from_numpy(load_embedded()[0])) if i in wanted)
        return
    path = Path(source)
    if not path.exists() and not is_dataset(source):
        raise ValueError(
            f"{source!r} is neither bundled ({', '.join(ASSETS)}) nor a path of images nor owner/name of a data set"
        )
    if path.suffix == ".npz":
        arrays = load_statistics(path).images
        if arrays is None:
            raise ValueError(f"{path} holds no images (arr_0)")
        yield from (torch.from_numpy(image).permute(2, 0, 1) for i, image in enumerate(arrays) if i in wanted)
        return
    images, shards = _files(source)
    if images:
        yield from (_read(file, str(file)) for i, file in enumerate(images) if i in wanted)
    elif shards:
        yield from _parquet(shards, wanted)
    else:
        raise ValueError(f"{path} holds no images ({', '.join(IMAGE_SUFFIXES)}, .parquet, .npz with arr_0)")


def _stacks(images: Iterable[Tensor], size: int = 64) -> Iterator[Tensor]:
    """Runs of images of one shape as [B, 3, H, W], so that no image is resized to another's size."""
    stack: list[Tensor] = []
    for image in images:
        if stack and (len(stack) == size or image.shape != stack[0].shape):
            yield torch.stack(stack)
            stack = []
        stack.append(image)
    if stack:
        yield torch.stack(stack)


def collect(
    images: Iterable[Tensor], features: ImageFeatures, view: View | None = None, *, keep: bool = True
) -> Statistics:
    """Statistics of images, each uint8 [3, H, W]; ValueError for fewer than two.

    `keep` keeps their features too; without it, memory does not grow with the number of images. The metadata say what they were
    made of: features, view, resolution, count, and the hash of the pixels.
    """
    from fewstep.evaluate.metrics.frechet import FrechetDistance

    parts: list[Tensor] = []
    sums: FrechetDistance | None = None
    sizes: set[str] = set()
    digest, count = hashlib.sha256(), 0
    for stack in _stacks(images):
        digest.update(stack.numpy().tobytes())
        sizes.add("x".join(map(str, dict.fromkeys(stack.shape[-2:]))))
        count += len(stack)
        part = features(look(stack, view or View())).cpu()
        if keep:
            parts.append(part)
            continue
        if sums is None:
            # Sums about some mean near theirs: about zero, digits would cancel.
            d = part.shape[1]
            pivot = Moments(part.double().mean(0), torch.zeros(d, d, dtype=torch.float64), None)
            sums = FrechetDistance(features, pivot, sync_on_compute=False)
        sums.update(part)
    if count < 2:
        raise ValueError(f"statistics need at least 2 images, got {count}")
    whole = torch.cat(parts) if keep else None
    m = moments(whole) if whole is not None else sums.moments()  # type: ignore[union-attr]
    metadata = {
        **features_identity(features.name),
        "view": view_text(view or View()),
        "resolution": sizes.pop() if len(sizes) == 1 else "mixed",
        "images_sha256": digest.hexdigest(),
    }
    return Statistics(m, whole, None, metadata)


def view_text(view: View) -> str:
    return json.dumps(view.model_dump(mode="json", exclude_none=True) if view.crop or view.size else {}, sort_keys=True)


def folder_moments(folder: Path, features: ImageFeatures) -> Moments:
    """Moments of all images under a folder; ValueError for fewer than two."""
    m = collect(real_images(str(folder)), features, keep=False).moments
    assert m is not None  # collect made them
    return m


# References -----------------------------------------------------------------------------------------------------------


def reference_path(protocol: str, c: Comparison, given: Given) -> str | None:
    """Where a comparison's reference lies; None for one that needs none; ValueError says what to get and where to put it."""
    if not NEED_REFERENCE & set(c.metrics):
        return None
    path = given.references.get(c.name, c.reference)
    assert path is not None  # the protocol's own validation
    if path in ASSETS:
        return path
    option = "--reference" + (f" {c.name}=PATH" if c.name else "")
    try:
        return str(find_data(given.folder or protocol, path, c.reference_from, option.removesuffix(" PATH")))
    except ValueError:
        if not is_dataset(path):
            raise
    dataset_files(path, "reference")
    return path


def stored_moments(asset: str, c: Comparison) -> Moments | None:
    """An asset's moments of its whole data set, which are of its own features of whole images; None for any others."""
    own = c.features == asset and c.view == View()
    return load_moments(asset_path(asset) / "reference.safetensors") if own else None


def load_reference(path: str, c: Comparison, features: ImageFeatures, resolution: int | None) -> Statistics:
    """The statistics at `path`, with features where the comparison's scores need them.

    Raises ValueError where they are those of other features, views or resolutions, or hold too little.
    """
    wants_features = bool(NEED_FEATURES & set(c.metrics))
    if path in ASSETS:
        stored = stored_moments(path, c)
        made = collect(real_images(path), features, c.view) if wants_features or stored is None else Statistics(None)
        return Statistics(stored or made.moments, made.features)
    file = Path(path)
    pictures = file.is_dir() or file.suffix == ".parquet" or is_dataset(path)
    if pictures:
        loaded = collect(real_images(path), features, c.view, keep=wants_features)
    else:
        loaded = load_statistics(file)
        if loaded.images is not None and (loaded.moments is None or (wants_features and loaded.features is None)):
            made = collect(real_images(path), features, c.view, keep=wants_features)
            loaded = Statistics(loaded.moments or made.moments, made.features, None, made.metadata)
    wanted = {**features_identity(features.name), "view": view_text(c.view)}
    # A real image that is resized may have had any size before.
    if resolution is not None and c.view == View() and loaded.metadata.get("resolution") != "mixed":
        side = loaded.metadata.get("resolution")
        if pictures and side != str(resolution):
            raise ValueError(
                f"the reference {path} holds images of {side} pixels, and this evaluation is of {resolution}"
            )
        wanted["resolution"] = str(resolution)
    check_metadata(loaded.metadata, wanted, f"the reference {path}")
    if loaded.moments is None:
        raise ValueError(f"the reference {path} holds no statistics")
    if wants_features and loaded.features is None:
        needing = ", ".join(sorted(NEED_FEATURES & set(c.metrics)))
        raise ValueError(
            f"{needing} need the features of the real images, and {path} holds their moments only: "
            "make it anew with `fewstep reference`"
        )
    return loaded


# Subjects -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subjects:
    """What image `index` shows: its condition for the pipeline, and its prompt for CLIP (None where there is none)."""

    conditions: Sequence[Any]
    prompts: Sequence[str] | None


def random_label(seed: int, index: int, num_labels: int) -> int:
    """Uniform, and the same for every batch size and number of processes."""
    digest = blake2b(f"{seed}:{index}:label", 8)
    return int.from_bytes(digest, "little") % num_labels


def prompts_file(protocol: str, c: Conditions, given: Given) -> Path | None:
    """The file of a protocol's prompts; ValueError where it is missing."""
    if c.source != "prompts":
        return None
    if given.prompts is not None:
        return given.prompts
    if c.file is None:
        raise ValueError(f"protocol {protocol} needs prompts: give --prompts FILE")
    return find_data(given.folder or protocol, c.file, c.file_from, "--prompts")


def subjects(
    protocol: Protocol, kind: ConditionKind, num_labels: int | None, name: str = "custom", given: Given = NOTHING
) -> Subjects:
    """Conditions of images 0 ... images - 1; prompts and classes repeat in order, so they are balanced.

    Raises ValueError for a pipeline that wants prompts where the protocol brings none, and for a wrong number of them.
    """
    c, n = protocol.conditions, protocol.images
    file = prompts_file(name, c, given)
    fashion = c.source == "fashion"
    prompts: list[str] | None = None
    if file is not None:
        lines = read_prompts(file)
        if c.count is not None and len(lines) != c.count:
            raise ValueError(f"protocol {name} wants {c.count} prompts, and {file} holds {len(lines)}")
        prompts = [lines[i % len(lines)] for i in range(n)]
    elif fashion:
        prompts = [caption(i % len(CLASSES)) for i in range(n)]
    match kind:
        case "prompt" if prompts is None:
            raise ValueError(
                f"the pipeline wants prompts, and the reference brings no prompts (conditions: {c.source}): "
                "give a file with one prompt a line"
            )
        case "prompt":
            return Subjects(prompts or [], prompts)
        case "label":
            classes = len(CLASSES) if fashion else c.num_labels or num_labels
            if classes is None:
                raise ValueError("the pipeline does not say how many classes it has")
            if c.draw == "random":
                return Subjects([random_label(protocol.seed, i, classes) for i in range(n)], None)
            # The captions of a prompts file need not be those of the labels; those of `fashion` are.
            return Subjects([i % classes for i in range(n)], None if file else prompts)
        case "none":
            return Subjects([None] * n, None)
