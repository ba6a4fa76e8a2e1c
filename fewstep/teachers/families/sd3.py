"""Stable Diffusion 3 and 3.5 (Esser et al. 2024): a rectified flow of a transformer with joint attention, three encoders."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fewstep.diffusion.schedule import ShiftedFlow
from fewstep.diffusion.shapes import Latents
from fewstep.teachers.base import Teacher
from fewstep.teachers.conditioner import Prompts, call_defaults
from fewstep.teachers.denoiser import Cond, Denoiser, Inputs
from fewstep.teachers.embeddings.transformer import time_input
from fewstep.teachers.families._flow import JOINT_BLOCK, JOINT_FEATURES, flow_schedule, network_time, time_modules
from fewstep.teachers.families._transformer import TransformerStudents
from fewstep.teachers.flow_schedulers import even_grid_scheduler
from fewstep.teachers.guidance_contract import GUIDED_BY_DEFAULT
from fewstep.teachers.latents import Autoencoder, square_size
from fewstep.teachers.placement import Placement
from fewstep.teachers.samplers import FlowSamplers

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin, SD3Transformer2DModel


@dataclass(frozen=True)
class SD3Call:
    """SD3Transformer2DModel at latents [B, C, h, w]."""

    schedule: ShiftedFlow

    def __call__(self, net: "SD3Transformer2DModel", inputs: Inputs) -> Latents:
        output: Latents = net(
            hidden_states=inputs.x_t.to(net.dtype),
            timestep=time_input(net.time_text_embed, network_time(self.schedule, inputs.t), inputs),
            encoder_hidden_states=inputs.cond["encoder_hidden_states"].to(net.dtype),
            pooled_projections=inputs.cond["pooled_projections"].to(net.dtype),
        ).sample
        return output


class SD3Samplers(FlowSamplers):
    """The pipeline passes its scheduler nothing but the count, with which that has to be made."""

    def counts(self, steps: int) -> tuple[int, ...]:
        """One: the grid of other counts would end where that of `steps` does."""
        return (steps,)

    def scheduler(self, steps: int, stochastic: bool) -> "SchedulerMixin":
        return even_grid_scheduler(self.schedule, steps, stochastic)

    def set_timesteps(self, scheduler: "SchedulerMixin", steps: int) -> None:
        config = scheduler.config
        scheduler.set_timesteps(steps, **({"mu": config.base_shift} if config.use_dynamic_shifting else {}))


class StableDiffusion3(Teacher):
    """A StableDiffusion3Pipeline; unconditional is the empty prompt.

    It guides by default, and nothing in a folder can stop it: a student's caller passes guidance_scale=1.
    """

    guidance = GUIDED_BY_DEFAULT

    def __init__(self, pipeline: "DiffusionPipeline") -> None:
        net, encoders = pipeline.transformer, ("text_encoder", "text_encoder_2", "text_encoder_3")
        schedule = flow_schedule(pipeline.scheduler, (net.config.sample_size // net.config.patch_size) ** 2)
        placement = Placement(pipeline, net, text_parts=encoders, image_parts=("vae",))
        denoiser = Denoiser(net, SD3Call(schedule), schedule, "flow", JOINT_FEATURES)
        side, image_size = square_size(net, pipeline)
        super().__init__(
            denoiser,
            placement,
            conditioner=Prompts(placement, self._encode_prompts),
            codec=Autoencoder(placement, (net.config.in_channels, side, side), image_size),
            students=TransformerStudents(denoiser, placement, JOINT_BLOCK, time_modules),
            samplers=SD3Samplers(schedule),
        )

    def _encode_prompts(self, prompts: list[str]) -> Cond:
        encoded, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, None, device=self.placement.device, do_classifier_free_guidance=False,
            **call_defaults(self.pipeline, "max_sequence_length"),
        )  # fmt: skip
        return {"encoder_hidden_states": encoded, "pooled_projections": pooled}
