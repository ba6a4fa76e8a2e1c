"""Unconditional pixel models: DDPMPipeline and DDIMPipeline with a UNet2DModel (Ho et al. 2020, Song et al. 2021)."""

from typing import TYPE_CHECKING

from fewstep.diffusion.shapes import Latents
from fewstep.errors import FewstepError
from fewstep.teachers.base import Teacher
from fewstep.teachers.conditioner import Unconditional
from fewstep.teachers.denoiser import Denoiser, Inputs
from fewstep.teachers.families._pixel import PixelStudents, check_network
from fewstep.teachers.guidance_contract import GuidanceContract
from fewstep.teachers.latents import Pixels
from fewstep.teachers.lora import FEED_FORWARD, UNET
from fewstep.teachers.placement import Placement
from fewstep.teachers.samplers import DiscreteSamplers
from fewstep.teachers.schedulers import deterministic_scheduler, read_schedule

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, UNet2DModel

LORA_TARGETS = tuple(name for name in UNET if name not in (*FEED_FORWARD, "proj_in", "proj_out"))


def call(net: "UNet2DModel", inputs: Inputs) -> Latents:
    """The UNet's output at images [B, C, H, W]. Raises ValueError for a guidance_scale, which it cannot embed."""
    if inputs.guidance_scale is not None:
        raise FewstepError("guidance_scale", "one", "none, for an unconditional UNet2DModel takes none")
    output: Latents = net(inputs.x_t.to(net.dtype), inputs.t, class_labels=inputs.progress).sample
    return output


class Pixel(Teacher):
    """A DDPMPipeline or DDIMPipeline. x0 is the image itself; one-channel models see the mean over colours.

    Raises ValueError for class-conditional networks, for those that also predict a variance, and for epsilon with zero
    terminal SNR.
    """

    guidance = GuidanceContract(guidable=False)

    def __init__(self, pipeline: "DiffusionPipeline") -> None:
        unet, scheduler = pipeline.unet, pipeline.scheduler
        if unet.config.num_class_embeds is not None:
            raise FewstepError("teacher", "a class-conditional UNet2DModel", "an unconditional one in this pipeline")
        check_network(unet)
        placement = Placement(pipeline, unet)
        denoiser = Denoiser(unet, call, read_schedule(scheduler), scheduler.config.prediction_type)
        super().__init__(
            denoiser,
            placement,
            conditioner=Unconditional(),
            codec=Pixels(unet.config.in_channels, unet.config.sample_size),
            students=PixelStudents(denoiser, placement, LORA_TARGETS),
            samplers=DiscreteSamplers(scheduler, deterministic_scheduler),
        )
