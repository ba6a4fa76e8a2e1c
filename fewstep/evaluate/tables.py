"""What was compared and how it came out: the protocol, the report's file, its table and its picture."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fewstep import io
from fewstep.assets import ASSETS, asset_path
from fewstep.data.hub import is_dataset
from fewstep.evaluate.models.clip import clip_folder
from fewstep.evaluate.models.features import features_weights
from fewstep.evaluate.protocol import ClipScoring, Comparison, Protocol, is_own_reward
from fewstep.evaluate.references import (
    NOTHING,
    Given,
    prompts_file,
    protocol_of,
    reference_path,
    resolve,
    stored_moments,
)
from fewstep.evaluate.statistics import SUFFIXES, Statistics, load_statistics

LIBRARIES = ("torch", "diffusers", "transformers", "torchmetrics")


def recommended_guidance_scale(teacher: str) -> float | None:
    """The guidance scale that an asset recommends for its teacher; None for any other pipeline."""
    if teacher not in ASSETS:
        return None
    scale: float = json.loads((asset_path(teacher) / "asset.json").read_text())["guidance_scale"]
    return scale


def _weights(file: Path | None) -> str | None:
    return io.sha256_of_file(file) if file is not None and file.exists() else None


def _clip_weights(scoring: ClipScoring | None) -> Path | None:
    if scoring is None or scoring.model is None:
        return None
    if scoring.backend == "open_clip":
        return Path(scoring.pretrained) if scoring.pretrained and Path(scoring.pretrained).is_file() else None
    return clip_folder(scoring.model) / "model.safetensors"


def _rewards(protocol: Protocol) -> dict[str, str | None]:
    from fewstep.evaluate.rewards.load import qualified_name, reward_weights

    return {
        name: qualified_name(name) if is_own_reward(name) else _weights(reward_weights(name))
        for name in protocol.rewards
    }


def _clip_words(scoring: ClipScoring | None) -> str | None:
    if scoring is None:
        return None
    prefix = f", after the words {scoring.prefix!r}" if scoring.prefix else ""
    return f"mean of {scoring.scale:g} * " + ("max(cosine, 0)" if scoring.clamp else "cosine") + prefix


def _reference(name: str, c: Comparison, given: Given) -> dict[str, Any]:
    path = reference_path(name, c, given)
    if path is None:
        return {}
    if path in ASSETS and stored_moments(path, c) is None:
        return {"reference": path, "reference_images": "all images in the package"}
    file = asset_path(path) / "reference.safetensors" if path in ASSETS else Path(path)
    if not file.is_file():
        return {
            "reference": path,
            "reference_images": f"all images of the {'data set' if is_dataset(path) else 'folder'}",
        }
    statistics = load_statistics(file) if file.suffix in SUFFIXES else Statistics(None)
    known = path in ASSETS or "features" in statistics.metadata
    return {
        "reference": path,
        "reference_images": None if statistics.moments is None else statistics.moments.count,
        "reference_sha256": io.sha256_of_file(file),
        # Statistics that others wrote do not say with which network.
        "reference_features": "those of this evaluation" if known else "not recorded in the file",
    }


def describe_protocol(
    protocol: Protocol, *, name: str = "custom", batch_size: int = 100, given: Given = NOTHING
) -> dict[str, Any]:
    """What must be equal before two scores may be compared: the protocol's name, hash and settings, and the hashes of its files.

    Settings of all comparisons stand under `definition`; those of the first stand flat beside it. A reward of the user's own
    has no file to hash, and stands there with its qualified name.
    """
    first = protocol.comparisons[0] if protocol.comparisons else None
    prompts = prompts_file(name, protocol.conditions, given)
    text = {
        "fashion": "fashion: first caption, class = index % 10",
        "labels": f"labels, {protocol.conditions.draw}",
        "none": "none",
    }
    features = None if first is None else first.features
    return {
        "name": name,
        "hash": protocol.hash(),
        **({"reference": None, "reference_images": None} | ({} if first is None else _reference(name, first, given))),
        "features": features,
        "features_sha256": None if features is None else _weights(features_weights(features)),
        "covariance": "float64, divided by n - 1",
        "clip": None if protocol.clip is None else protocol.clip.model,
        "clip_sha256": _weights(_clip_weights(protocol.clip)),
        "clip_score": _clip_words(protocol.clip),
        **({"rewards_sha256": _rewards(protocol)} if protocol.rewards else {}),
        "images": protocol.images,
        "seed": protocol.seed,
        "batch_size": batch_size,
        "noise": "one CPU generator per image from (seed, index)",
        "prompts": str(prompts) if prompts else text[protocol.conditions.source],
        "prompts_sha256": _weights(prompts),
        "uint8": protocol.uint8,
        "versions": io.versions(*LIBRARIES),
    } | ({} if name == "custom" else {"definition": protocol.model_dump(mode="json")})


def protocol(
    *,
    reference: str,
    num_images: int,
    seed: int = 0,
    batch_size: int = 100,
    features: str | None = None,
    clip: str | None = None,
    prompts: Path | str | None = None,
) -> dict[str, Any]:
    """`describe_protocol` of the unnamed protocol; arguments as for `evaluate`."""
    sources = resolve(reference, features, clip, prompts)
    return describe_protocol(protocol_of(sources, num_images=num_images, seed=seed), batch_size=batch_size)


def write_report(path: Path | str, protocol: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """Writes {"protocol", "results"} as JSON, aside first: the file is whole or absent."""
    io.write_json({"protocol": protocol, "results": results}, Path(path))


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _guidance(row: dict[str, Any]) -> str:
    if row["guidance_scale"] is None:
        return "-" if row["steps"] is None else "default"  # a folder of images was not drawn here
    return f"{row['guidance_scale']:g}"


COLUMNS = {
    "fid": ("FID", 2),
    "kid": ("KID", 4),
    "precision": ("precision", 3),
    "recall": ("recall", 3),
    "density": ("density", 3),
    "coverage": ("coverage", 3),
    "inception_score": ("IS", 2),
    "cmmd": ("CMMD", 3),
    "diversity": ("diversity", 3),
    "clip_score": ("CLIP score", 2),
    "pickscore": ("PickScore", 2),
    "aesthetic": ("aesthetic", 2),
    "hpsv2": ("HPSv2", 4),
    "hpsv2.1": ("HPSv2.1", 4),
    "image_reward": ("ImageReward", 3),
    "mps": ("MPS", 3),
    "peak_memory_gib": ("GiB", 2),
    "seconds_per_image": ("s / image", 4),
}
"""Heading and digits of every figure that the table shows."""


def score_columns(results: list[dict[str, Any]]) -> list[tuple[str, str, int]]:
    """(key, heading, digits) of the columns that the rows have; fid_patch is headed FID patch, an own reward with its name."""
    every = list(dict.fromkeys(key for row in results for key in row))
    own = [(key, key, 4) for key in every if is_own_reward(key)]
    keys = [key for key in every if not is_own_reward(key)]
    found = []
    for base, (heading, digits) in COLUMNS.items():
        for key in keys:
            if key == base or (key.startswith(f"{base}_") and not key.startswith("inception_score_std")):
                found.append((key, heading + key[len(base) :].replace("_", " "), digits))
    return found + own


def format_table(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table, one row each."""
    figures = score_columns(results)
    head = ("model", "steps", "guidance", "evaluations", *(heading for _, heading, _ in figures))
    rows = [
        (
            str(r["model"]),
            "-" if r["steps"] is None else str(r["steps"]),
            _guidance(r),
            "-" if r["network_evaluations"] is None else f"{r['network_evaluations']:g}",
            *(_cell(r.get(key), digits) for key, _, digits in figures),
        )
        for r in results
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        for row in [head, *rows]
    ]
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def grid(rows: Sequence[Tensor], labels: Sequence[str] | None = None, *, min_size: int = 64) -> Image.Image:
    """One picture of uint8 images, each row [N, 3, H, W] behind its label; small images are enlarged to `min_size`."""
    labels = [""] * len(rows) if labels is None else labels
    if not rows or len(rows) != len(labels):
        raise ValueError(f"{len(rows)} rows of images but {len(labels)} labels")
    height, width = rows[0].shape[-2:]
    zoom = max(1, min_size // height)
    cell_w, cell_h, gap = width * zoom, height * zoom, 2
    font = ImageFont.load_default(size=14)
    margin = max(int(font.getlength(label)) for label in labels)
    margin += 12 if margin else 0
    columns = max(len(row) for row in rows)
    size = (margin + columns * (cell_w + gap) - gap, len(rows) * (cell_h + gap) - gap)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for y, (row, label) in enumerate(zip(rows, labels, strict=True)):
        top = y * (cell_h + gap)
        draw.text((6, top + cell_h // 2), label, fill="black", font=font, anchor="lm")
        for x, image in enumerate(row.cpu().to(torch.uint8)):
            tile = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
            tile = tile.resize((cell_w, cell_h), Image.Resampling.NEAREST)
            picture.paste(tile, (margin + x * (cell_w + gap), top))
    return picture
