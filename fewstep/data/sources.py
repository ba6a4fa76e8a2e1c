"""The source that a config describes, or that a caller has in memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np

from fewstep.config import DataConfig
from fewstep.data.base import Listed, Selected, Source, no_images
from fewstep.data.fashion import Fashion
from fewstep.data.folder import Folder
from fewstep.data.memory import InMemory, Items
from fewstep.data.prompts import read_prompts
from fewstep.errors import FewstepError

LIMIT_SEED = 0
"""One for every run: runs with other seeds must learn from the same samples."""


def limited(source: Source, size: int) -> Selected:
    """`size` samples of a source, drawn without replacement and always the same; all if it has no more."""
    kept: list[int] = np.random.default_rng(LIMIT_SEED).permutation(len(source))[:size].tolist()
    return Selected(source, kept)


def load_source(config: DataConfig, image_size: int) -> Source:
    """The configured source, its images centre-cropped and resized to image_size pixels a side.

    Raises FewstepError, naming the config key, for paths and labels that do not fit.
    """
    return _checked(_load(config, image_size), config)


def memory_source(data: Sequence[str] | Items, config: DataConfig, image_size: int) -> Source:
    """The source of a caller's own objects: prompts, or items with images; `config.source` and `config.path` are not read.

    data: a list of prompts, a `datasets.Dataset`, or any sized collection that `InMemory` takes.
    Raises FewstepError, naming the key `data`, for anything else.
    """
    if not len(data):
        raise FewstepError("data", "an empty collection", "prompts, or items with images")
    if isinstance(data[0], str):
        source: Source = Listed([str(prompt) for prompt in cast(Sequence[str], data)], "prompt")
    else:
        source = InMemory(cast(Items, data), image_size, config.num_labels)
    return _checked(source, config)


def _checked(source: Source, config: DataConfig) -> Source:
    if config.cache_latents and not source.has_images:
        raise no_images(source.conditions, "data.cache_latents")
    return source if config.limit is None else limited(source, config.limit)


def _load(config: DataConfig, image_size: int) -> Source:
    match config.source:
        case "fashion":
            return Fashion(image_size, config.num_labels)
        case "labels" if config.num_labels is not None:
            return Listed(range(config.num_labels), "label")
        case "none":
            return Listed([None], "none")
        case "folder":
            return Folder(_path(config), image_size, config.num_labels)
        case "parquet":
            from fewstep.data.parquet import Parquet

            return Parquet(_path(config), image_size, config.num_labels)
        case "prompts":
            return Listed(read_prompts(_path(config), "data.path"), "prompt")
    raise FewstepError("data.source", repr(config.source), "fashion, folder, parquet, prompts, labels or none")


def _path(config: DataConfig) -> Path:
    if config.path is None:  # excluded by DataConfig, unless it was built without validation
        raise FewstepError("data.path", "null", f"a path, for source {config.source!r}")
    return config.path
