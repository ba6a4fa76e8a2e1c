"""Strict settings of a run, checked before torch is loaded.

* `strict`: the base class of all settings.
* `sections`: the sections that a run's settings consist of; `schema`: `RunConfig`, which has them all.
* `load`: a YAML file and dotted overrides into checked settings, and back.
* `problems`: what is wrong with a config, by the key that the user wrote; `help`: types, defaults and values in words.
* `recipes`: the recipes that come with the package.
* `yaml12`: YAML 1.2's scalars, without duplicate keys.

Any package may import it; it imports neither torch nor any package but `errors`. A method's own settings are in `methods`.
"""

from fewstep.config.load import check, dump_config, load_config, merged, read
from fewstep.config.problems import ConfigError
from fewstep.config.schema import RunConfig
from fewstep.config.sections import (
    CheckpointConfig,
    DataConfig,
    EvaluateConfig,
    ExportConfig,
    FullConfig,
    LogConfig,
    LoraConfig,
    MemoryConfig,
    MethodConfig,
    OptimConfig,
    RecipeConfig,
    ReferenceConfig,
    ScoreConfig,
    TrainConfig,
)
from fewstep.config.strict import Strict

__all__ = [
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FullConfig",
    "LogConfig",
    "LoraConfig",
    "MemoryConfig",
    "MethodConfig",
    "OptimConfig",
    "RecipeConfig",
    "ReferenceConfig",
    "RunConfig",
    "ScoreConfig",
    "Strict",
    "TrainConfig",
    "check",
    "dump_config",
    "load_config",
    "merged",
    "read",
]
