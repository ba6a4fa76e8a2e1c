"""A pipeline's noise schedule, read from its scheduler and written into the stock scheduler of a student."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fewstep.diffusion.schedule import VariancePreserving
from fewstep.diffusion.shapes import GridTimes
from fewstep.errors import FewstepError

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

COPIED = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
"""Keys in the config of every discrete variance-preserving scheduler of diffusers."""


def read_schedule(scheduler: "SchedulerMixin") -> VariancePreserving:
    """The schedule of a discrete scheduler with `alphas_cumprod`.

    Raises ValueError for a prediction type that is unknown, and for epsilon with zero terminal SNR: there
    x0 = (x - sigma eps) / alpha divides by zero at the last timestep.
    """
    kind = scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction", "sample"):
        raise FewstepError("teacher", f"prediction_type {kind!r}", "epsilon, v_prediction or sample")
    table: Tensor = scheduler.alphas_cumprod.float()
    if kind == "epsilon" and table[-1] < 1e-6:
        raise FewstepError(
            "teacher",
            "prediction_type epsilon with zero terminal SNR (rescale_betas_zero_snr)",
            "v_prediction or sample, for x0 is undefined at the last timestep",
        )
    return VariancePreserving(table)


def renoise_scheduler(
    scheduler: "SchedulerMixin", steps: int, timestep_scaling: float = 10.0, spacing: int | None = None
) -> "SchedulerMixin":
    """LCMScheduler on the teacher's schedule with the grid of timesteps steps k - 1, ..., 2 k - 1, k - 1, k = spacing.

    Without a spacing, k is the teacher's timesteps divided by steps. A grid that ends early, such as 399 alone, is that
    of a schedule that is cut off there: the stock scheduler knows no other way to start in the middle.

    Raises ValueError where steps does not divide the teacher's timesteps and no spacing is given: the grid would miss the
    noisiest one; and where the grid leaves the teacher's timesteps.
    """
    from diffusers import LCMScheduler

    total = scheduler.config.num_train_timesteps
    if spacing is None and (steps < 1 or total % steps):
        divisors = ", ".join(str(n) for n in range(1, min(total, 200) + 1) if total % n == 0)
        raise FewstepError("steps", steps, f"a divisor of num_train_timesteps {total}: {divisors}")
    spacing = total // steps if spacing is None else spacing
    if not 1 <= steps * spacing <= total:
        raise FewstepError(
            "steps", f"a grid from timestep {steps * spacing - 1}", f"the teacher's timesteps, 0 to {total - 1}"
        )
    settings: dict[str, object] = {}
    if total // steps != spacing:
        total = steps * spacing
        settings = {"num_train_timesteps": total, "trained_betas": scheduler.betas[:total].tolist()}
        settings["rescale_betas_zero_snr"] = False  # the betas are already what it makes of them
    return _on_schedule_of(
        scheduler,
        LCMScheduler,
        original_inference_steps=steps,
        timestep_scaling=timestep_scaling,
        clip_sample=False,
        thresholding=False,
        **settings,
    )


def tcd_scheduler(scheduler: "SchedulerMixin", steps: int) -> "SchedulerMixin":
    """TCDScheduler on the teacher's schedule with the even grid of `steps` timesteps; asked for more, it raises.

    With eta = 0, which StableDiffusionPipeline passes by default, each of its steps is DDIM's to the next timestep of
    the grid, the last one to timestep 0.
    """
    from diffusers import TCDScheduler

    # steps_offset has no effect on its grid; with another value the pipeline would rewrite the config with a warning.
    return _on_schedule_of(scheduler, TCDScheduler, original_inference_steps=steps, steps_offset=1)


def dpm_scheduler(scheduler: "SchedulerMixin") -> "SchedulerMixin":
    """DPMSolverMultistepScheduler of order 1: DDIM's steps from 999 along an even grid, the last one to clean data.

    It runs any number of steps, so a pipeline with it cannot refuse those for which a student was not trained.
    """
    from diffusers import DPMSolverMultistepScheduler

    return _on_schedule_of(
        scheduler,
        DPMSolverMultistepScheduler,
        solver_order=1,
        timestep_spacing="trailing",
        final_sigmas_type="zero",
    )


def deterministic_scheduler(scheduler: "SchedulerMixin", steps: int) -> "SchedulerMixin":
    """LCMScheduler for one step, which refuses more; for others DPMSolverMultistepScheduler of order 1, which cannot.

    For pipelines that do not pass an eta: TCDScheduler, which can refuse, is stochastic in them.
    """
    return renoise_scheduler(scheduler, 1) if steps == 1 else dpm_scheduler(scheduler)


def jump_grid(scheduler: "SchedulerMixin", steps: int) -> GridTimes:
    """The timesteps [steps + 1] of a deterministic or re-noising scheduler's steps and the end of the last one."""
    from diffusers import TCDScheduler

    scheduler.set_timesteps(steps)
    return torch.tensor([*scheduler.timesteps.tolist(), 0 if isinstance(scheduler, TCDScheduler) else -1])


def _on_schedule_of(scheduler: "SchedulerMixin", kind: "type[SchedulerMixin]", **settings: object) -> "SchedulerMixin":
    own = {key: scheduler.config[key] for key in COPIED}
    own["rescale_betas_zero_snr"] = scheduler.config.get("rescale_betas_zero_snr", False)
    stock: SchedulerMixin = kind(**own | settings)
    table = scheduler.alphas_cumprod.float().cpu()[: len(stock.alphas_cumprod)]
    if not torch.allclose(stock.alphas_cumprod, table, atol=1e-6):
        raise FewstepError(
            "teacher",
            f"a schedule of {type(scheduler).__name__} that {kind.__name__} cannot reproduce",
            "one that it can",
        )
    return stock
