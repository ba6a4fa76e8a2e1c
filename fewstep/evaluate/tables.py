"""Rows of scores as a Markdown table."""

from collections.abc import Sequence

from fewstep import io
from fewstep.evaluate.protocol import is_own_reward
from fewstep.evaluate.report import Row


def _guidance(row: Row) -> str:
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


def score_columns(results: Sequence[Row]) -> list[tuple[str, str, int]]:
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


def format_table(results: Sequence[Row]) -> str:
    """The results as a Markdown table, one row each."""
    figures = score_columns(results)
    head = ("model", "steps", "guidance", "evaluations", *(heading for _, heading, _ in figures))
    rows = [
        (
            str(r["model"]),
            "-" if r["steps"] is None else str(r["steps"]),
            _guidance(r),
            "-" if r["network_evaluations"] is None else f"{r['network_evaluations']:g}",
            *(io.cell(None if r.get(key) is None else float(r[key]), digits) for key, _, digits in figures),
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
