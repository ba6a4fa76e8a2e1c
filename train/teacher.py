"""Trains an embedded teacher from scratch: classifier, CLIP, VAE and UNet."""

from fewstep.config import load_config
from fewstep.pretrain.config import TeacherTraining

if __name__ == "__main__":
    config = load_config(TeacherTraining)
    # Only now, for it loads torch: a mistake in the config is told at once.
    from fewstep.pretrain.run import run

    run(config)
