"""Check of images before training, which would otherwise fail in the middle of it."""

from collections.abc import Callable
from typing import Literal

from tqdm.auto import tqdm

from fewstep.data.base import Selected, Source
from fewstep.errors import FewstepError

OnError = Literal["fail", "skip"]
Found = list[tuple[int, str]]
"""Indices of samples, each with what is wrong."""

SHOWN = 3
"""Number of images that a message names."""


def check_images(
    source: Source,
    on_error: OnError,
    rank: int = 0,
    world_size: int = 1,
    gather: Callable[[Found], Found] = lambda found: found,
) -> Source:
    """The source, or with "skip", and a warning, its samples whose images are not broken.

    Broken are files that are no images, and those that are cut short; see `Source.broken`. Every rank checks its part;
    `gather` joins what all have found to one list, the same everywhere.

    Raises FewstepError with "fail".
    """
    mine = source.broken(range(rank, len(source), world_size), thorough=on_error == "skip", quiet=rank > 0)
    return drop_broken(source, gather(list(mine.items())), on_error, "cannot be read", quiet=rank > 0)


def drop_broken(source: Source, found: Found, on_error: OnError, problem: str, quiet: bool = False) -> Source:
    """The source without the samples in `found`, or an error, as `check_images` has it."""
    if not found:
        return source
    found = sorted(found)
    shown = "; ".join(reason for _, reason in found[:SHOWN])
    message = f"{len(found)} of {len(source)} images that {problem}, such as: {shown}"
    if on_error == "fail":
        hint = "Repair or remove them, or set data.on_error=skip to leave them out"
        raise FewstepError("data.path", message, "images that can be used", hint)
    if len(found) == len(source):
        raise FewstepError("data.path", message, "at least one that can be used")
    if not quiet:
        tqdm.write(f"warning: data.path: found {message}. They are left out (data.on_error: skip)")
    broken = {index for index, _ in found}
    return Selected(source, [i for i in range(len(source)) if i not in broken])
