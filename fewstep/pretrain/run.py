"""All stages of a teacher training, in order."""

from collections.abc import Callable
from pathlib import Path

from fewstep.pretrain.autoencoder import train_autoencoder
from fewstep.pretrain.classifier import train_classifier
from fewstep.pretrain.clip import train_clip
from fewstep.pretrain.config import TeacherTraining
from fewstep.pretrain.data import Data, load_data
from fewstep.pretrain.denoiser import train_denoiser
from fewstep.pretrain.measure import measure
from fewstep.pretrain.reference import write_images, write_reference

Stage = Callable[[TeacherTraining, Data, Path], None]

STAGES: dict[str, Stage] = {
    "classifier": train_classifier,
    "clip": train_clip,
    "autoencoder": train_autoencoder,
    "reference.safetensors": write_reference,
    "images.parquet": write_images,
    "pipeline": train_denoiser,
    "asset.json": measure,
}
"""Each stage under the name of its output."""


def run(config: TeacherTraining) -> None:
    folder = config.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    data = load_data(config.limit_images)
    for output, stage in STAGES.items():
        if (folder / output).exists():
            print(f"{output}: already there")
        else:
            stage(config, data, folder)
