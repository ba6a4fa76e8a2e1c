"""Models and data sets of the hub on this machine: in its cache, or under $FEWSTEP_DATA. Nothing is downloaded."""

import os
import re
from pathlib import Path
from typing import Literal

from fewstep.errors import FewstepError, MissingError

DATA = "FEWSTEP_DATA"
"""Environment variable: the folder with a subfolder of data for each protocol, and with models and data sets."""

DATASET = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?::([\w./-]+))?")
SHARD = re.compile(r"(?:^|[-_])(?:\d+-of-(?P<total>\d+)(?:-[0-9a-f]{16})?|\d{5,})$|^\d+$")
"""End of the names of parts, as in train-00000-of-00004; older ones with a hash after it."""
SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")
"""Folders of images that are splits."""
FILES = (".npz", ".safetensors", ".parquet")


def cached(name: str, kind: Literal["model", "dataset"]) -> Path | None:
    """The snapshot of a repository `owner/name` in the hub's cache; None where it has none, or the name is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, repo_type=kind, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
        return None


def is_dataset(source: str) -> bool:
    """Whether `source` is written as a data set of the hub, owner/name or owner/name:split, and is no path that exists."""
    path = Path(source)
    return DATASET.fullmatch(source) is not None and path.suffix not in FILES and not path.exists()


def local_files(path: Path, key: str = "data.path") -> tuple[Path, list[Path]]:
    """A path unchanged; of a data set of the hub, its folder on this machine and the parquet files of its split."""
    return dataset_files(str(path), key) if is_dataset(str(path)) else (path, [])


def dataset_files(source: str, key: str) -> tuple[Path, list[Path]]:
    """The folder of `owner/name[:split]`, and its parquet files in order; with none, images lie below the folder.

    It is looked for as a path, under $FEWSTEP_DATA/datasets and in the hub's cache. A split is recognised by the files' names,
    as in data/train-00000-of-00004.parquet, after the folder where that is not `data` (`digits/train`), or is a folder of images
    (`train`, `test`, ...); it may be left out where there is one only.

    Raises FewstepError, naming `key`, for a data set that is not there or not whole, or a split that it does not have.
    """
    match = DATASET.fullmatch(source)
    assert match is not None  # is_dataset
    name, split = match.groups()
    download = f"`hf download --repo-type dataset {name}`"
    root = os.environ.get(DATA)
    places = [Path(name)] + ([Path(root) / "datasets" / name] if root else [])
    folder = next((place for place in places if place.is_dir()), None) or cached(name, "dataset")
    if folder is None:
        raise MissingError(key, repr(source), "a path, or a data set in the hub's cache", f"{download} puts it there")
    if files := sorted(folder.rglob("*.parquet")):
        groups: dict[str, list[Path]] = {}
        for file in files:
            groups.setdefault(_split(file.relative_to(folder)), []).append(file)
        shards = groups[_chosen(list(groups), split, key, source)]
        if (whole := max(_total(file) for file in shards)) > len(shards):
            raise MissingError(key, f"{len(shards)} files of {source!r}", whole, f"{download} downloads the others")
        return folder, shards
    inner = [sub for place in (folder, folder / "data") if place.is_dir() for sub in sorted(place.iterdir())]
    splits = {sub.name: sub for sub in inner if sub.is_dir() and sub.name in SPLITS}
    return (splits[_chosen(list(splits), split, key, source)] if splits or split else folder), []


def _split(file: Path) -> str:
    """The split of a file: its name without the number, after its folder."""
    stem = SHARD.sub("", file.stem)
    folder = file.parent.relative_to("data") if file.parent.parts[:1] == ("data",) else file.parent
    return (folder / stem).as_posix()


def _total(file: Path) -> int:
    match = SHARD.search(file.stem)
    return int((match and match["total"]) or 1)


def _chosen(splits: list[str], split: str | None, key: str, source: str) -> str:
    """The only split, or the one that is called `split` or ends in it."""
    if split in splits:
        return str(split)
    found = splits if split is None else [s for s in splits if s.endswith(f"/{split}")]
    if len(found) == 1:
        return found[0]
    name = source.partition(":")[0]
    if not splits:
        raise FewstepError(key, repr(source), name, "The data set has no splits")
    choice = found or splits
    raise FewstepError(key, repr(source), f"a split, one of {', '.join(choice)}, as {name}:{choice[0]}")
