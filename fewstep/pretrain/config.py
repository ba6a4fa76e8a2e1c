"""The configs of teacher trainings: a union by `kind`, the pipeline that is trained, with a section for each stage."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import PositiveFloat, PositiveInt

from fewstep.config import RecipeConfig, Strict, check, read
from fewstep.errors import FewstepError


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
    """Prediction type of the UNet."""
    empty_prompts: float = 0.1
    """Share of captions replaced by the empty prompt, for classifier-free guidance."""
    ema_decay: float = 0.999
    """Decay of the weight average that is saved."""
    channels: tuple[int, ...] = (64, 64)
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


class _Training(Strict):
    recipe: RecipeConfig | None = None
    """Provenance and expected scores of these settings; null = unknown."""


class TeacherTraining(_Training):
    kind: Literal["sd"] = "sd"
    """A StableDiffusionPipeline with all its parts, on captions."""
    dataset: Literal["fashion"] = "fashion"
    """Images to train on."""
    output_dir: Path = Path("runs/teachers/fashion")
    """Folder of the stages' outputs and checkpoints; the same command continues from them."""
    seed: int = 0
    """Seed of every stage."""
    limit_images: int | None = None
    """Use this many training and test images only; null for all."""
    checkpoint_seconds: float = 60.0
    """Time between two checkpoints within a stage."""
    classifier: StageConfig
    """Feature network of FID."""
    clip: StageConfig
    """Text encoder of the pipeline and scorer of the CLIP score."""
    autoencoder: AutoencoderConfig
    """VAE of the pipeline."""
    denoiser: DenoiserConfig
    """UNet of the pipeline."""
    measure: MeasureConfig = MeasureConfig()
    """Figures of the data card."""


class DigitsTraining(_Training):
    kind: Literal["ddpm"] = "ddpm"
    """A DDPMPipeline on pixels, unconditional."""
    dataset: Literal["digits"] = "digits"
    """Images to train on: scikit-learn's digits."""
    output_dir: Path = Path("runs/teachers/digits")
    """Folder of the pipeline and of the images; the same command continues from them."""
    seed: int = 0
    """Seed of weights and noise."""
    checkpoint_seconds: float = 60.0
    """Time between two checkpoints."""
    image_size: Literal[16, 32] = 16
    """Side in pixels to which the 8x8 images are resized."""
    channels: tuple[int, ...] = (32, 64)
    """Width of each UNet level."""
    prediction_type: Literal["v_prediction", "epsilon"] = "v_prediction"
    """Prediction type of the UNet."""
    ema_decay: float = 0.995
    """Decay of the weight average that is saved."""
    denoiser: StageConfig
    """Training of the UNet."""


class TransformerTraining(_Training):
    """A transformer on the latents of the embedded teacher `fashion`, with its VAE, text encoder and scorers."""

    output_dir: Path
    """Folder of the pipeline, its figures and its checkpoints; the same command continues from them."""
    seed: int = 0
    """Seed of weights and noise."""
    limit_images: int | None = None
    """Use this many training images only; null for all."""
    checkpoint_seconds: float = 60.0
    """Time between two checkpoints."""
    layers: PositiveInt
    """Blocks of the transformer."""
    heads: PositiveInt
    """Attention heads of each block."""
    head_width: PositiveInt
    """Width of each head; times `heads` it is the transformer's."""
    patch_size: Literal[1, 2, 4]
    """Side of the square of latent pixels that makes one token, of 8x8."""
    no_condition: float = 0.1
    """Share of labels or captions left out, for classifier-free guidance."""
    ema_decay: float = 0.999
    """Decay of the weight average that is saved."""
    compile: bool = False
    """Compile the transformer for the training (torch.compile with CUDA graphs): a minute's start, then faster on a GPU."""
    denoiser: StageConfig
    """Training of the transformer."""
    measure: MeasureConfig = MeasureConfig()
    """Figures of the pipeline's samples."""


class DiTTraining(TransformerTraining):
    kind: Literal["dit"] = "dit"
    """A DiTPipeline on class labels."""
    output_dir: Path = Path("runs/teachers/fashion_dit")
    """Folder of the pipeline, its figures and its checkpoints; the same command continues from them."""
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    """Prediction type of the transformer."""


class SD3Training(TransformerTraining):
    kind: Literal["sd3"] = "sd3"
    """A StableDiffusion3Pipeline, a rectified flow, on captions."""
    output_dir: Path = Path("runs/teachers/fashion_flow")
    """Folder of the pipeline, its figures and its checkpoints; the same command continues from them."""
    shift: PositiveFloat = 1.0
    """Shift of the timesteps at which the pipeline samples; 1 = none."""


Training = TeacherTraining | DigitsTraining | DiTTraining | SD3Training

KINDS: Mapping[str, type[Training]] = {
    "sd": TeacherTraining,
    "ddpm": DigitsTraining,
    "dit": DiTTraining,
    "sd3": SD3Training,
}
"""The settings of each kind of pipeline, by the key `kind` of a config."""


def is_training(raw: Mapping[str, object]) -> bool:
    """Whether a config trains a teacher, not a student."""
    return "method" not in raw and "kind" in raw


def training_class(raw: Mapping[str, object]) -> type[Training]:
    """The settings class of a teacher's config. Raises FewstepError where its `kind` is missing or unknown."""
    kind = raw.get("kind")
    if kind not in KINDS:
        found = "nothing" if "kind" not in raw else repr(kind)
        raise FewstepError("kind", found, f"one of {', '.join(KINDS)}")
    return KINDS[str(kind)]


def load_training(file: str | Path, overrides: Sequence[str] = ()) -> Training:
    """The settings of a teacher's training from a file under overrides. Raises FewstepError."""
    raw = read(file, overrides)
    return check(training_class(raw), raw, str(file))
