"""Stable Diffusion 1.x and 2.x (Rombach et al. 2022): latents, CLIP prompts, a UNet that predicts epsilon or v."""

from typing import TYPE_CHECKING

from fewstep.teachers.base import Teacher
from fewstep.teachers.conditioner import Prompts
from fewstep.teachers.denoiser import Cond, Denoiser
from fewstep.teachers.families._unet import UNetStudents, call_unet, check_no_student
from fewstep.teachers.guidance_contract import GuidanceContract
from fewstep.teachers.latents import Autoencoder, square_size
from fewstep.teachers.lora import UNET
from fewstep.teachers.placement import Placement
from fewstep.teachers.samplers import DiscreteSamplers
from fewstep.teachers.schedulers import read_schedule, tcd_scheduler

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin


class StableDiffusionStudents(UNetStudents):
    """LatentConsistencyModelPipeline for students that are re-noised, StableDiffusionPipeline for others."""

    def kind(self, scheduler: "SchedulerMixin") -> "type[DiffusionPipeline]":
        from diffusers import LatentConsistencyModelPipeline, LCMScheduler, StableDiffusionPipeline

        return LatentConsistencyModelPipeline if isinstance(scheduler, LCMScheduler) else StableDiffusionPipeline

    def settings(self) -> dict[str, object]:
        return {
            "safety_checker": None, "requires_safety_checker": False, "feature_extractor": None, "image_encoder": None,
        }  # fmt: skip


class StableDiffusion(Teacher):
    """A StableDiffusionPipeline; its conditions are prompts, unconditional is the empty one.

    Raises ValueError for a UNet that embeds the guidance scale (a student already) and for epsilon with zero terminal
    SNR.
    """

    guidance = GuidanceContract(live=True, scale_to_pass_with_adapters=1.0)

    def __init__(self, pipeline: "DiffusionPipeline") -> None:
        unet, scheduler = pipeline.unet, pipeline.scheduler
        check_no_student(unet)
        placement = Placement(pipeline, unet, text_parts=("text_encoder",), image_parts=("vae",))
        denoiser = Denoiser(unet, call_unet, read_schedule(scheduler), scheduler.config.prediction_type)
        side, image_size = square_size(unet, pipeline)
        super().__init__(
            denoiser,
            placement,
            conditioner=Prompts(placement, self._encode_prompts),
            codec=Autoencoder(placement, (unet.config.in_channels, side, side), image_size),
            students=StableDiffusionStudents(denoiser, placement, UNET),
            samplers=DiscreteSamplers(scheduler, tcd_scheduler),
        )

    def _encode_prompts(self, prompts: list[str]) -> Cond:
        encoded, _ = self.pipeline.encode_prompt(prompts, self.pipeline.text_encoder.device, 1, False)
        return {"encoder_hidden_states": encoded}
