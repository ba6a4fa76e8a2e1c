"""Where continuous consistency training looks: noise levels from a log-normal, and a gap that shrinks in stages.

Easy Consistency Tuning (Geng et al. 2024, arXiv 2406.14548) starts at a diffusion model, for which every gap ends at clean
data, and halves the gap's share of the noise again and again. Noise levels are those of Karras et al., sigma / alpha.
"""

import torch
from torch import Tensor

from fewstep.diffusion.schedule import Schedule, noise_level
from fewstep.methods.consistency.config import TuningConfig, Weighting
from fewstep.methods.consistency.endpoints import SIGMA_DATA


def tuned_level(sigma: Tensor, stage: int, tuning: TuningConfig) -> Tensor:
    """The target's noise level r(sigma) [B] (Geng et al. 2024, eq. 12 and 13): at least 0, where the target is the data.

    r = sigma (1 - q^-(stage + 1) n(sigma)),  n = 1 + k sigmoid(-b sigma)
    """
    bracket = 1 + tuning.k * torch.sigmoid(-tuning.b * sigma)
    return (sigma * (1 - bracket * tuning.q ** -(stage + 1))).clamp_min(0)


def tuned_timestep(levels: Tensor, t: Tensor, iteration: int, tuning: TuningConfig) -> Tensor:
    """The timestep s [B] of the target for the whole timestep t [B]: nearest in log noise, below t; -1 is clean data.

    levels: those of `log_levels`. Late stages end at a gap of one timestep.
    """
    stage = iteration // tuning.double_iterations
    wanted = tuned_level(levels[t].exp(), stage, tuning)
    # Nearer to clean data than to timestep 0 is what lies below half of its noise.
    cuts = torch.cat([levels[:1] - 0.6931, (levels[1:] + levels[:-1]) / 2])
    return torch.minimum(torch.bucketize(wanted.log(), cuts) - 1, t - 1)


def gap_weights(kind: Weighting, schedule: Schedule, t: Tensor, s: Tensor) -> Tensor:
    """Weight of each sample's distance, [B]: 1; 1 / (sigma_t - sigma_s); or (sigma^2 + sd^2) / (sigma sd)^2 of t, 1 / c_out^2."""
    sigma = noise_level(schedule, t)
    match kind:
        case "none":
            return torch.ones_like(sigma)
        case "inverse_gap":
            return 1 / (sigma - noise_level(schedule, s))
    return (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
