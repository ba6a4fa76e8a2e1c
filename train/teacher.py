"""Trains a teacher from scratch: the embedded one (classifier, CLIP, VAE and UNet), a transformer beside it (DiT, SD3), or a
pixel model of digits."""

import sys

from fewstep.config import load_config
from fewstep.pretrain.config import DigitsTraining, DiTTraining, SD3Training, training_class

if __name__ == "__main__":
    config = load_config(training_class(sys.argv[1:]))
    # Only now, for they load torch: a mistake in the config is told at once.
    if isinstance(config, DigitsTraining):
        from fewstep.pretrain import digits

        digits.run(config)
    elif isinstance(config, DiTTraining):
        from fewstep.pretrain import dit

        dit.run(config)
    elif isinstance(config, SD3Training):
        from fewstep.pretrain import sd3

        sd3.run(config)
    else:
        from fewstep.pretrain.run import run

        run(config)
