"""Continuous-time consistency models: accelerate launch train/scm.py --config configs/scm_fashion.yaml"""

from fewstep.config import RunConfig, load_config
from fewstep.methods.scm_config import ScmConfig

if __name__ == "__main__":
    config = load_config(RunConfig[ScmConfig])
    # Only now, for it loads torch: a mistake in the config is told at once.
    from fewstep.job import run
    from fewstep.methods.scm import Scm

    run(Scm, config)
