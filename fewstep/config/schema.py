"""The settings of a run: what every method shares, in sections, and the method's own."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

from pydantic import NonNegativeInt, PositiveInt, model_validator

from fewstep.config.sections import (
    CheckpointConfig,
    DataConfig,
    EvaluateConfig,
    ExportConfig,
    LogConfig,
    MemoryConfig,
    MethodConfig,
    RecipeConfig,
    ScoreConfig,
    TrainConfig,
)
from fewstep.config.strict import Strict

M = TypeVar("M", bound=MethodConfig, covariant=True)


class RunConfig(Strict, Generic[M]):
    moved: ClassVar[Mapping[str, str]] = {
        "keep_checkpoints": "checkpoint.keep",
        "lora": "train.student",
        "validate_every": "log.samples_every",
    }
    """Keys of version 0.1 that no key of today ends with -> their place."""

    recipe: RecipeConfig | None = None
    """Provenance and expected scores of these settings; null = unknown."""
    teacher: str
    """Pipeline to distill: an asset's name, a folder, or a hub id."""
    method: M
    """Settings of the method, which its key `name` names."""
    data: DataConfig
    """Images and conditions to train on."""
    output_dir: Path
    """Folder of the run: config, log, checkpoints, samples, exported pipeline."""
    seed: NonNegativeInt = 0
    """Seed of weights, data order and noise."""
    max_iterations: PositiveInt
    """Iterations of the whole run."""
    batch_size: PositiveInt
    """Samples per process and micro-batch."""
    train: TrainConfig = TrainConfig()
    """Updates of the student."""
    memory: MemoryConfig = MemoryConfig()
    """Settings that save memory and cost time."""
    log: LogConfig = LogConfig()
    """Log lines, sample grids, tracker."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints, and which one to resume from."""
    score: ScoreConfig = ScoreConfig()
    """FID during training."""
    evaluate: EvaluateConfig | None = None
    """Measurement of student and teacher after training; null = none."""
    export: ExportConfig = ExportConfig()
    """The exported pipeline."""

    @model_validator(mode="after")
    def _adapters(self) -> "RunConfig[M]":
        if self.train.lora is not None and self.memory.offload_teacher:
            raise ValueError(
                "memory.offload_teacher: found true; expected false with train.student.kind lora, where the teacher's "
                "network is also the student's. Set memory.offload_teacher=false or train.student.kind=full"
            )
        return self
