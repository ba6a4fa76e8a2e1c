"""Strict settings of a run, checked before torch is loaded."""

from fewstep.config.schema import (
    DataConfig,
    EvaluateConfig,
    LoraConfig,
    OptimConfig,
    ReferenceConfig,
    RunConfig,
    ScoreConfig,
    Strict,
    dump_config,
    load_config,
)

__all__ = [
    "DataConfig",
    "EvaluateConfig",
    "LoraConfig",
    "OptimConfig",
    "ReferenceConfig",
    "RunConfig",
    "ScoreConfig",
    "Strict",
    "dump_config",
    "load_config",
]
