"""References: the statistics of real images that generated ones are compared with."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewstep.assets import ASSETS, asset_path
from fewstep.data.hub import dataset_files, is_dataset
from fewstep.errors import FewstepError, MissingError
from fewstep.evaluate.metrics.frechet import FrechetDistance
from fewstep.evaluate.models.features import ImageFeatures, features_identity
from fewstep.evaluate.models.view import apply_view
from fewstep.evaluate.protocol import (
    NEED_FEATURES,
    NEED_REFERENCE,
    ClipScoring,
    Comparison,
    ConditionSource,
    PathOverrides,
    Protocol,
    View,
    find_data,
)
from fewstep.evaluate.real_images import real_images, stacks
from fewstep.evaluate.statistics import (
    SUFFIXES,
    Moments,
    Statistics,
    check_metadata,
    load_moments,
    load_statistics,
    moments,
)


@dataclass(frozen=True)
class Sources:
    """Reference, features and CLIP of an evaluation by name: resolved and checked, nothing loaded yet.

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
    """Complete the names by those that an asset's reference implies. Raises FewstepError for missing ones.

    clip: "none" turns the CLIP score off; None is the asset's own CLIP, or off for any other reference.
    """
    if prompts is not None and not Path(prompts).is_file():
        raise MissingError("prompts", repr(str(prompts)), "a file")
    file = None if prompts is None else Path(prompts)
    if reference in ASSETS:
        clip = None if clip == "none" else clip or reference
        if not (asset_path(reference) / "reference.safetensors").exists():
            raise MissingError("reference", repr(reference), "its reference.safetensors in this installation")
        return Sources(reference, features or reference, clip, file)
    path = Path(reference)
    if is_dataset(reference):
        dataset_files(reference, "reference")
    elif not path.exists():
        raise MissingError(
            "reference",
            repr(reference),
            f"{', '.join(ASSETS)}, a path of statistics (.npz with mu and sigma, .safetensors) or of a folder of images, or "
            "owner/name of a data set in the hub's cache",
        )
    if path.is_file() and path.suffix not in SUFFIXES:
        raise FewstepError("reference", repr(reference), f"a file of statistics, ending in {' or '.join(SUFFIXES)}")
    if features is None:
        raise FewstepError(
            "features",
            f"none for reference {reference!r}",
            "those that it was made in (--features), such as fashion, inception or the folder of a transformers model",
        )
    return Sources(reference, features, None if clip == "none" else clip, file)


def protocol_of(sources: Sources, *, num_images: int, seed: int) -> Protocol:
    """The unnamed protocol of FID against one reference, and CLIP score."""
    if sources.prompts is not None:
        conditions = ConditionSource(source="prompts", file=str(sources.prompts))
    else:
        conditions = ConditionSource(source="fashion" if sources.reference in ASSETS else "labels")
    return Protocol(
        about="FID against one reference, and CLIP score",
        images=num_images,
        seed=seed,
        conditions=conditions,
        comparisons=(Comparison(features=sources.features, reference=sources.reference, metrics=("fid",)),),
        clip=None if sources.clip is None else ClipScoring(model=sources.clip),
    )


def collect(
    images: Iterable[Tensor], features: ImageFeatures, view: View | None = None, *, keep: bool = True
) -> Statistics:
    """Statistics of images, each uint8 [3, H, W]; ValueError for fewer than two.

    `keep` keeps their features too; without it, memory does not grow with the number of images. The metadata say what they were
    made of: features, view, resolution, count, and the hash of the pixels.
    """
    parts: list[Tensor] = []
    sums: FrechetDistance | None = None
    sizes: set[str] = set()
    digest, count = hashlib.sha256(), 0
    for stack in stacks(images):
        digest.update(stack.numpy().tobytes())
        sizes.add("x".join(map(str, dict.fromkeys(stack.shape[-2:]))))
        count += len(stack)
        part = features(apply_view(stack, view or View())).cpu()
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
        raise FewstepError("images", count, "at least 2, for statistics")
    whole = torch.cat(parts) if keep else None
    m = sums.moments() if sums is not None else moments(torch.cat(parts))
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


def reference_path(protocol: str, c: Comparison, overrides: PathOverrides) -> str | None:
    """The path of a comparison's reference; None for one that needs none. MissingError says what to get and where to put it."""
    if not NEED_REFERENCE & set(c.metrics):
        return None
    path = overrides.references.get(c.name, c.reference)
    assert path is not None  # the protocol's own validation
    if path in ASSETS:
        return path
    option = "--reference" + (f" {c.name}=PATH" if c.name else "")
    try:
        return str(find_data(overrides.folder or protocol, path, c.reference_from, option.removesuffix(" PATH")))
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
    expected = {**features_identity(features.name), "view": view_text(c.view)}
    # A real image that is resized may have had any size before.
    if resolution is not None and c.view == View() and loaded.metadata.get("resolution") != "mixed":
        side = loaded.metadata.get("resolution")
        if pictures and side != str(resolution):
            raise FewstepError(
                "reference", f"images of {side} pixels in {path}", f"{resolution}, those of this evaluation"
            )
        expected["resolution"] = str(resolution)
    check_metadata(loaded.metadata, expected, path)
    if loaded.moments is None:
        raise FewstepError("reference", f"no statistics in {path}", "means and covariances of features")
    if wants_features and loaded.features is None:
        needing = ", ".join(sorted(NEED_FEATURES & set(c.metrics)))
        raise FewstepError(
            "reference",
            f"only moments in {path}",
            f"the features of the real images, for {needing}",
            "Make the file again with `fewstep reference`",
        )
    return loaded
