"""Pixel models with EDM's scalings, with labels or without: ConsistencyModelPipeline (Karras et al. 2022, Song et al. 2023)."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fewstep.diffusion.schedule import KarrasLevels
from fewstep.teachers.denoiser import Cond, Denoiser, Scale
from fewstep.teachers.embeddings.unet import ToldLabels
from fewstep.teachers.families.ddpm import Pixel, check_network
from fewstep.teachers.lora import ATTENTION

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin


@dataclass(frozen=True)
class Preconditioned:
    """x0 [B, C, H, W] at x_t, t [B]: c_skip x + c_out net(c_in x, 250 log k), where x = x_t / alpha and k = sigma / alpha.

    A diffusion model's scalings are EDM's (Karras et al. 2022, table 1). With `ends`, they are those of a consistency model,
    which is the identity at sigma_min (Song et al. 2023, appendix C), and of every step of CMStochasticIterativeScheduler.
    """

    schedule: KarrasLevels
    sigma_data: float
    ends: bool = False

    def __call__(
        self,
        net: Any,
        x_t: Tensor,
        t: Tensor,
        cond: Cond,
        guidance_scale: Tensor | None,
        progress: Tensor | None = None,
    ) -> Tensor:
        if guidance_scale is not None:
            raise ValueError("a UNet2DModel takes no guidance_scale")
        k, data = self.schedule.level(t), self.sigma_data
        shape, kind = (-1, 1, 1, 1), torch.promote_types(x_t.dtype, torch.float32)
        x = x_t.to(kind) * (1 + k**2).sqrt().view(shape).to(kind)
        size, above = (k**2 + data**2).sqrt(), k - self.schedule.sigma_min if self.ends else k
        c_skip, c_out, c_in = (
            v.view(shape).to(kind) for v in (data**2 / (above**2 + data**2), above * data / size, 1 / size)
        )
        labels = cond.get("class_labels")
        if labels is not None and progress is not None:
            labels = torch.stack([labels.to(progress.dtype), progress], dim=1)
        elif labels is None:
            labels = progress
        output = net((c_in * x).to(net.dtype), 250 * k.log(), class_labels=labels).sample
        return c_skip * x + c_out * output.to(kind)


class Edm(Pixel):
    """A ConsistencyModelPipeline. There is no unconditional among its labels, and so no guidance.

    The teacher is read as a diffusion model, its students as the consistency models that their pipeline takes them for.
    Timesteps are the levels of the scheduler, by its num_train_timesteps; the network is valid at any level between.

    Raises ValueError for the networks that Pixel refuses (labels but by an embedding), and for other schedulers.
    """

    lora_targets = (*ATTENTION, "conv1", "conv2", "conv_shortcut", "time_emb_proj")
    schedule: KarrasLevels

    def __init__(self, pipeline: "DiffusionPipeline") -> None:
        from diffusers import CMStochasticIterativeScheduler

        unet, settings = pipeline.unet, pipeline.scheduler.config
        check_network(unet.config)
        if not isinstance(pipeline.scheduler, CMStochasticIterativeScheduler):
            raise ValueError(
                f"the teacher's scheduler is a {type(pipeline.scheduler).__name__}; supported: CMStochasticIterativeScheduler"
            )
        self.pipeline, self.num_train_timesteps = pipeline, settings.num_train_timesteps
        self.schedule = KarrasLevels(settings.sigma_min, settings.sigma_max, settings.rho, self.num_train_timesteps)
        self.call = Preconditioned(self.schedule, settings.sigma_data)
        self.denoiser = Denoiser(unet.requires_grad_(False).eval(), self.call, self.schedule, "sample")
        self.image_size = unet.config.sample_size
        self.latent_shape = (unet.config.in_channels, self.image_size, self.image_size)
        self.num_labels: int | None = unet.config.num_class_embeds
        self.conditions = "none" if self.num_labels is None else "label"

    def error_weight(self, t: Tensor) -> Tensor:
        """1 / c_out^2 = 1 / k^2 + 1 / sigma_data^2, with which errors in x0 are errors of the network's own output."""
        return (self.schedule.level(t) ** -2 + self.call.sigma_data**-2).float()

    def condition(self, raw: Sequence[Any]) -> Cond:
        if self.num_labels is None:
            return {}
        wrong = [v for v in raw if not isinstance(v, int) or not 0 <= v < self.num_labels]
        if wrong:
            raise ValueError(
                f"the teacher's conditions are labels 0 to {self.num_labels - 1}; found {wrong[0]!r}: set data.source to one "
                "with labels, and data.num_labels"
            )
        return {"class_labels": torch.tensor(raw, dtype=torch.int, device=self.placement.device)}

    def null_condition(self, size: int) -> Cond:
        """Any label: no network is asked for an unconditional answer, since methods refuse to guide this family."""
        return self.condition([0] * size)

    def student(self, guidance_embedding: bool = False, progress_embedding: bool = False) -> Denoiser:
        labelled = progress_embedding and self.num_labels is not None
        student = super().student(guidance_embedding, progress_embedding and not labelled)
        if labelled:
            net: Any = student.net
            net.class_embedding = ToldLabels(net.class_embedding)
        student.call = replace(self.call, ends=True)
        return student.learnable()

    def renoise_scheduler(
        self, steps: int, timestep_scaling: float = 10.0, spacing: int | None = None
    ) -> "SchedulerMixin":
        """The teacher's own, without bounds on x0, as students are trained without.

        It has no c_skip and c_out of a timestep_scaling (Luo et al. 2023), which must be 0 and 1 at its timesteps up to 1e-3.
        Raises ValueError where steps does not divide the teacher's timesteps, for grids that do not start at the noisiest of
        them, and for other scalings.
        """
        from diffusers import CMStochasticIterativeScheduler

        total = self.num_train_timesteps
        if steps < 1 or total % steps:
            divisors = ", ".join(str(n) for n in range(1, total + 1) if total % n == 0)
            raise ValueError(
                f"steps is {steps}, which does not divide num_train_timesteps = {total}; allowed: {divisors}"
            )
        if spacing not in (None, total // steps):
            raise ValueError(
                f"steps: CMStochasticIterativeScheduler starts at timestep {total - 1}, and the grid at {steps * spacing - 1}"
            )
        if timestep_scaling * (total // steps - 1) < 16:
            raise ValueError(
                f"timestep_scaling: {timestep_scaling:g} is too small for {steps} steps of {total} levels: the stock scheduler "
                "does not have its c_skip"
            )
        scheduler: SchedulerMixin = CMStochasticIterativeScheduler.from_config(
            self.pipeline.scheduler.config, clip_denoised=False, s_noise=1.0
        )
        return scheduler

    def renoise_counts(self, steps: int) -> tuple[int, ...]:
        """Those that divide steps: n steps run timesteps T - 1 - i (T // n), i = 0 ... n - 1."""
        return tuple(n for n in range(1, steps + 1) if steps % n == 0)

    def jump_scheduler(self, steps: int) -> "SchedulerMixin":
        """One step. ValueError for more: no stock scheduler with this network's scalings goes on without noise."""
        if steps != 1:
            raise ValueError(
                f"steps is {steps}: ConsistencyModelPipeline takes one deterministic step; more of them are re-noised"
            )
        return self.renoise_scheduler(1)

    def jump_grid(self, scheduler: "SchedulerMixin", steps: int) -> Tensor:
        total = self.num_train_timesteps
        return torch.tensor([*(total - 1 - i * (total // steps) for i in range(steps)), -1])

    def student_pipeline(
        self, student: Denoiser, scheduler: "SchedulerMixin", guidance_scale: Scale | None = None
    ) -> "DiffusionPipeline":
        """ConsistencyModelPipeline, whose first argument is a batch size: labels are passed by keyword."""
        from diffusers import ConsistencyModelPipeline

        unet = self.folded(student, guidance_scale)
        pipeline = ConsistencyModelPipeline(unet=unet, scheduler=copy.deepcopy(scheduler))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline
