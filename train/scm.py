"""Continuous-time consistency models: accelerate launch train/scm.py --config configs/scm_fashion.yaml"""

from fewstep.config import RunConfig, load_config
from fewstep.methods.scm.config import ScmConfig

if __name__ == "__main__":
    config = load_config(RunConfig[ScmConfig])
    # Only now, for it loads torch: a mistake in the config is told at once.
    from fewstep.methods.scm.method import Scm
    from fewstep.training.run import run

    run(Scm, config)
