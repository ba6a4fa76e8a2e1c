"""Fashion-MNIST as captioned 32x32 images: the data behind the embedded teacher `fashion`."""

import gzip
import io
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fewstep.assets import asset_path

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]

CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)

TEMPLATES = (
    "a photo of {article} {name}",
    "a picture of {article} {name}",
    "an image of {article} {name}",
    "{article} {name}",
    "a small photo of {article} {name}",
    "a grey photo of {article} {name}",
    "a catalogue photo of {article} {name}",
    "{article} {name} on a black background",
)

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")


def caption(label: int, template_index: int = 0) -> str:
    name = CLASSES[label]
    return TEMPLATES[template_index].format(article="an" if name[0] in "aeiou" else "a", name=name)


def pad(images: Images) -> Images:
    """28x28 grey images, zero-padded to 32x32 with three equal channels."""
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    return np.repeat(padded[:, None], 3, axis=1)


def load_idx(split: Literal["train", "test"], folder: Path = DEBIAN_FOLDER) -> tuple[Images, Labels]:
    """The full data set as uint8 images [N, 3, 32, 32] and labels [N], from Debian's idx files."""
    prefix = {"train": "train", "test": "t10k"}[split]
    images_file = folder / f"{prefix}-images-idx3-ubyte.gz"
    labels_file = folder / f"{prefix}-labels-idx1-ubyte.gz"
    for file in (images_file, labels_file):
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing: install Debian's package dataset-fashion-mnist")
    # An idx header is the magic number and one big-endian uint32 per dimension.
    images = np.frombuffer(gzip.decompress(images_file.read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress(labels_file.read_bytes()), np.uint8, offset=8)
    return pad(images.reshape(len(labels), 28, 28)), labels.astype(np.int64)


def load_embedded() -> tuple[Images, Labels]:
    """The 2,000 training images in the package, 200 per class, in the same layout as `load_idx`."""
    import pyarrow.parquet as pq
    from PIL import Image

    table = pq.read_table(asset_path("fashion") / "images.parquet")
    decoded = [np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in table["image"].to_pylist()]
    return pad(np.stack(decoded)), table["label"].to_numpy().astype(np.int64)


def load_train_labels() -> Labels:
    """The labels [N] of the training images, Debian's where they are installed, else the embedded; opens no image."""
    import pyarrow.parquet as pq

    file = DEBIAN_FOLDER / "train-labels-idx1-ubyte.gz"
    if DEBIAN_FOLDER.exists():
        return np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8, offset=8).astype(np.int64)
    return (
        pq.read_table(asset_path("fashion") / "images.parquet", columns=["label"])["label"].to_numpy().astype(np.int64)
    )
