"""Consistency distillation: accelerate launch train/consistency.py --config configs/consistency_fashion.yaml"""

from fewstep.config import RunConfig, load_config
from fewstep.methods.consistency.config import ConsistencyConfig

if __name__ == "__main__":
    config = load_config(RunConfig[ConsistencyConfig])
    # Only now, for it loads torch: a mistake in the config is told at once.
    from fewstep.methods.consistency.method import Consistency
    from fewstep.training.run import run

    run(Consistency, config)
