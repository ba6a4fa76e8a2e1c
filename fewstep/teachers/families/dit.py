"""Diffusion transformers on class labels, DiT (Peebles & Xie 2023)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fewstep.teachers.denoiser import Call, Cond, Denoiser, FeatureMap, Scale, tokens_as_map
from fewstep.teachers.embeddings import transformer as told
from fewstep.teachers.families._transformer import TransformerTeacher
from fewstep.teachers.guidance_contract import GUIDED_BY_DEFAULT
from fewstep.teachers.lora import ATTENTION, FEED_FORWARD
from fewstep.teachers.schedulers import DiscreteGrids, deterministic_scheduler, read_schedule

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin


def call(
    net: Any, x_t: Tensor, t: Tensor, cond: Cond, guidance_scale: Tensor | None, progress: Tensor | None = None
) -> Tensor:
    """The network's output at x_t [B, C, h, w], t [B], without the variance that it may predict behind it."""
    time = told.columns(DiT.time_modules(net)[0], t, guidance_scale, progress)
    output: Tensor = net(x_t.to(net.dtype), timestep=time, class_labels=cond["class_labels"]).sample
    return output[:, : x_t.shape[1]]


class DiT(DiscreteGrids, TransformerTeacher):
    """A DiTPipeline; its conditions are labels, unconditional is the label behind the last.

    DiTPipeline guides by default, with the label 1000, and nothing in a folder can stop it: a student's caller passes
    guidance_scale=1.
    """

    conditions = "label"
    guidance = GUIDED_BY_DEFAULT
    lora_targets = (*ATTENTION, *FEED_FORWARD, "norm1.linear")
    call: Call = staticmethod(call)
    feature_map: FeatureMap = staticmethod(tokens_as_map)

    def __init__(self, pipeline: "DiffusionPipeline") -> None:
        kind = pipeline.scheduler.config.prediction_type
        super().__init__(pipeline, read_schedule(pipeline.scheduler), kind)
        self.num_labels: int = pipeline.transformer.config.num_embeds_ada_norm
        # In training mode the network would replace labels by the null label, in each block anew.
        for module in self.time_modules(pipeline.transformer):
            module.class_embedder.dropout_prob = 0.0

    def student_pipeline(
        self, student: Denoiser, scheduler: "SchedulerMixin", guidance_scale: Scale | None = None
    ) -> "DiffusionPipeline":
        """A DiTPipeline with the names of the teacher's classes, which diffusers itself would not save."""
        pipeline: Any = super().student_pipeline(student, scheduler, guidance_scale)
        names: dict[int, list[str]] = {}
        for name, label in self.pipeline.labels.items():
            names.setdefault(label, []).append(name)
        if names:
            pipeline.labels = self.pipeline.labels
            pipeline.register_to_config(id2label={label: ", ".join(n) for label, n in names.items()})
        return pipeline  # type: ignore[no-any-return]

    @staticmethod
    def time_modules(net: Any) -> Sequence[Any]:
        return [block.norm1.emb for block in net.transformer_blocks]

    def condition(self, raw: Sequence[Any]) -> Cond:
        wrong = [v for v in raw if not isinstance(v, int) or not 0 <= v < self.num_labels]
        if wrong:
            raise ValueError(
                f"the teacher's conditions are labels 0 to {self.num_labels - 1}; found {wrong[0]!r}: set data.source to one "
                "with labels, and data.num_labels"
            )
        return {"class_labels": torch.tensor(raw, device=self.placement.device)}

    def null_condition(self, size: int) -> Cond:
        return {"class_labels": torch.full((size,), self.num_labels, device=self.placement.device)}

    def jump_scheduler(self, steps: int) -> "SchedulerMixin":
        return deterministic_scheduler(self.pipeline.scheduler, steps)
