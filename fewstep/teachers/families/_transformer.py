"""Base of the families of latent transformers: features, and students with extra inputs where the timestep enters.

A guidance scale that a student embeds has to be folded at export: no stock pipeline of these families passes one.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from fewstep.diffusion.shapes import FeatureMap
from fewstep.teachers.denoiser import Denoiser, Features, Scale
from fewstep.teachers.embeddings.transformer import TimeModules, attach_inputs, fold_inputs
from fewstep.teachers.lora import plain_copy
from fewstep.teachers.placement import Placement
from fewstep.teachers.students import Students

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin


def tokens_as_map(tokens: object) -> FeatureMap:
    """Tokens [B, h h, C] of a square image, row by row, as a map [B, C, h, h]."""
    assert isinstance(tokens, Tensor)
    side = round(tokens.shape[1] ** 0.5)
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def middle_block(net: nn.Module) -> nn.Module:
    """The block in the middle of a transformer's."""
    blocks = net.get_submodule("transformer_blocks")
    assert isinstance(blocks, nn.ModuleList)
    return blocks[len(blocks) // 2]


TOKEN_FEATURES = Features(middle_block, tokens_as_map)


class TransformerStudents(Students):
    """Students in pipelines of the teacher's class.

    time_modules: the network's modules with a `time_proj` and a `timestep_embedder`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        placement: Placement,
        lora_targets: Sequence[str],
        time_modules: "Callable[[ModelMixin], Sequence[TimeModules]]",
    ) -> None:
        super().__init__(denoiser, placement, lora_targets)
        self.time_modules = time_modules

    def new(self, guidance_embedding: bool = False, progress_embedding: bool = False) -> Denoiser:
        student = self.trainable()
        if guidance_embedding or progress_embedding:
            attach_inputs(self.time_modules(student.net), progress_embedding, guidance_embedding)
        return student.learnable()

    def fold(self, student: Denoiser, guidance_scale: Scale | None = None) -> "ModelMixin":
        net = plain_copy(student)
        fold_inputs(self.time_modules(net), guidance_scale)
        return net.requires_grad_(False).eval()

    def pipeline(
        self, student: Denoiser, scheduler: "SchedulerMixin", guidance_scale: Scale | None = None
    ) -> "DiffusionPipeline":
        return self.assembled(type(self.placement.pipeline), self.fold(student, guidance_scale), scheduler)
