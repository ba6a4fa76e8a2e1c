"""Rows of images as one picture."""

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fewstep.errors import FewstepError


def grid(rows: Sequence[Tensor], labels: Sequence[str] | None = None, *, min_size: int = 64) -> Image.Image:
    """One picture of uint8 images, each row [N, 3, H, W] behind its label; small images are enlarged to `min_size`."""
    labels = [""] * len(rows) if labels is None else labels
    if not rows or len(rows) != len(labels):
        raise FewstepError("labels", f"{len(labels)} for {len(rows)} rows of images", "as many as rows")
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
