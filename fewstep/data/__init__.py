"""Data: what a run learns from, and encodings of it.

A *source* answers indices with images [B, 3, H, W] in [-1, 1] and conditions (prompts, labels or nothing); index i is
always the same sample. A *stream* is the endless shuffled order of a source, shared among the ranks and resumed exactly.

    load_source     the source of a config: fashion, folder, parquet, prompts, labels, none
    memory_source   the source of a caller's own prompts or items (`fewstep.distill(data=...)`)
    Stream          micro-batches of one rank

The files:

    base            Source, Raw, and the sources that only list conditions or select from another
    fashion, folder, parquet, memory    one source each
    images, metadata, prompts           image files, captions beside them, files of prompts
    hub             data sets and models in the hub's cache
    stream          the order
    validate        broken images, found before training
    tensor_store, encoding_cache        encoded prompts and latents on disk

`encoding_cache` alone knows teachers. Methods, training, evaluation and export may import this package; it imports
`teachers`, `config` and what lies below. Evaluation reads images and prompts by the same functions as training.
"""

from fewstep.data.base import Condition, ConditionKind, Listed, Raw, Selected, Source
from fewstep.data.images import IMAGE_SUFFIXES
from fewstep.data.memory import InMemory
from fewstep.data.prompts import read_prompts
from fewstep.data.sources import limited, load_source, memory_source
from fewstep.data.stream import Stream

__all__ = [
    "IMAGE_SUFFIXES",
    "Condition",
    "ConditionKind",
    "InMemory",
    "Listed",
    "Raw",
    "Selected",
    "Source",
    "Stream",
    "limited",
    "load_source",
    "memory_source",
    "read_prompts",
]
