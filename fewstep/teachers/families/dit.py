"""Diffusion transformers on class labels, DiT (Peebles & Xie 2023)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fewstep.diffusion.shapes import Latents
from fewstep.teachers.base import Teacher
from fewstep.teachers.conditioner import Labels
from fewstep.teachers.denoiser import Denoiser, Inputs, Scale
from fewstep.teachers.embeddings.transformer import TimeModules, time_input
from fewstep.teachers.families._transformer import TOKEN_FEATURES, TransformerStudents
from fewstep.teachers.guidance_contract import GUIDED_BY_DEFAULT
from fewstep.teachers.latents import Autoencoder, square_size
from fewstep.teachers.lora import ATTENTION, FEED_FORWARD
from fewstep.teachers.placement import Placement
from fewstep.teachers.samplers import DiscreteSamplers
from fewstep.teachers.schedulers import deterministic_scheduler, read_schedule

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, DiTTransformer2DModel, SchedulerMixin


def call(net: "DiTTransformer2DModel", inputs: Inputs) -> Latents:
    """The network's output at latents [B, C, h, w], without the variance that it may predict behind it."""
    time = time_input(time_modules(net)[0], inputs.t, inputs)
    output: Latents = net(inputs.x_t.to(net.dtype), timestep=time, class_labels=inputs.cond["class_labels"]).sample
    return output[:, : inputs.x_t.shape[1]]


def time_modules(net: "DiTTransformer2DModel") -> Sequence[TimeModules]:
    return [block.norm1.emb for block in net.transformer_blocks]


class DiTStudents(TransformerStudents):
    """Students in a DiTPipeline with the names of the teacher's classes, which diffusers itself would not save."""

    def pipeline(
        self, student: Denoiser, scheduler: "SchedulerMixin", guidance_scale: Scale | None = None
    ) -> "DiffusionPipeline":
        pipeline = super().pipeline(student, scheduler, guidance_scale)
        labels: dict[str, int] = self.placement.pipeline.labels
        names: dict[int, list[str]] = {}
        for name, label in labels.items():
            names.setdefault(label, []).append(name)
        if names:
            pipeline.labels = labels
            pipeline.register_to_config(id2label={label: ", ".join(n) for label, n in names.items()})
        return pipeline


class DiT(Teacher):
    """A DiTPipeline; its conditions are labels, unconditional is the label behind the last.

    DiTPipeline guides by default, with the label 1000, and nothing in a folder can stop it: a student's caller passes
    guidance_scale=1.
    """

    guidance = GUIDED_BY_DEFAULT

    def __init__(self, pipeline: "DiffusionPipeline") -> None:
        net, scheduler = pipeline.transformer, pipeline.scheduler
        placement = Placement(pipeline, net, image_parts=("vae",))
        kind = scheduler.config.prediction_type
        denoiser = Denoiser(net, call, read_schedule(scheduler), kind, TOKEN_FEATURES)
        # In training mode the network would replace labels by the null label, in each block again.
        for block in net.transformer_blocks:
            block.norm1.emb.class_embedder.dropout_prob = 0.0
        side, image_size = square_size(net, pipeline)
        labels = net.config.num_embeds_ada_norm
        targets = (*ATTENTION, *FEED_FORWARD, "norm1.linear")
        super().__init__(
            denoiser,
            placement,
            conditioner=Labels(placement, labels, null_label=labels),
            codec=Autoencoder(placement, (net.config.in_channels, side, side), image_size),
            students=DiTStudents(denoiser, placement, targets, time_modules),
            samplers=DiscreteSamplers(scheduler, deterministic_scheduler),
        )
