"""Files of reference statistics: our own, with what they were made of, and those of pytorch-fid, clean-fid, EDM and ADM."""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fewstep import io
from fewstep.errors import FewstepError

SUFFIXES = (".npz", ".safetensors")


@dataclass(frozen=True)
class Moments:
    """Mean [D] and covariance [D, D] in float64 (divided by count - 1); count is None where a file does not say."""

    mean: Tensor
    covariance: Tensor
    count: int | None


def moments(features: Tensor) -> Moments:
    """Moments of features [N, D]; ValueError for fewer than two."""
    if len(features) < 2:
        raise FewstepError("images", len(features), "at least 2, for a covariance")
    features = features.double()
    return Moments(features.mean(0), features.T.cov().reshape(features.shape[1], -1), len(features))


@dataclass(frozen=True)
class Statistics:
    """The content of a file about real images.

    moments: of their features; None where the file holds images only.
    features: [N, D], where it keeps them.
    images: uint8 [N, H, W, 3], in ADM's reference batches.
    metadata: what they were made of; empty for the files of others.
    """

    moments: Moments | None
    features: Tensor | None = None
    images: NDArray[np.uint8] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


def save_statistics(statistics: Statistics, file: Path) -> None:
    """Write .npz (mu, sigma and, which other libraries ignore, features and metadata) or .safetensors; no pickles."""
    m = statistics.moments
    if m is None:
        raise FewstepError("statistics", "no moments", "a mean and a covariance of features")
    metadata = {**statistics.metadata, "ddof": "1"} | ({} if m.count is None else {"count": str(m.count)})
    if file.suffix == ".safetensors":
        tensors = {"mean": m.mean.cpu().contiguous(), "covariance": m.covariance.cpu().contiguous()}
        if statistics.features is not None:
            tensors["features"] = statistics.features.cpu().contiguous()
        with io.atomic(file) as partial:
            save_file(tensors, partial, metadata=metadata)
    elif file.suffix == ".npz":
        arrays: dict[str, NDArray[np.float64]] = {"mu": m.mean.cpu().numpy(), "sigma": m.covariance.cpu().numpy()}
        if statistics.features is not None:
            arrays["features"] = statistics.features.cpu().numpy()
        with io.atomic(file) as partial, partial.open("wb") as f:  # of a name, numpy would change the end
            np.savez(f, allow_pickle=False, **arrays, metadata=np.array(json.dumps(metadata)))
    else:
        raise FewstepError("reference", repr(str(file)), f"a file of statistics, ending in {' or '.join(SUFFIXES)}")


def load_statistics(file: Path) -> Statistics:
    """Read what `save_statistics` writes, and .npz with mu and sigma (pytorch-fid, clean-fid, EDM), feats or arr_0 (ADM).

    Raises ValueError, in one sentence, for anything else.
    """
    try:
        if file.suffix == ".npz":
            return _npz(file)
        if file.suffix == ".safetensors":
            return _safetensors(file)
    except (OSError, SafetensorError, zipfile.BadZipFile, EOFError) as e:
        raise FewstepError("reference", f"{file}, which cannot be read ({e})", "a file of statistics") from None
    raise FewstepError("reference", repr(str(file)), f"a file of statistics, ending in {' or '.join(SUFFIXES)}")


def save_moments(m: Moments, file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write safetensors with mean, covariance and, as metadata, count and ddof, whatever the file's name."""
    tensors = {"mean": m.mean.cpu().contiguous(), "covariance": m.covariance.cpu().contiguous()}
    count = {} if m.count is None else {"count": str(m.count)}
    with io.atomic(file) as partial:
        save_file(tensors, partial, metadata={**(metadata or {}), "ddof": "1", **count})


def load_moments(file: Path) -> Moments:
    """Moments of a file of statistics; ValueError for one that holds none."""
    m = load_statistics(file).moments
    if m is None:
        raise FewstepError("reference", f"images in {file}", "statistics", "Make them with `fewstep reference`")
    return m


def _safetensors(file: Path) -> Statistics:
    with safe_open(file, "pt") as f:
        names, metadata = set(f.keys()), f.metadata() or {}
        if not {"mean", "covariance"} <= names:
            raise FewstepError("reference", f"tensors {', '.join(sorted(names))} in {file}", "mean and covariance")
        features = f.get_tensor("features") if "features" in names else None
        m = _moments(f.get_tensor("mean"), f.get_tensor("covariance"), metadata, file)
    return Statistics(m, features, None, metadata)


def _npz(file: Path) -> Statistics:
    if not zipfile.is_zipfile(file):  # which numpy would take for a pickle
        raise FewstepError("reference", f"{file}, which cannot be read (no archive of arrays)", "a file of statistics")
    with np.load(file, allow_pickle=False) as arrays:
        names = set(arrays.files)
        if not ({"mu", "sigma"} <= names or "feats" in names or "arr_0" in names):
            raise FewstepError(
                "reference", f"arrays {', '.join(arrays.files)} in {file}", "mu and sigma, feats, or arr_0"
            )
        try:
            metadata = json.loads(str(arrays["metadata"])) if "metadata" in names else {}
            features = next((torch.from_numpy(arrays[k]) for k in ("features", "feats") if k in names), None)
            images = _images(arrays["arr_0"], file) if "arr_0" in names else None
            m: Moments | None
            if {"mu", "sigma"} <= names:
                m = _moments(torch.from_numpy(arrays["mu"]), torch.from_numpy(arrays["sigma"]), metadata, file)
            else:
                m = None if features is None else moments(features)
        except ValueError as e:
            # numpy says so of an array that would need unpickling.
            raise FewstepError("reference", f"{file}, which cannot be read ({e})", "a file of statistics") from None
    return Statistics(m, features, images, metadata)


def _images(array: NDArray[np.uint8], file: Path) -> NDArray[np.uint8]:
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
        raise ValueError(f"arr_0: found {array.dtype} {list(array.shape)}; expected images, uint8 [N, H, W, 3]")
    return array


def _moments(mean: Tensor, covariance: Tensor, metadata: Mapping[str, str], file: Path) -> Moments:
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise FewstepError(
            "reference",
            f"shapes {list(mean.shape)} and {list(covariance.shape)} in {file}",
            "a mean [D] and a covariance [D, D]",
        )
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise FewstepError("reference", f"values in {file} that are not finite", "finite statistics")
    count = int(metadata["count"]) if "count" in metadata else None
    return Moments(mean.double(), covariance.double(), count)


def check_metadata(metadata: Mapping[str, str], expected: Mapping[str, str], where: str) -> None:
    """FewstepError unless every key that both have has one value; statistics of other libraries have none and pass."""
    for key, value in expected.items():
        if metadata.get(key, value) != value:
            raise FewstepError(
                "reference",
                f"{where} of {key} {_short(metadata[key])}",
                f"{_short(value)}, as in this evaluation",
                "Scores would mean nothing; make the file again with `fewstep reference`",
            )


def _short(value: str) -> str:
    return value[:12] if len(value) == 64 else value
