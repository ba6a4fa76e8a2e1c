"""What was compared and how it came out: the protocol, the report's file, its table and its picture."""

import hashlib
import json
import os
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import fewstep
from fewstep.assets import ASSETS, asset_path
from fewstep.evaluate.clip_score import clip_folder
from fewstep.evaluate.features import features_folder
from fewstep.evaluate.frechet import load_moments
from fewstep.evaluate.reference import resolve

LIBRARIES = ("torch", "diffusers", "transformers", "torchmetrics")


def recommended_guidance_scale(teacher: str) -> float | None:
    """The guidance scale that an asset recommends for its teacher; None for any other pipeline."""
    if teacher not in ASSETS:
        return None
    scale: float = json.loads((asset_path(teacher) / "asset.json").read_text())["guidance_scale"]
    return scale


def _weights(folder: Path) -> str | None:
    file = folder / "model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else None


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
    """What must be equal before two FIDs or CLIP scores may be compared; arguments as for `evaluate`."""
    sources = resolve(reference, features, clip, prompts)
    path = asset_path(reference) / "reference.safetensors" if reference in ASSETS else Path(reference)
    file = sources.prompts
    text = f"{reference}: first caption, class = index % 10" if reference in ASSETS else None
    return {
        "reference": reference,
        "reference_images": load_moments(path).count if path.is_file() else "all images of the folder",
        "features": sources.features,
        "features_sha256": _weights(features_folder(sources.features)),
        "covariance": "float64, divided by n - 1",
        "clip": sources.clip,
        "clip_sha256": None if sources.clip is None else _weights(clip_folder(sources.clip)),
        "clip_score": "mean of 100 * max(cosine, 0)",
        "images": num_images,
        "seed": seed,
        "batch_size": batch_size,
        "noise": "one CPU generator per image from (seed, index)",
        "prompts": text if file is None else str(file),
        "prompts_sha256": None if file is None else hashlib.sha256(file.read_bytes()).hexdigest(),
        "uint8": "round",
        "versions": {"fewstep": fewstep.__version__, **{name: metadata.version(name) for name in LIBRARIES}},
    }


def write_report(path: Path | str, protocol: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """Writes {"protocol", "results"} as JSON, aside first: the file is whole or absent."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps({"protocol": protocol, "results": results}, indent=2) + "\n")
    aside.replace(path)


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def format_table(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table, one row each."""
    head = ("model", "steps", "guidance", "evaluations", "FID", "CLIP score", "s / image")
    rows = [
        (
            str(r["model"]),
            str(r["steps"]),
            "default" if r["guidance_scale"] is None else f"{r['guidance_scale']:g}",
            f"{r['network_evaluations']:g}",
            _cell(r["fid"], 2),
            _cell(r["clip_score"], 2),
            _cell(r["seconds_per_image"], 4),
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
