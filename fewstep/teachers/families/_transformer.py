"""What the families of transformers have in common: latents, a middle block, and students that are told more than the time."""

import copy
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fewstep.diffusion.prediction import PredictionType
from fewstep.diffusion.schedule import Schedule
from fewstep.teachers.base import Teacher
from fewstep.teachers.denoiser import Call, Denoiser, FeatureMap, Posterior, Scale
from fewstep.teachers.embeddings import transformer as told
from fewstep.teachers.families.sd import in_dtype
from fewstep.teachers.latents import decode_latents, encode_images, square_size
from fewstep.teachers.lora import ATTENTION, FEED_FORWARD, plain_copy
from fewstep.teachers.prompt_cache import freeze

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin


class TransformerTeacher(Teacher):
    """A pipeline with a `transformer`.

    A guidance scale that a student embeds has to be folded at export: no stock pipeline of these families passes one.
    """

    image_parts = ("vae",)
    lora_targets: tuple[str, ...] = (*ATTENTION, *FEED_FORWARD)
    call: Call
    feature_map: FeatureMap

    def __init__(self, pipeline: "DiffusionPipeline", schedule: Schedule, kind: PredictionType) -> None:
        freeze(pipeline)
        net = pipeline.transformer
        self.pipeline, self.schedule = pipeline, schedule
        self.num_train_timesteps = pipeline.scheduler.config.num_train_timesteps
        self.denoiser = Denoiser(net, self.call, schedule, kind, self.feature_map)
        self.latent_shape, self.image_size = self.sizes(pipeline)

    @staticmethod
    def sizes(pipeline: "DiffusionPipeline") -> tuple[tuple[int, int, int], int]:
        """Shape of a latent, side of an image: those of the pipeline's call when it is told none."""
        side, image_size = square_size(pipeline.transformer, pipeline)
        return (pipeline.transformer.config.in_channels, side, side), image_size

    @staticmethod
    @abstractmethod
    def time_modules(net: Any) -> Sequence[Any]:
        """The network's modules with a `time_proj` and a `timestep_embedder`."""

    def encode(self, images: Tensor) -> Posterior:
        return encode_images(self.placement.part("vae"), images, self.image_size)

    def decode(self, x0: Tensor) -> Tensor:
        return decode_latents(self.placement.part("vae"), x0)

    def student(self, guidance_embedding: bool = False, progress_embedding: bool = False) -> Denoiser:
        student = self.learner()
        if guidance_embedding or progress_embedding:
            told.attach(self.time_modules(student.net), progress_embedding, guidance_embedding)
        return student.learnable()

    def feature_module(self, denoiser: Denoiser) -> nn.Module:
        blocks: Any = denoiser.net.get_submodule("transformer_blocks")
        return blocks[len(blocks) // 2]  # type: ignore[no-any-return]

    def folded(self, student: Denoiser, guidance_scale: Scale | None = None) -> Any:
        net = plain_copy(student)
        told.fold(self.time_modules(net), guidance_scale)
        return net.requires_grad_(False).eval()

    def student_pipeline(
        self, student: Denoiser, scheduler: "SchedulerMixin", guidance_scale: Scale | None = None
    ) -> "DiffusionPipeline":
        """A pipeline of the teacher's class."""
        self.placement.recall(self.placement.parts)
        net = self.folded(student, guidance_scale)
        parts = {"transformer": net, "scheduler": copy.deepcopy(scheduler)}
        others = {key: part for key, part in self.pipeline.components.items() if key not in parts}
        own = {key: in_dtype(v, net.dtype) if isinstance(v, nn.Module) else v for key, v in others.items()}
        pipeline = type(self.pipeline)(**parts, **own)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline  # type: ignore[no-any-return]
