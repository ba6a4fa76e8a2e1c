"""Images that cannot be read, found before a training and not in the middle of it."""

from collections.abc import Callable
from typing import Literal

from tqdm.auto import tqdm

from fewstep.data.sources import Selected, Source

OnError = Literal["fail", "skip"]
Found = list[tuple[int, str]]
"""Indices, and what is wrong there."""

SHOWN = 3
"""Images that are named."""


def readable(
    source: Source,
    on_error: OnError,
    process: int = 0,
    processes: int = 1,
    gather: Callable[[Found], Found] = lambda found: found,
) -> Source:
    """The source, or with "skip", and a warning, its samples whose images are not broken. Raises ValueError with "fail".

    What is found are files that are no images, and those that are cut short; see `Source.broken`. Every process looks at its
    part, and `gather` makes one list of what all have found, the same everywhere.
    """
    mine = source.broken(range(process, len(source), processes), thorough=on_error == "skip", quiet=process > 0)
    return without(source, gather(list(mine.items())), on_error, "cannot be read", quiet=process > 0)


def without(source: Source, found: Found, on_error: OnError, what: str, quiet: bool = False) -> Source:
    """The source without what was found in it, as `readable` has it."""
    if not found:
        return source
    found = sorted(found)
    shown = "; ".join(reason for _, reason in found[:SHOWN])
    message = f"{len(found)} of {len(source)} images {what}, such as: {shown}"
    if on_error == "fail":
        raise ValueError(f"data.path: {message}. Mend or remove them, or set data.on_error=skip to leave them out")
    if len(found) == len(source):
        raise ValueError(f"data.path: {message}. None is left")
    if not quiet:
        tqdm.write(f"warning: {message}. They are left out (data.on_error: skip)")
    gone = {index for index, _ in found}
    return Selected(source, [i for i in range(len(source)) if i not in gone])
