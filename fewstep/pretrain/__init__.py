"""Pretraining: the small teachers of the package, in minutes to hours, and what scores them.

    config      settings by `kind`: sd (the embedded teacher `fashion`), ddpm (digits), dit, sd3
    loop        the optimizer loop of all stages, resumed from a checkpoint
    run         the stages of `fashion`: classifier, clip, autoencoder, reference, images, denoiser, measure
    digits, transformer, dit, sd3     the other pipelines
    publish     a finished run as an asset of the package

`python train/teacher.py --config configs/teachers/fashion.yaml` runs all stages in order; a stage whose output exists is
skipped. Imports evaluation, data and training's checkpoints; only the command line imports this package.
"""

from fewstep.pretrain.config import KINDS, load_training, training_class

__all__ = ["KINDS", "load_training", "training_class"]
