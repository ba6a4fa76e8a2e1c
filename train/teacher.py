"""Trains an embedded teacher from scratch: classifier, CLIP, VAE and UNet."""

from fewstep.config import load_config
from fewstep.pretrain.config import TeacherTraining
from fewstep.pretrain.run import run

if __name__ == "__main__":
    run(load_config(TeacherTraining))
