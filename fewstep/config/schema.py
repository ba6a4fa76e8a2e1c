"""Typed run configs: YAML file + dotted overrides, checked before anything heavy is loaded.

Attribute docstrings are the help text. A config that cannot be used ends the program with one sentence per problem.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Self, TypeVar, get_origin

import yaml
from annotated_types import Ge, Lt, MinLen
from pydantic import (
    BaseModel,
    ConfigDict,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fewstep.config import yaml12
from fewstep.config.help import describe, explain, help_lines, options

Decay = Annotated[float, Ge(0), Lt(1)]
Counts = Annotated[tuple[PositiveInt, ...], MinLen(1)]


class Strict(BaseModel):
    """Frozen; no unknown keys; no conversions but those YAML asks for: paths from text, tuples from lists."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    @field_validator("*", mode="before")
    @classmethod
    def _from_yaml(cls, value: Any, info: ValidationInfo) -> Any:
        accepted = list(options(cls.model_fields[str(info.field_name)].annotation))
        if isinstance(value, str) and Path in accepted:
            return Path(value).expanduser()
        if isinstance(value, list) and any(get_origin(o) is tuple for o in accepted):
            return _tuples(value)
        return value


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


class LoraConfig(Strict):
    rank: PositiveInt = 64
    """Rank of each adapter's update of a weight."""
    alpha: PositiveFloat | None = None
    """The update counts alpha / rank; null = alpha is the rank, so that it counts 1."""
    targets: Annotated[tuple[str, ...], MinLen(1)] | None = None
    """Ends of the names of the modules that get adapters, such as to_q; null = the family's: attention, feed-forward, ..."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of an adapter's inputs that is dropped in training."""
    base_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of the teacher's weights, which all networks share; other than fp32 it has to be that of mixed_precision."""


class DataConfig(Strict):
    source: Literal["fashion", "folder", "parquet", "prompts", "labels", "none"]
    """Fashion-MNIST with captions; a folder of images; parquet files; a text file of prompts; bare labels; nothing."""
    path: Path | None = None
    """Folder, parquet file or folder of them, owner/name[:split] of either in the hub's cache, or text file with one prompt per
    line; null = the source has none."""
    num_labels: PositiveInt | None = None
    """Number of classes: conditions are labels 0 ... num_labels - 1; null = captions where there are any."""
    cache_latents: bool = False
    """Encode every image once, before training, and keep the latents in memory."""
    on_error: Literal["fail", "skip"] = "fail"
    """What happens to images that cannot be opened or are cut short, looked for before training (in parquet files larger
    than memory should hold, with skip only): the run does not begin, or they are left out with a warning."""
    cache: Path | None = None
    """Folder into which `fewstep cache` has put latents and encoded prompts: training reads them, and opens no image and
    runs no text encoder; null = none."""
    limit: PositiveInt | None = None
    """Use this many samples only, drawn once and always the same; null = all."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        has_path = self.source in ("folder", "parquet", "prompts")
        if has_path and self.path is None:
            raise ValueError(f"source {self.source!r} needs path, which is null")
        if not has_path and self.path is not None:
            raise ValueError(f"source {self.source!r} takes no path, found {str(self.path)!r}: set path=null")
        if self.source == "labels" and self.num_labels is None:
            raise ValueError("source 'labels' needs num_labels, which is null")
        if self.source in ("prompts", "none") and self.num_labels is not None:
            raise ValueError(
                f"source {self.source!r} has no labels, found num_labels {self.num_labels}: set num_labels=null"
            )
        if self.cache_latents and self.source in ("prompts", "labels", "none"):
            raise ValueError(
                f"cache_latents needs images, and source {self.source!r} has none: set cache_latents=false"
            )
        return self


class ReferenceConfig(Strict):
    reference: str = "fashion"
    """Reference statistics of FID: an asset's name, a file of statistics, a folder of images, or owner/name[:split] of a data
    set in the hub's cache."""
    features: str | None = None
    """Features in which the reference was made, as of `fewstep evaluate --features`; null = an asset's own."""
    clip: str | None = None
    """CLIPModel of the CLIP score: an asset's name or a folder; `none` = none; null = an asset's own, else none."""
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
    def _patient(self) -> Self:
        if self.patience is not None and not self.every:
            raise ValueError(
                f"patience: {self.patience} scores are never taken while every is 0; set every, or patience=null"
            )
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


M = TypeVar("M", bound=Strict)


class RunConfig(Strict, Generic[M]):
    teacher: str
    """Pipeline to distill: an asset's name, a folder, or a hub id."""
    method: M
    """Settings of the method."""
    student: Literal["full", "lora"] = "full"
    """What learns: whole networks; or adapters on the teacher's own weights, which all networks share."""
    lora: LoraConfig | None = None
    """Settings of student: lora; null = the defaults."""
    data: DataConfig
    """Where images and conditions come from."""
    output_dir: Path
    """Folder of the run: config, log, checkpoints, samples, exported pipeline."""
    seed: NonNegativeInt = 0
    """Seed of weights, data order and noise."""
    max_iterations: PositiveInt
    """Iterations of the whole run."""
    batch_size: PositiveInt
    """Samples per process and micro-batch."""
    accumulate: PositiveInt = 1
    """Micro-batches per iteration."""
    ema_decay: Decay = 0.999
    """Decay of the student's weight average, which is exported; 0 = the last weights."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Type of the networks' arithmetic; auto = bf16 where the device has it, else no."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, about a third more time."""
    offload: bool = False
    """Text encoders and VAE wait in main memory and visit the GPU while they are called, for time; without a GPU, nothing."""
    offload_teacher: bool = False
    """Weights of the teacher's network wait in main memory, and a layer's visit the GPU while it is called, for time: all of
    them in every call. Not under adapters, whose base they are; without a GPU, nothing."""
    compile: bool = False
    """Compile the networks (torch.compile); the first iterations then take minutes. torch 2.14 fails at a DiT with
    gradient_checkpointing."""
    cpu_threads: PositiveInt | None = None
    """Threads of each process on a machine without a GPU; null = the machine's cores, shared among its processes."""
    log_every: PositiveInt = 10
    """Iterations between two log lines."""
    checkpoint_every: PositiveInt = 500
    """Iterations between two checkpoints."""
    keep_checkpoints: PositiveInt = 2
    """Checkpoints that are kept, newest first."""
    resume: str | None = None
    """Checkpoint folder to go on from, or latest = the newest one in output_dir; null = start afresh."""
    init_from: Path | None = None
    """Checkpoint whose weights the learnt networks start from, or an exported pipeline, for the student; null = none."""
    max_nonfinite: NonNegativeInt = 10
    """The run ends when more iterations than this had a loss or gradient that is not finite."""
    tracker: str | None = None
    """Experiment tracker known to accelerate, such as tensorboard or wandb; null = log.jsonl only."""
    validate_every: NonNegativeInt = 0
    """Iterations between two sample grids; 0 = off."""
    score: ScoreConfig = ScoreConfig()
    """FID during training."""
    evaluate: EvaluateConfig | None = None
    """Measurement of student and teacher after training; null = none."""
    export_dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Type of the exported weights."""

    @model_validator(mode="after")
    def _adapters(self) -> Self:
        if self.student == "full" and self.lora is not None:
            raise ValueError(
                "lora: these are settings of adapters, and student is 'full': set student=lora or lora=null"
            )
        if self.student == "lora" and self.offload_teacher:
            raise ValueError(
                "offload_teacher: under adapters the teacher's network is also the student's: set offload_teacher=false or "
                "student=full"
            )
        dtype = self.adapters.base_dtype
        if dtype != "fp32" and dtype != self.mixed_precision:
            raise ValueError(
                f"lora.base_dtype: weights in {dtype} need arithmetic in {dtype}, and mixed_precision is "
                f"{self.mixed_precision!r}: set mixed_precision={dtype}"
            )
        return self

    @property
    def adapters(self) -> LoraConfig:
        """The settings of student: lora."""
        return self.lora or LoraConfig()


C = TypeVar("C", bound=BaseModel)


def load_config(cls: type[C], argv: list[str] | None = None) -> C:
    """The config from `--config FILE [key.path=value ...] [--resume latest]`; `--help` prints every key.

    Raises SystemExit, with one sentence per problem, for whatever is wrong with command line or file.
    """
    path: str | None = None
    overrides: list[str] = []
    rest = iter(sys.argv[1:] if argv is None else argv)
    for word in rest:
        option, equals, value = word.partition("=")
        if word in ("--help", "-h"):
            print(_usage(), *help_lines(cls), sep="\n")
            raise SystemExit(0)
        if option in ("--config", "--resume"):
            value = value if equals else next(rest, "")
            if not value:
                raise SystemExit(f"{option} needs a value: {_usage()}")
            path = value if option == "--config" else path
            overrides += [f"resume={value}"] if option == "--resume" else []
        elif word.startswith("-"):
            hint = f"a key is set without dashes, {word.lstrip('-')}; " if equals else ""
            raise SystemExit(f"unknown option {word!r}: {hint}{_usage()}")
        else:
            overrides.append(word)
    if path is None:
        file = next((word for word in overrides if "=" not in word), None)
        raise SystemExit(f"did you mean --config {file}? {_usage()}" if file else _usage())
    raw = _read(path)
    for item in overrides:
        _override(raw, item)
    try:
        return cls.model_validate(raw)
    except ValidationError as e:
        lines = list(dict.fromkeys(explain(cls, raw, x) for x in e.errors()))
        raise SystemExit("\n".join([f"{path}: {len(lines)} problem{'s' * (len(lines) > 1)}", *lines])) from None


def dump_config(config: BaseModel, versions: Mapping[str, str]) -> str:
    """The config as YAML that loads back to an equal one, under a comment with the versions of libraries."""
    header = "".join(["# versions:\n", *(f"#   {name}: {version}\n" for name, version in versions.items())])
    return header + yaml12.dump(config.model_dump(mode="json"))


def _usage() -> str:
    return f"usage: {sys.argv[0]} --config FILE [key.path=value ...] [--resume latest] [--help]"


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml12.parse(text)
    except yaml.MarkedYAMLError as e:
        line = f", line {e.problem_mark.line + 1}" if e.problem_mark else ""
        raise SystemExit(f"{where}{line}: {e.problem}") from None
    except (yaml.YAMLError, ValueError) as e:
        raise SystemExit(f"{where}: not YAML: {' '.join(str(e).split())}") from None


def _read(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SystemExit(f"config file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as e:
        raise SystemExit(f"config file {path} cannot be read: {e}") from None
    raw = _yaml(text, path)
    if raw is not None and not isinstance(raw, dict):
        raise SystemExit(f"{path}: found {describe(raw)} where a mapping of keys to values is wanted")
    return raw or {}


def _override(raw: dict[str, Any], item: str) -> None:
    key, equals, text = item.partition("=")
    *parents, last = key.split(".")
    if not equals or not all((*parents, last)):
        raise SystemExit(f"override {item!r} is not of the form key.path=value")
    node = raw
    for depth, parent in enumerate(parents, 1):
        if node.get(parent) is None:
            node[parent] = {}
        if not isinstance(node[parent], dict):
            where = ".".join(parents[:depth])
            raise SystemExit(f"override {item!r}: {where} is {describe(node[parent])}, which has no keys")
        node = node[parent]
    node[last] = _yaml(text, f"override {item!r}")


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
