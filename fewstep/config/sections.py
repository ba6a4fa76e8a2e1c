"""The sections of a run's settings; attribute docstrings are the help text."""

from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Lt, MinLen
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from fewstep.config.strict import Strict

Decay = Annotated[float, Ge(0), Lt(1)]
Counts = Annotated[tuple[PositiveInt, ...], MinLen(1)]


class ExpectedConfig(Strict):
    """Scores that a recipe reaches, measured or as its source reports them."""

    steps: PositiveInt
    """Network evaluations per sample."""
    fid: PositiveFloat
    """FID at that number of steps."""
    images: PositiveInt
    """Samples behind that FID."""
    reference: str = "fashion"
    """Images that FID compares with; FIDs against different references cannot be compared."""


class RecipeConfig(Strict):
    """Provenance and expected scores of a recipe; a run with other settings keeps them for comparison."""

    status: Literal["measured", "untested"]
    """Whether the recipe was run to its end with this code and scored."""
    source: str
    """Source of the settings."""
    expected: ExpectedConfig | None = None
    """Scores to expect: measured, or, of an untested recipe, as its source reports them; null = none known."""

    @model_validator(mode="after")
    def _measured(self) -> "RecipeConfig":
        if self.status == "measured" and self.expected is None:
            raise ValueError(
                "expected: found null with status measured; expected what was measured. Give steps, fid and images"
            )
        return self


class MethodConfig(Strict):
    """The base of every method's settings."""

    name: str = ""
    """The method: a registered name, or one of your own as path/to/file.py:Class or package.module:Class."""

    @property
    def negative_prompts(self) -> tuple[str, ...]:
        """Prompts that training encodes beside those of the data; "" is the null condition."""
        return ("",)


class OptimConfig(Strict):
    lr: PositiveFloat
    """Peak learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decays of the first and second moment."""
    eps: PositiveFloat = 1e-8
    """Term beside the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Gradients are scaled down to this L2 norm; null = no clipping."""
    warmup_iterations: NonNegativeInt = 0
    """Iterations over which the learning rate rises linearly from zero."""
    optimizer: Literal["adamw", "adamw8bit", "radam"] = "adamw"
    """AdamW of torch; or of bitsandbytes, with moments in eight bits; or RAdam, which warms up by itself (Liu et al. 2020)."""
    decay: Literal["constant", "cosine"] = "constant"
    """Course of the learning rate after the warm-up; cosine falls to zero at the last iteration."""


class FullConfig(Strict):
    """The student is a whole network of its own."""

    kind: Literal["full"] = "full"
    """A whole network."""


class LoraConfig(Strict):
    """The student, and every other learnt network, is adapters on the teacher's weights."""

    kind: Literal["lora"] = "lora"
    """Adapters (LoRA) on the teacher's weights."""
    rank: PositiveInt = 64
    """Rank of each adapter's update of a weight."""
    alpha: PositiveFloat | None = None
    """The update counts alpha / rank; null = alpha is the rank, so that it counts 1."""
    targets: Annotated[tuple[str, ...], MinLen(1)] | None = None
    """Ends of the names of the modules that get adapters, such as to_q; null = the family's: attention, feed-forward, ..."""
    dropout: Decay = 0.0
    """Share of an adapter's inputs that is dropped in training."""
    base_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of the teacher's weights, which all networks share; other than fp32 it must equal train.mixed_precision."""


class DataConfig(Strict):
    source: Literal["fashion", "folder", "parquet", "prompts", "labels", "memory", "none"]
    """Fashion-MNIST with captions; a folder of images; parquet files; a text file of prompts; bare labels; samples that are
    passed to `fewstep.distill`; nothing."""
    path: Path | None = None
    """Folder, parquet file or folder of them, owner/name[:split] of either in the hub's cache, or text file with one prompt per
    line; null = the source has none."""
    num_labels: PositiveInt | None = None
    """Number of classes: conditions are labels 0 ... num_labels - 1; null = captions where there are any."""
    cache_latents: bool = False
    """Encode every image once, before training, and keep the latents in memory."""
    on_error: Literal["fail", "skip"] = "fail"
    """Handling of images that cannot be opened or are cut short, which are searched for before training (in parquet files larger
    than memory should hold, with skip only): the run does not begin, or they are left out with a warning."""
    cache: Path | None = None
    """Folder into which `fewstep cache` has put latents and encoded prompts: training reads them, and opens no image and
    runs no text encoder; null = none."""
    limit: PositiveInt | None = None
    """Use this many samples only, drawn once and always the same; null = all."""

    @model_validator(mode="after")
    def _complete(self) -> "DataConfig":
        has_path = self.source in ("folder", "parquet", "prompts")
        if has_path and self.path is None:
            raise ValueError(f"path: found null with source {self.source}; expected a file or folder. Set data.path")
        if not has_path and self.path is not None:
            raise ValueError(
                f"path: found {str(self.path)!r} with source {self.source}, which reads none; expected null. Leave path out"
            )
        if self.source == "labels" and self.num_labels is None:
            raise ValueError(
                "num_labels: found null with source labels; expected the number of classes. Set data.num_labels"
            )
        if self.source in ("prompts", "none") and self.num_labels is not None:
            raise ValueError(
                f"num_labels: found {self.num_labels} with source {self.source}, which has no labels; expected null"
            )
        if self.cache_latents and self.source in ("prompts", "labels", "none"):
            raise ValueError(
                f"cache_latents: found true with source {self.source}, which has no images; expected false"
            )
        return self


class ReferenceConfig(Strict):
    reference: str = "fashion"
    """Reference statistics of FID: an asset's name, a file of statistics, a folder of images, or owner/name[:split] of a data
    set in the hub's cache."""
    features: str | None = None
    """Features in which the reference was made, as of `fewstep evaluate --features`; null = an asset's own."""
    clip: str | None = None
    """CLIPModel of the CLIP score: an asset's name or a folder; `none` = none; null = an asset's own, otherwise none."""
    prompts: Path | None = None
    """Prompts, one a line; null = the captions of an asset's reference."""


class ScoreConfig(ReferenceConfig):
    every: NonNegativeInt = 0
    """Iterations between two scores of the student during training; 0 = off."""
    steps: PositiveInt = 4
    """Network evaluations per sample."""
    num_images: Annotated[int, Ge(2)] = 500
    """Samples per score."""
    patience: PositiveInt | None = None
    """Scores in a row without a better FID after which training ends, in the last stage of a method with stages; its best
    weights are exported. null = training goes on to max_iterations."""

    @model_validator(mode="after")
    def _patient(self) -> "ScoreConfig":
        if self.patience is not None and not self.every:
            raise ValueError(f"patience: found {self.patience} with every 0; expected null, or scores. Set every")
        return self


class EvaluateConfig(ReferenceConfig):
    steps: Counts = (1, 2, 4, 8)
    """Network evaluations per sample at which the student is measured."""
    teacher_steps: Counts = (1, 2, 4, 8, 50)
    """Network evaluations per sample at which the teacher is measured."""
    num_images: Annotated[int, Ge(2)] = 2000
    """Samples per measurement."""
    batch_size: PositiveInt = 100
    """Samples drawn at a time."""
    teacher_from: str | None = None
    """Report (evaluation.json) from which the teacher's scores are taken where it has them for the same teacher, protocol and
    guidance, time and memory only being measured; an asset's name = the report of its teacher; null = none."""
    teacher_guidance_scale: NonNegativeFloat | None = None
    """Guidance of the teacher's samples, 1 = none; null = the teacher's recommended scale."""


class TrainConfig(Strict):
    accumulate: PositiveInt = 1
    """Micro-batches per iteration."""
    student: Annotated[FullConfig | LoraConfig, Field(discriminator="kind")] = FullConfig()
    """Trained weights: {kind: full} = a whole network, or {kind: lora, ...} = adapters on the teacher's weights."""
    ema_decay: Decay = 0.999
    """Decay of the student's weight average, which is exported; 0 = the last weights."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Type of the networks' arithmetic; auto = bf16 where the device has it, otherwise no."""
    init_from: Path | None = None
    """Checkpoint whose weights the learnt networks start from, or an exported pipeline, for the student; null = none."""
    max_nonfinite: NonNegativeInt = 10
    """The run ends when more iterations than this had a loss or gradient that is not finite."""
    compile: bool = False
    """Compile the networks (torch.compile); the first iterations then take minutes. torch 2.14 fails at a DiT with
    gradient_checkpointing."""
    cpu_threads: PositiveInt | None = None
    """Threads of each process on a machine without a GPU; null = the machine's cores, shared among its processes."""

    @property
    def lora(self) -> LoraConfig | None:
        """Settings of the adapters; None for a whole network."""
        return self.student if isinstance(self.student, LoraConfig) else None

    @property
    def base_dtype(self) -> Literal["fp32", "bf16", "fp16"]:
        """Type of the teacher's weights."""
        return self.student.base_dtype if isinstance(self.student, LoraConfig) else "fp32"

    @model_validator(mode="after")
    def _fits(self) -> "TrainConfig":
        dtype = self.base_dtype
        if dtype not in ("fp32", self.mixed_precision):
            raise ValueError(
                f"student.base_dtype: found {dtype}; expected fp32 or mixed_precision, which is "
                f"{self.mixed_precision}. Set train.mixed_precision={dtype}"
            )
        return self


class MemoryConfig(Strict):
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, about a third more time."""
    offload: bool = False
    """Keep text encoders and VAE on the CPU and move them to the GPU only while they are called: slower. No effect without a
    GPU."""
    offload_teacher: bool = False
    """Keep the weights of the teacher's network on the CPU and move one layer at a time to the GPU in every call: slower. Not
    with adapters, whose base they are. No effect without a GPU."""


class LogConfig(Strict):
    every: PositiveInt = 10
    """Iterations between two log lines."""
    samples_every: NonNegativeInt = 0
    """Iterations between two sample grids; 0 = off."""
    tracker: str | None = None
    """Experiment tracker known to accelerate, such as tensorboard or wandb; null = log.jsonl only."""


class CheckpointConfig(Strict):
    every: PositiveInt = 500
    """Iterations between two checkpoints."""
    keep: PositiveInt = 2
    """Checkpoints that are kept, newest first."""
    resume: str | None = None
    """Checkpoint folder to go on from, or latest = the newest one in output_dir; null = start from the beginning."""


class ExportConfig(Strict):
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Type of the exported weights."""
