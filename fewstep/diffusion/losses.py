"""Distances, distribution matching, adversarial losses. Pure functions of tensors."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F

from fewstep.diffusion.shapes import Logits, Numbers, PerSample, Samples, Scalar, Values
from fewstep.errors import FewstepError

Divergence = Literal["reverse_kl", "forward_kl", "jensen_shannon"]
Adversarial = Literal["softplus", "hinge"]
SampleDistance = Literal["l2", "pseudo_huber", "pseudo_huber_sample"]

LARGEST_LOGIT = 10.0
RATIO_RANGE = (0.1, 20.0)
"""The discriminator's density ratio is cut to this range before it weighs anything."""


def l2(a: Values, b: Values) -> Scalar:
    """Mean squared difference over all elements."""
    return (a - b).square().mean()


def mean_square(d: Samples, c: float = 0.0) -> PerSample:
    """Mean square of each sample's difference d."""
    return d.flatten(1).square().mean(1)


def pseudo_huber(d: Samples, c: float) -> PerSample:
    """Mean over each sample's elements of sqrt(d^2 + c^2) - c: the element-wise form of the public LCM recipes.

    Song & Dhariwal (2023) define it on whole samples; with c = 1e-3 the element-wise form is nearly L1.
    """
    return (d.flatten(1).square().add(c**2).sqrt() - c).mean(1)


def pseudo_huber_sample(d: Samples, c: float) -> PerSample:
    """sqrt(|d|^2 + c^2) - c of each whole sample's difference d (Song & Dhariwal 2023, arXiv 2310.14189, eq. 8).

    With c = 0 it is the norm, as in Easy Consistency Tuning (Geng et al. 2024, arXiv 2406.14548).
    """
    norm = torch.linalg.vector_norm(d.flatten(1), dim=1)  # whose gradient at 0 is 0, not that of a square root
    return norm if c == 0 else (norm.square() + c**2).sqrt() - c


DISTANCES: dict[SampleDistance, Callable[[Samples, float], PerSample]] = {
    "l2": mean_square,
    "pseudo_huber": pseudo_huber,
    "pseudo_huber_sample": pseudo_huber_sample,
}


def sample_distance(kind: SampleDistance, a: Samples, b: Samples, c: float) -> PerSample:
    """One distance for each sample, of which the batch's mean is descended."""
    return DISTANCES[kind](a - b, c)


def huber(a: Values, b: Values) -> Scalar:
    """Mean over elements of d^2 / 2, of |d| - 1 / 2 where |d| > 1 (Huber 1964)."""
    return F.huber_loss(a, b)


# Distribution matching ------------------------------------------------------------------------------------------------


def matching_gradient(x: Samples, real: Samples, fake: Samples) -> Samples:
    """(fake - real) / mean |x - real|, the mean over each sample's elements (Yin et al. 2024, DMD, eq. 7 and 8).

    Args:
        x: the student's samples before noise is added.
        real, fake: the teacher's and the critic's estimates of x0 from the same noised x.

    A sample that meets its teacher exactly has gradient 0, and so has every element whose gradient is not a finite number.
    """
    size = (x - real).abs().mean(dim=list(range(1, x.ndim)), keepdim=True)
    return ((fake - real) / size).nan_to_num(0.0, 0.0, 0.0)


def descend(x: Values, gradient: Values) -> Scalar:
    """A scalar whose gradient in x is `gradient` / numel: half the mean square of x - stop(x - gradient)."""
    return 0.5 * (x - (x - gradient).detach()).square().mean()


def divergence_weights(kind: Divergence, logits: Logits) -> PerSample:
    """Weight of each sample's matching gradient, mean 1 (Xu et al. 2025, f-distill, arXiv 2502.15681).

    It is h(r) = f''(r) r^2 with r = p_data / p_student = exp(logit) of a discriminator whose logits rise
    with realism: 1 for the reverse, r for the forward Kullback-Leibler divergence, r / (1 + r) for Jensen-Shannon.
    """
    ratio = logits.float().mean(1).clamp(-LARGEST_LOGIT, LARGEST_LOGIT).exp().clamp(*RATIO_RANGE)
    match kind:
        case "reverse_kl":
            return torch.ones_like(ratio)
        case "forward_kl":
            weight = ratio
        case "jensen_shannon":
            weight = ratio / (1 + ratio)
        case _:
            raise FewstepError("divergence", repr(kind), "reverse_kl, forward_kl or jensen_shannon")
    return weight / weight.mean()


# Adversarial; logits rise with realism --------------------------------------------------------------------------------


def generator_loss(kind: Adversarial, fake: Numbers) -> Scalar:
    """Generator loss: mean softplus(-fake), the non-saturating loss of Goodfellow et al. 2014; or -fake."""
    return F.softplus(-fake).mean() if kind == "softplus" else -fake.mean()


def discriminator_loss(kind: Adversarial, real: Numbers, fake: Numbers) -> Scalar:
    """Discriminator loss: mean softplus(fake) + softplus(-real); or the hinge of Lim & Ye 2017."""
    if kind == "softplus":
        return F.softplus(fake).mean() + F.softplus(-real).mean()
    return F.relu(1 + fake).mean() + F.relu(1 - real).mean()


def gradient_penalty(logits: Logits, x: Samples) -> Scalar:
    """R1 (Mescheder et al. 2018, eq. 9): half the mean over samples of the squared norm of d logit / d x.

    logits must come from x by operations that can be differentiated twice.
    """
    (gradient,) = torch.autograd.grad(logits.mean(1).sum(), x, create_graph=True)
    return 0.5 * gradient.square().flatten(1).sum(1).mean()
