"""Fashion-MNIST as captioned 32x32 images: the data behind the embedded teacher `fashion`."""

import gzip
import io
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fewstep.assets import asset_path
from fewstep.data.base import Condition, Raw, Source
from fewstep.data.images import scaled, square
from fewstep.errors import FewstepError, MissingError

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
            raise MissingError(
                str(file), "no such file", "a file of Fashion-MNIST", "Install Debian's package dataset-fashion-mnist"
            )
    # An idx header is the magic number and one big-endian uint32 per dimension.
    images = np.frombuffer(gzip.decompress(images_file.read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress(labels_file.read_bytes()), np.uint8, offset=8)
    return pad(images.reshape(len(labels), 28, 28)), labels.astype(np.int64)


def load_embedded() -> tuple[Images, Labels]:
    """The 2,000 training images in the package, 200 per class, in the same layout as `load_idx`."""
    import pyarrow.parquet as pq

    table = pq.read_table(asset_path("fashion") / "images.parquet")
    decoded = [np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in table["image"].to_pylist()]
    return pad(np.stack(decoded)), table["label"].to_numpy().astype(np.int64)


def load_train_labels() -> Labels:
    """The labels [N] of the training images, Debian's where they are installed, otherwise the embedded ones; opens no image."""
    import pyarrow.parquet as pq

    file = DEBIAN_FOLDER / "train-labels-idx1-ubyte.gz"
    if DEBIAN_FOLDER.exists():
        return np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8, offset=8).astype(np.int64)
    return (
        pq.read_table(asset_path("fashion") / "images.parquet", columns=["label"])["label"].to_numpy().astype(np.int64)
    )


class Fashion(Source):
    """Fashion-MNIST: the 60,000 training images where Debian's package is installed, otherwise the 2,000 embedded ones.

    The caption's template is a function of the index. num_labels turns captions into labels.
    """

    has_images = True

    def __init__(self, image_size: int, num_labels: int | None = None) -> None:
        self.labels = load_train_labels()
        self.image_size, self.num_labels = image_size, num_labels
        self.conditions = "prompt" if num_labels is None else "label"
        if num_labels is not None and num_labels != len(CLASSES):
            raise FewstepError("data.num_labels", num_labels, f"{len(CLASSES)}, the classes of source 'fashion'")

    def __len__(self) -> int:
        return len(self.labels)

    def get(self, indices: Sequence[int]) -> Raw:
        indices = list(indices)
        pixels = self.images[indices]
        if pixels.shape[-1] != self.image_size:
            pixels = np.stack([square(Image.fromarray(x.transpose(1, 2, 0)), self.image_size) for x in pixels])
        return Raw(scaled(pixels), self.conditions_at(indices), indices)

    @cached_property
    def images(self) -> NDArray[np.uint8]:
        """uint8 [N, 3, 32, 32]; a run that needs conditions only never loads them."""
        whole = DEBIAN_FOLDER.exists()
        return (load_idx("train") if whole else load_embedded())[0]

    def conditions_at(self, indices: Sequence[int]) -> list[Condition]:
        indices = list(indices)
        return [self._condition(i, c) for i, c in zip(indices, self.labels[indices].tolist(), strict=True)]

    def image_key(self, index: int) -> str:
        return f"fashion {index} of {len(self)}"

    def _condition(self, index: int, label: int) -> str | int:
        return label if self.num_labels is not None else caption(label, index % len(TEMPLATES))
