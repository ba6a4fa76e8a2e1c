"""Stage 5: FID's reference statistics, and the real images that come with the package."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from fewstep.data.fashion import CLASSES, caption
from fewstep.evaluate.statistics import moments, save_moments
from fewstep.io import atomic
from fewstep.pretrain.classifier import features_and_logits, load_classifier
from fewstep.pretrain.config import TeacherTraining
from fewstep.pretrain.data import Data

IMAGES_PER_CLASS = 200


def write_reference(config: TeacherTraining, data: Data, folder: Path) -> None:
    features, _ = features_and_logits(load_classifier(folder), data.train_images)
    metadata = {
        "features": "classifier: ResNetForImageClassification pooled output",
        "resolution": "32",
        "dataset": f"{config.dataset}, training split",
    }
    save_moments(moments(features), folder / "reference.safetensors", metadata)


def write_images(config: TeacherTraining, data: Data, folder: Path) -> None:
    """The first images of every class of the training split, without their padding."""
    rows = []
    for label in range(len(CLASSES)):
        for i in (data.train_labels == label).nonzero()[:IMAGES_PER_CLASS, 0].tolist():
            png = io.BytesIO()
            Image.fromarray(data.train_images[i, 0, 2:-2, 2:-2].numpy()).save(png, "PNG", optimize=True)
            image = {"bytes": png.getvalue(), "path": f"train_{i:05d}.png"}
            rows.append({"image": image, "label": np.int64(label), "text": caption(label)})
    schema = pa.schema(
        {
            "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
            "label": pa.int64(),
            "text": pa.string(),
        }
    )
    with atomic(folder / "images.parquet") as part:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), part, compression="zstd")
