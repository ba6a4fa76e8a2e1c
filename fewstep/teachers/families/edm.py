"""Pixel models with EDM's scalings, with labels or without: ConsistencyModelPipeline (Karras et al. 2022, Song et al. 2023)."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from fewstep.diffusion.schedule import KarrasLevels
from fewstep.diffusion.shapes import GridTimes, Latents, PerSample, Times
from fewstep.errors import FewstepError
from fewstep.teachers.base import Teacher
from fewstep.teachers.conditioner import Labels, Unconditional
from fewstep.teachers.denoiser import Denoiser, Inputs
from fewstep.teachers.embeddings.unet import LabelProgressEmbedding
from fewstep.teachers.families._pixel import PixelStudents, check_network
from fewstep.teachers.guidance_contract import GuidanceContract
from fewstep.teachers.latents import Pixels
from fewstep.teachers.lora import ATTENTION
from fewstep.teachers.placement import Placement
from fewstep.teachers.samplers import Samplers

if TYPE_CHECKING:
    from diffusers import CMStochasticIterativeScheduler, DiffusionPipeline, SchedulerMixin, UNet2DModel


@dataclass(frozen=True)
class Preconditioned:
    """x0 [B, C, H, W] at x_t, t [B]: c_skip x + c_out net(c_in x, 250 log k), where x = x_t / alpha and k = sigma / alpha.

    A diffusion model's scalings are EDM's (Karras et al. 2022, table 1). With `ends`, they are those of a consistency model,
    which is the identity at sigma_min (Song et al. 2023, appendix C), and of every step of CMStochasticIterativeScheduler.
    """

    schedule: KarrasLevels
    sigma_data: float
    ends: bool = False

    def __call__(self, net: "UNet2DModel", inputs: Inputs) -> Latents:
        if inputs.guidance_scale is not None:
            raise FewstepError("guidance_scale", "one", "none, for a UNet2DModel takes none")
        x_t, progress = inputs.x_t, inputs.progress
        k, data = self.schedule.level(inputs.t), self.sigma_data
        shape, kind = (-1, 1, 1, 1), torch.promote_types(x_t.dtype, torch.float32)
        x = x_t.to(kind) * (1 + k**2).sqrt().view(shape).to(kind)
        size, above = (k**2 + data**2).sqrt(), k - self.schedule.sigma_min if self.ends else k
        c_skip, c_out, c_in = (
            v.view(shape).to(kind) for v in (data**2 / (above**2 + data**2), above * data / size, 1 / size)
        )
        labels = inputs.cond.get("class_labels")
        if labels is not None and progress is not None:
            labels = torch.stack([labels.to(progress.dtype), progress], dim=1)
        elif labels is None:
            labels = progress
        output = net((c_in * x).to(net.dtype), 250 * k.log(), class_labels=labels).sample
        return c_skip * x + c_out * output.to(kind)


class EdmStudents(PixelStudents):
    """Consistency models in ConsistencyModelPipeline, whose first argument is a batch size: labels are passed by keyword."""

    def new(self, guidance_embedding: bool = False, progress_embedding: bool = False) -> Denoiser:
        labelled = isinstance(self.denoiser.net.class_embedding, nn.Embedding)
        student = super().new(guidance_embedding, progress_embedding and not labelled)
        labels = student.net.class_embedding
        if progress_embedding and isinstance(labels, nn.Embedding):
            student.net.class_embedding = LabelProgressEmbedding(labels)
        assert isinstance(student.call, Preconditioned)
        student.call = replace(student.call, ends=True)
        return student.learnable()

    def kind(self) -> "type[DiffusionPipeline]":
        from diffusers import ConsistencyModelPipeline

        return ConsistencyModelPipeline


class EdmSamplers(Samplers):
    """CMStochasticIterativeScheduler at its own levels."""

    def __init__(self, scheduler: "CMStochasticIterativeScheduler") -> None:
        self.config, self.total = scheduler.config, scheduler.config.num_train_timesteps

    def renoise(self, steps: int, timestep_scaling: float = 10.0, spacing: int | None = None) -> "SchedulerMixin":
        """The teacher's own, without bounds on x0, as students are trained without.

        It has no c_skip and c_out of a timestep_scaling (Luo et al. 2023), which must be 0 and 1 at its timesteps up to 1e-3.
        Raises ValueError where steps does not divide the teacher's timesteps, for grids that do not start at the noisiest of
        them, and for other scalings.
        """
        from diffusers import CMStochasticIterativeScheduler

        total = self.total
        if steps < 1 or total % steps:
            divisors = ", ".join(str(n) for n in range(1, total + 1) if total % n == 0)
            raise FewstepError("steps", steps, f"a divisor of num_train_timesteps {total}: {divisors}")
        if spacing not in (None, total // steps):
            raise FewstepError(
                "steps",
                f"a grid from timestep {steps * spacing - 1}",
                f"one from {total - 1}, where CMStochasticIterativeScheduler starts",
            )
        if timestep_scaling * (total // steps - 1) < 16:
            raise FewstepError(
                "timestep_scaling",
                f"{timestep_scaling:g} with {steps} steps of {total} levels",
                "a larger one, for the stock scheduler has no c_skip",
            )
        scheduler: SchedulerMixin = CMStochasticIterativeScheduler.from_config(
            self.config, clip_denoised=False, s_noise=1.0
        )
        return scheduler

    def counts(self, steps: int) -> tuple[int, ...]:
        """The divisors of steps: n steps run timesteps T - 1 - i (T // n), i = 0 ... n - 1."""
        return tuple(n for n in range(1, steps + 1) if steps % n == 0)

    def jump(self, steps: int) -> "SchedulerMixin":
        """One step. ValueError for more: no stock scheduler with this network's scalings goes on without noise."""
        if steps != 1:
            raise FewstepError(
                "steps", steps, "1, for ConsistencyModelPipeline takes one deterministic step and re-noises for more"
            )
        return self.renoise(1)

    def grid(self, scheduler: "SchedulerMixin", steps: int) -> GridTimes:
        total = self.total
        return torch.tensor([*(total - 1 - i * (total // steps) for i in range(steps)), -1])


class Edm(Teacher):
    """A ConsistencyModelPipeline. There is no unconditional among its labels, and so no guidance.

    The teacher is read as a diffusion model, its students as the consistency models that their pipeline takes them for.
    Timesteps are the levels of the scheduler, by its num_train_timesteps; the network is valid at any level between.

    Raises ValueError for networks with a learnt variance, labels but by an embedding, or without one size, and for other
    schedulers.
    """

    guidance = GuidanceContract(guidable=False)
    schedule: KarrasLevels

    def __init__(self, pipeline: "DiffusionPipeline") -> None:
        from diffusers import CMStochasticIterativeScheduler

        unet, scheduler = pipeline.unet, pipeline.scheduler
        check_network(unet)
        if not isinstance(scheduler, CMStochasticIterativeScheduler):
            raise FewstepError("teacher", f"a scheduler {type(scheduler).__name__}", "CMStochasticIterativeScheduler")
        s = scheduler.config
        schedule = KarrasLevels(s.sigma_min, s.sigma_max, s.rho, s.num_train_timesteps)
        placement, labels = Placement(pipeline, unet), unet.config.num_class_embeds
        denoiser = Denoiser(unet, Preconditioned(schedule, s.sigma_data), schedule, "sample")
        targets = (*ATTENTION, "conv1", "conv2", "conv_shortcut", "time_emb_proj")
        self.sigma_data: float = s.sigma_data
        super().__init__(
            denoiser,
            placement,
            # Methods refuse to guide this family, so its label for unconditional is any.
            conditioner=Unconditional() if labels is None else Labels(placement, labels, null_label=0, dtype=torch.int),
            codec=Pixels(unet.config.in_channels, unet.config.sample_size),
            students=EdmStudents(denoiser, placement, targets),
            samplers=EdmSamplers(scheduler),
        )

    def error_weight(self, t: Times) -> PerSample:
        """1 / c_out^2 = 1 / k^2 + 1 / sigma_data^2, with which errors in x0 are errors of the network's own output."""
        return (self.schedule.level(t) ** -2 + self.sigma_data**-2).float()
