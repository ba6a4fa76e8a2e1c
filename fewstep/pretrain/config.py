"""The config of a teacher training: one section per stage."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

from fewstep.config import Strict


class StageConfig(Strict):
    iterations: int
    """Optimizer steps of the whole stage; the learning rate falls to zero along a cosine over them."""
    batch_size: int = 128
    """Images per step."""
    lr: float = 1e-3
    """Peak learning rate of AdamW, reached after the warm-up."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    warmup: float = 0.05
    """Share of the iterations over which the learning rate rises linearly."""


class AutoencoderConfig(StageConfig):
    feature_weight: float = 0.1
    """Weight of the L1 distance between the frozen classifier's features of image and reconstruction."""
    kl_weight: float = 1e-6
    """Weight of the KL term, summed over the latent and averaged over the batch."""


class DenoiserConfig(StageConfig):
    prediction_type: Literal["v_prediction", "epsilon"] = "v_prediction"
    """What the UNet predicts."""
    empty_prompts: float = 0.1
    """Share of captions replaced by the empty prompt, for classifier-free guidance."""
    ema_decay: float = 0.999
    """Decay of the weight average that is saved."""
    channels: tuple[int, ...] = (48, 64)
    """Width of each UNet level."""
    compile: bool = False
    """Compile the UNet for the training (torch.compile with CUDA graphs): a minute's start, then faster on a GPU."""


class MeasureConfig(Strict):
    guidance_scales: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0)
    """Guidance scales that are compared; the one with the lowest FID is recommended."""
    sweep_samples: int = 1000
    """Samples per guidance scale of the comparison."""
    samples: int = 5000
    """Samples of the reported teacher FID, balanced over the classes."""
    steps: int = 50
    """DDIM steps per sample."""
    class_accuracy: float = 0.92
    """Lowest class accuracy of the samples at which a guidance scale can be recommended."""


class TeacherTraining(Strict):
    dataset: Literal["fashion"] = "fashion"
    """Images to train on."""
    output_dir: Path = Path("runs/teacher_fashion")
    """Folder of the stages' outputs and checkpoints; the same command goes on from what lies there."""
    seed: int = 0
    """Seed of every stage."""
    limit_images: int | None = None
    """Use this many training and test images only; null for all."""
    checkpoint_seconds: float = 60.0
    """Time between two checkpoints within a stage."""
    classifier: StageConfig
    """Feature network of FID."""
    clip: StageConfig
    """Text encoder of the pipeline and judge of the CLIP score."""
    autoencoder: AutoencoderConfig
    """VAE of the pipeline."""
    denoiser: DenoiserConfig
    """UNet of the pipeline."""
    measure: MeasureConfig = MeasureConfig()
    """Figures of the data card."""


class DigitsTraining(Strict):
    dataset: Literal["digits"] = "digits"
    """Images to train on: scikit-learn's digits."""
    output_dir: Path = Path("runs/teacher_digits")
    """Folder of the pipeline and of the images; the same command goes on from what lies there."""
    seed: int = 0
    """Seed of weights and noise."""
    checkpoint_seconds: float = 60.0
    """Time between two checkpoints."""
    image_size: Literal[16, 32] = 16
    """Side in pixels to which the 8x8 images are resized."""
    channels: tuple[int, ...] = (32, 64)
    """Width of each UNet level."""
    prediction_type: Literal["v_prediction", "epsilon"] = "v_prediction"
    """What the UNet predicts."""
    ema_decay: float = 0.995
    """Decay of the weight average that is saved."""
    denoiser: StageConfig
    """Training of the UNet."""


def training_class(argv: Sequence[str]) -> type[TeacherTraining] | type[DigitsTraining]:
    """The settings that the file of a command line (`--config FILE`) is to be read as, by its `dataset`.

    Fashion's where it names another or cannot be read: their check then says what is wrong.
    """
    words = [word for argument in argv for word in argument.split("=", 1)]
    for option, value in pairwise(words):
        if option == "--config" and Path(value).is_file():
            lines = Path(value).read_text(encoding="utf-8", errors="replace").splitlines()
            if any(line.split("#")[0].strip() == "dataset: digits" for line in lines):
                return DigitsTraining
    return TeacherTraining
