"""A pipeline's noise schedule, read from its scheduler and written into the stock scheduler of a student."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fewstep.process import VariancePreserving

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

COPIED = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
"""What every discrete variance-preserving scheduler of diffusers has in its config."""


def read_schedule(scheduler: Any) -> VariancePreserving:
    """The schedule of a discrete scheduler with `alphas_cumprod`.

    Raises ValueError for a prediction type that is unknown, and for epsilon with zero terminal SNR: there
    x0 = (x - sigma eps) / alpha divides by zero at the last timestep.
    """
    kind = scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(f"the teacher's prediction_type is {kind!r}; supported: epsilon, v_prediction, sample")
    table: Tensor = scheduler.alphas_cumprod.float()
    if kind == "epsilon" and table[-1] < 1e-6:
        raise ValueError(
            "the teacher predicts epsilon on a schedule with zero terminal SNR (rescale_betas_zero_snr): x0 is "
            "undefined at its last timestep; use a v_prediction or sample teacher"
        )
    return VariancePreserving(table)


def renoise_scheduler(scheduler: Any, steps: int, timestep_scaling: float) -> "SchedulerMixin":
    """LCMScheduler on the teacher's schedule with the even grid of `steps` timesteps.

    Raises ValueError where steps does not divide the teacher's timesteps: the grid would miss the noisiest one, from
    which sampling starts.
    """
    from diffusers import LCMScheduler

    total = scheduler.config.num_train_timesteps
    if steps < 1 or total % steps:
        divisors = ", ".join(str(n) for n in range(1, min(total, 200) + 1) if total % n == 0)
        raise ValueError(f"steps is {steps}, which does not divide num_train_timesteps = {total}; allowed: {divisors}")
    stock = LCMScheduler(
        **{key: scheduler.config[key] for key in COPIED},
        rescale_betas_zero_snr=scheduler.config.get("rescale_betas_zero_snr", False),
        original_inference_steps=steps,
        timestep_scaling=timestep_scaling,
        clip_sample=False,
        thresholding=False,
    )
    if not torch.allclose(stock.alphas_cumprod, scheduler.alphas_cumprod.float().cpu(), atol=1e-6):
        raise ValueError(f"LCMScheduler cannot reproduce the schedule of the teacher's {type(scheduler).__name__}")
    return stock
