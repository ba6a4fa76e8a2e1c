"""Conditions of a protocol's images for the pipeline, and their prompts for the scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fewstep import io
from fewstep.data.base import Condition, ConditionKind
from fewstep.data.fashion import CLASSES, caption
from fewstep.data.prompts import read_prompts
from fewstep.errors import FewstepError
from fewstep.evaluate.protocol import NO_OVERRIDES, ConditionSource, PathOverrides, Protocol, find_data


@dataclass(frozen=True)
class Conditions:
    """The condition of every image for the pipeline, and its prompt for CLIP (None where there is none)."""

    conditions: Sequence[Condition]
    prompts: Sequence[str] | None

    def prompts_at(self, indices: Sequence[int]) -> list[str] | None:
        return None if self.prompts is None else [self.prompts[i] for i in indices]

    def fingerprint(self) -> str:
        """16 hexadecimal digits over all of them."""
        return io.sha256(repr((list(self.conditions), self.prompts)), 16)


def random_label(seed: int, index: int, num_labels: int) -> int:
    """Uniform, and the same for every batch size and number of processes."""
    digest = io.blake2b(f"{seed}:{index}:label", 8)
    return int.from_bytes(digest, "little") % num_labels


def prompts_file(protocol: str, c: ConditionSource, overrides: PathOverrides) -> Path | None:
    """The file of a protocol's prompts; ValueError where it is missing."""
    if c.source != "prompts":
        return None
    if overrides.prompts is not None:
        return overrides.prompts
    if c.file is None:
        raise FewstepError("prompts", f"none in protocol {protocol}", "a file", "Give --prompts FILE")
    return find_data(overrides.folder or protocol, c.file, c.file_from, "--prompts")


def load_conditions(
    protocol: Protocol,
    kind: ConditionKind,
    num_labels: int | None,
    name: str = "custom",
    overrides: PathOverrides = NO_OVERRIDES,
) -> Conditions:
    """Conditions of images 0 ... images - 1; prompts and classes repeat in order, so they are balanced.

    Raises FewstepError for a pipeline of prompts where the protocol has none, and for a wrong number of them.
    """
    c, n = protocol.conditions, protocol.images
    file = prompts_file(name, c, overrides)
    fashion = c.source == "fashion"
    prompts: list[str] | None = None
    if file is not None:
        lines = read_prompts(file)
        if c.count is not None and len(lines) != c.count:
            raise FewstepError("prompts", f"{len(lines)} in {file}", f"{c.count}, by protocol {name}")
        prompts = [lines[i % len(lines)] for i in range(n)]
    elif fashion:
        prompts = [caption(i % len(CLASSES)) for i in range(n)]
    match kind:
        case "prompt" if prompts is None:
            raise FewstepError(
                "prompts",
                f"none (the protocol's conditions are {c.source})",
                "prompts for this pipeline",
                "Give a file with one prompt a line",
            )
        case "prompt":
            return Conditions(prompts or [], prompts)
        case "label":
            classes = len(CLASSES) if fashion else c.num_labels or num_labels
            if classes is None:
                raise FewstepError("num_labels", "nothing in pipeline and protocol", "a number of classes")
            if c.draw == "random":
                return Conditions([random_label(protocol.seed, i, classes) for i in range(n)], None)
            # The captions of a prompts file need not be those of the labels; those of `fashion` are.
            return Conditions([i % classes for i in range(n)], None if file else prompts)
        case "none":
            return Conditions([None] * n, None)
