"""Protocols: what must be equal before two scores may be compared, as a named YAML file."""

import difflib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

import yaml
from annotated_types import Ge
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError, model_validator

from fewstep import io
from fewstep.config import Strict, yaml12
from fewstep.config.problems import ConfigError, explain
from fewstep.data.hub import DATA
from fewstep.errors import FewstepError, MissingError

FOLDER = Path(__file__).parent / "protocols"
"""The named protocols."""

Metric = Literal[
    "fid", "fid_infinity", "kid", "cmmd", "precision_recall", "density_coverage", "inception_score", "diversity"
]
NEED_FEATURES = {"kid", "cmmd", "precision_recall", "density_coverage"}
"""Scores for which the moments of the real features do not suffice."""
NEED_REFERENCE = NEED_FEATURES | {"fid", "fid_infinity"}

RewardName = Literal["pickscore", "aesthetic", "hpsv2", "hpsv2.1", "image_reward", "mps"]
REWARDS: tuple[RewardName, ...] = get_args(RewardName)
"""Human-preference reward models; see `fewstep.evaluate.rewards`."""
WORDLESS_REWARDS = {"aesthetic"}
"""Rewards of the image alone, without a prompt."""
OWN_REWARD = r"^[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*$"
"""Names of the user's own rewards: package.module:callable."""


def is_own_reward(name: str) -> bool:
    return re.match(OWN_REWARD, name) is not None


class View(Strict):
    """Crop and resizing of an image, generated or real, before a network sees it."""

    crop: Literal["square"] | PositiveInt | None = None
    """Its largest central square, or the central square of this many pixels; null = the whole."""
    size: PositiveInt | None = None
    """Side in pixels to which PIL then resizes it, rounding to uint8; null = unchanged."""
    filter: Literal["lanczos", "bicubic", "bilinear", "box"] = "lanczos"
    """PIL's filter of that resizing."""


class ConditionSource(Strict):
    source: Literal["fashion", "prompts", "labels", "none"]
    """The first caption of each class of Fashion-MNIST in turn; a file of prompts; class labels; nothing."""
    file: str | None = None
    """Prompts in order: .txt with one a line, blank lines skipped, or .jsonl with a string or {"prompt": ...} a line."""
    file_from: str = ""
    """Source of that file, for the error message where it is missing."""
    count: PositiveInt | None = None
    """Prompts that the file must hold; null = any number, repeated in order."""
    num_labels: PositiveInt | None = None
    """Number of classes; null = what the pipeline says."""
    draw: Literal["cycle", "random"] = "cycle"
    """Labels: 0, 1, 2, ... in turn, or independent and uniform, fixed by (seed, index)."""

    @model_validator(mode="after")
    def _complete(self) -> "ConditionSource":
        if self.source != "labels" and (self.num_labels is not None or self.draw != "cycle"):
            raise ValueError(
                f"found num_labels or draw with source {self.source}; expected them for source labels only. Leave them out"
            )
        if self.source != "prompts" and (self.file is not None or self.count is not None):
            raise ValueError(
                f"found file or count with source {self.source}; expected them for source prompts only. Leave them out"
            )
        return self


class Comparison(Strict):
    """Scores of all images together, in one kind of features."""

    name: str = ""
    """Appended to the names of its scores, as in fid_patch; empty = nothing."""
    features: str
    """`fashion`, `inception`, `inception-clean`, `efficientnet-lite0`, a folder or cached hub id of a transformers model,
    or module:function of Python's path."""
    view: View = View()
    """View of the images of which the features are taken."""
    metrics: tuple[Metric, ...]
    """The scores."""
    reference: str | None = None
    """Statistics of the real images: `fashion`, a file, a folder of images, or owner/name[:split] of a data set of the hub."""
    reference_from: str = ""
    """Source of the reference, for the error message where it is missing."""
    nearest_k: PositiveInt = 5
    """Neighbours of precision, recall, density and coverage."""
    splits: PositiveInt = 10
    """Parts, in the order of the images, over which the Inception Score is averaged."""

    @model_validator(mode="after")
    def _complete(self) -> "Comparison":
        if not self.metrics:
            raise ValueError("metrics: found none; expected at least one")
        if self.reference is None and (needing := NEED_REFERENCE & set(self.metrics)):
            raise ValueError(f"reference: found null; expected one for {', '.join(sorted(needing))}. Name a reference")
        return self


class ClipScoring(Strict):
    """Agreement of images with their prompts: the mean of scale * cosine."""

    backend: Literal["transformers", "open_clip"] = "transformers"
    """Library that holds the model."""
    model: str | None
    """`fashion`, a folder or cached hub id, or open_clip's name; null = to be chosen with --clip."""
    pretrained: str | None = None
    """open_clip's tag of weights, or a file of them."""
    prefix: str = ""
    """Put before every prompt."""
    scale: PositiveFloat = 100.0
    """Factor of the cosine."""
    clamp: bool = True
    """Negative cosines count as 0."""
    view: View = View()
    """View of the images before the model's own preprocessing."""


class Protocol(Strict):
    about: str
    """Purpose, and the published numbers that it follows."""
    images: Annotated[int, Ge(2)]
    """Generated images."""
    seed: NonNegativeInt = 0
    """The noise of image i is fixed by (seed, i)."""
    resolution: PositiveInt | None = None
    """Side in pixels that generated images must have; null = any."""
    uint8: Literal["round", "truncate"] = "round"
    """Conversion of [0, 1] to 0 ... 255: round(255 x), or floor(255 x) as in ADM's and DMD2's scripts."""
    conditions: ConditionSource
    """Source of the images' prompts or labels."""
    comparisons: tuple[Comparison, ...] = ()
    """Scores against real images."""
    clip: ClipScoring | None = None
    """CLIP score; null = none."""
    rewards: tuple[RewardName | Annotated[str, Field(pattern=OWN_REWARD)], ...] = ()
    """Means over all images of human-preference reward models, whose weights the user provides; or of the user's
    own reward, as package.module:callable."""

    @model_validator(mode="after")
    def _distinct(self) -> "Protocol":
        names = [f"{metric}_{c.name}".rstrip("_") for c in self.comparisons for metric in c.metrics]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(
                f"comparisons: duplicate score {', '.join(twice)}; expected distinct names. Give one comparison a `name`"
            )
        if len(set(self.rewards)) < len(self.rewards):
            raise ValueError(f"rewards: found {', '.join(self.rewards)}; expected each once")
        if not self.comparisons and self.clip is None and not self.rewards:
            raise ValueError("comparisons, rewards, clip: found none; expected at least one score")
        return self

    def hash(self) -> str:
        """12 hexadecimal digits over every setting but `about`: equal for equal protocols, whatever their file's layout."""
        settings = self.model_dump(mode="json", exclude={"about": True, "comparisons": {"__all__": {"reference_from"}}})
        settings["conditions"].pop("file_from")
        if not self.rewards:  # protocols without keep the hash that they had before there were any
            settings.pop("rewards")
        return io.sha256(json.dumps(settings, sort_keys=True), 12)


@dataclass(frozen=True)
class PathOverrides:
    """Paths in place of a protocol's own: where data are on this machine, not what is measured.

    references: by the comparison's name, "" for the unnamed. folder: the name of the protocol that was changed, by which its own
    files are found; None for one that was not.
    """

    references: Mapping[str, str]
    prompts: Path | None = None
    folder: str | None = None


NO_OVERRIDES = PathOverrides({})


def names() -> list[str]:
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def load_protocol(name: str) -> tuple[str, Protocol]:
    """Name and content of a named protocol or of a YAML file; ValueError, in words, for anything wrong."""
    file = FOLDER / f"{name}.yaml"
    if not file.is_file():
        file = Path(name)
        if not file.is_file():
            close = difflib.get_close_matches(name, names(), n=1)
            hint = f"Did you mean {close[0]!r}?" if close else None
            raise MissingError("protocol", repr(name), f"a file or one of {', '.join(names())}", hint)
    try:
        raw = yaml12.parse(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as e:
        raise FewstepError(str(file), " ".join(str(e).split()), "YAML") from None
    if not isinstance(raw, dict):
        raise FewstepError(str(file), type(raw).__name__, "a mapping of keys to values")
    try:
        return file.stem, Protocol.model_validate(raw)
    except ValidationError as e:
        raise ConfigError(str(file), list(dict.fromkeys(explain(Protocol, raw, x) for x in e.errors()))) from None


def find_data(protocol: str, file: str, comes_from: str, option: str) -> Path:
    """A protocol's file or folder, as a path or under $FEWSTEP_DATA/<protocol>/; MissingError says how to get it."""
    root = os.environ.get(DATA)
    places = [Path(file).expanduser()] + ([Path(root) / protocol / file] if root else [])
    for place in places:
        if place.exists():
            return place
    where = f"{root}/{protocol}/" if root else f"a folder {protocol}/ under the one that ${DATA} names"
    source = f" ({comes_from})" if comes_from else ""
    hint = f"Put it into {where}, or give {option} PATH"
    raise MissingError(f"protocol {protocol}", f"no {file}{source}", "it on this machine", hint)
