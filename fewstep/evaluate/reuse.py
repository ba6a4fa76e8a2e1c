"""Reuse of scores: rows of an earlier report, of the same pipeline by the same protocol."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from fewstep import io
from fewstep.assets import ASSETS, asset_path
from fewstep.errors import FewstepError
from fewstep.evaluate.report import Row
from fewstep.teachers import NETWORKS

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


REMEASURED = ("seconds_per_image", "network_evaluations", "peak_memory_gib")
"""Costs, which depend on the machine."""

UNCOMPARED = ("batch_size", "versions")
"""Entries of a protocol's description that scores do not depend on."""


class EarlierScores(NamedTuple):
    """rows: by step count, those that can be taken; words: for people, where they come from or why there are none."""

    rows: dict[int, Row]
    words: str


def fingerprints(pipeline: "DiffusionPipeline") -> dict[str, str]:
    """16 hexadecimal digits for each of a pipeline's networks, over its weights' types and bytes, and for its scheduler."""
    found = {"class": type(pipeline).__name__}
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            digest = hashlib.sha256()
            for key, weight in part.state_dict().items():
                digest.update(f"{key} {weight.dtype} {tuple(weight.shape)}".encode())
                digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            found[name] = digest.hexdigest()[:16]
    # Keys with an underscore are about the library that wrote it.
    settings = {key: value for key, value in pipeline.scheduler.config.items() if not key.startswith("_")}
    written = json.dumps([type(pipeline.scheduler).__name__, settings], sort_keys=True, default=str)
    return found | {"scheduler": io.sha256(written, 16)}


def earlier_rows(
    source: str,
    protocol: Mapping[str, object],
    pipeline: Mapping[str, str],
    guidance_scale: float | None,
    steps: Sequence[int],
) -> EarlierScores:
    """The rows of a report whose scores `evaluate` would find again.

    Args:
        source: a report, as `write_report` leaves it; or an asset's name, for that of its teacher.
        protocol: the description of the protocol of this evaluation.
        pipeline: `fingerprints` of the pipeline. Parts that only one side has, as text encoders behind a cache, are not compared.
        guidance_scale: of the pipeline's call; None = its default.

    Raises ValueError for a file that is no report.
    """
    file = asset_path(source) / "evaluation.json" if source in ASSETS else Path(source)
    try:
        report = io.read_json(file)
        settings, rows = dict(report["protocol"]), [dict(row) for row in report["results"]]
    except OSError as e:
        raise FewstepError(str(file), f"a file that cannot be read ({e.strerror})", "a report of scores") from None
    except (ValueError, KeyError, TypeError):
        raise FewstepError(
            str(file), "other content", "a report of scores, such as evaluation.json in the folder of a run"
        ) from None
    # The hash last: where it differs, so does a setting, which says more.
    for key in sorted(protocol, key=lambda key: key == "hash"):
        if key not in UNCOMPARED and settings.get(key) != protocol[key]:
            return EarlierScores({}, f"{file}: found {key} {settings.get(key)}; expected {protocol[key]}")
    own = [row for row in rows if _same(row.get("fingerprints") or {}, pipeline)]
    if not own:
        return EarlierScores({}, f"{file} has no scores of this pipeline")
    fitting = {row["steps"]: row for row in own if row["guidance_scale"] == guidance_scale}
    if not fitting:
        scales = sorted({str(row["guidance_scale"]) for row in own})
        return EarlierScores({}, f"{file}: found guidance {', '.join(scales)}; expected {guidance_scale}")
    taken = {n: fitting[n] | {"scores_from": str(file)} for n in steps if n in fitting}
    return EarlierScores(taken, f"{file} has them at {', '.join(map(str, taken)) or 'none of these'} steps")


def _same(a: Mapping[str, str], b: Mapping[str, str]) -> bool:
    return any(name in a and name in b for name in NETWORKS) and all(a[key] == b[key] for key in a.keys() & b.keys())
