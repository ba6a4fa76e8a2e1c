"""Parts of distribution matching: the fake score's own loss, pairs of initial noise and sample, the distance of regression."""

from collections.abc import Callable

import torch

from fewstep.diffusion.losses import huber, l2
from fewstep.diffusion.prediction import Prediction, output_of
from fewstep.diffusion.schedule import like
from fewstep.diffusion.shapes import Samples, Scalar, Times
from fewstep.methods.distribution_matching.config import RegressionConfig
from fewstep.methods.perceptual import load_lpips
from fewstep.methods.trajectories import Trajectories
from fewstep.teachers.base import Teacher
from fewstep.teachers.denoiser import Cond


def denoising_loss(teacher: Teacher, p: Prediction, x0: Samples, noise: Samples, t: Times) -> Scalar:
    """Mean square error of a denoiser's own output, whatever the family predicts, as in the teacher's own training.

    Args:
        p: the denoiser's prediction from x0 and noise at t.
    """
    schedule, kind = teacher.schedule, teacher.denoiser.prediction_type
    target = output_of(schedule, kind, Prediction(x0, noise), t)
    root = like(teacher.error_weight(t).sqrt(), target)
    return l2(root * output_of(schedule, kind, p, t), root * target).float()


def regression_distance(config: RegressionConfig | None, teacher: Teacher) -> Callable[[Samples, Samples], Scalar]:
    """The distance of two batches of latents that the settings name, as one number."""
    match config.distance if config else "l2":
        case "lpips":
            lpips = load_lpips("regression.distance", "huber")
            return lambda a, b: lpips(teacher.decode(a), teacher.decode(b)).mean()
        case "huber":
            return huber
    return l2


def pick_pairs(
    pairs: Trajectories | None, teacher: Teacher, size: int, device: torch.device
) -> tuple[Samples, Samples, Cond]:
    """Initial noise, the teacher's samples from it and their conditions, drawn with replacement."""
    if pairs is None:
        raise RuntimeError("pairs: found none; expected those that prepare loads. Call prepare first")
    index, cond = pairs.pick(size, teacher)
    noise, x0 = pairs.x[index].to(device).unbind(1)
    return noise, x0, cond
