"""Distribution matching with an adversarial loss: accelerate launch train/dmd2.py --config configs/dmd2_fashion.yaml"""

from fewstep.config import RunConfig, load_config
from fewstep.methods.distribution_matching.config import DMD2Config

if __name__ == "__main__":
    config = load_config(RunConfig[DMD2Config])
    # Only now, for it loads torch: a mistake in the config is told at once.
    from fewstep.methods.distribution_matching.dmd2 import DMD2
    from fewstep.training.run import run

    run(DMD2, config)
