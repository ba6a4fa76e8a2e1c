"""BOOT, data-free: accelerate launch train/boot.py --config configs/boot_fashion.yaml"""

from fewstep.config import RunConfig, load_config
from fewstep.methods.boot.config import BootConfig

if __name__ == "__main__":
    config = load_config(RunConfig[BootConfig])
    # Only now, for it loads torch: a mistake in the config is told at once.
    from fewstep.methods.boot.method import Boot
    from fewstep.training.run import run

    run(Boot, config)
