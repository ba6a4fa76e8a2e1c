"""Base of the families of rectified flow transformers.

Their timesteps here are even, 0 ... T - 1; the network gets T sigma, where sigma has the shift of the teacher's own
scheduler at the resolution of the pipeline's default call. Students run on that shifted grid at any resolution.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fewstep.diffusion.schedule import ShiftedFlow
from fewstep.diffusion.shapes import FeatureMap, PerSample, Times
from fewstep.teachers.denoiser import Features
from fewstep.teachers.embeddings.transformer import TimeModules
from fewstep.teachers.families._transformer import middle_block, tokens_as_map
from fewstep.teachers.flow_schedulers import shift_of
from fewstep.teachers.lora import ATTENTION, FEED_FORWARD

if TYPE_CHECKING:
    from diffusers import ModelMixin, SchedulerMixin

JOINT_BLOCK = (
    *ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", *FEED_FORWARD, "norm1.linear", "norm1_context.linear",
)  # fmt: skip
"""Adapters' targets in blocks with attention over image and text together."""


def image_stream_as_map(output: object) -> FeatureMap:
    """The image's part of the output of a block with two streams, (text, image)."""
    assert isinstance(output, tuple)
    return tokens_as_map(output[1])


JOINT_FEATURES = Features(middle_block, image_stream_as_map)


def flow_schedule(scheduler: "SchedulerMixin", image_tokens: int) -> ShiftedFlow:
    """The schedule of a FlowMatchEulerDiscreteScheduler for an image of so many tokens. ValueError for other schedulers."""
    return ShiftedFlow(shift_of(scheduler.config, image_tokens), scheduler.config.num_train_timesteps)


def network_time(schedule: ShiftedFlow, t: Times) -> PerSample:
    """T sigma at timesteps t."""
    return schedule.num_train_timesteps * schedule(t)[1]


def time_modules(net: "ModelMixin") -> Sequence[TimeModules]:
    """The modules that embed the time in SD3's and Flux' networks."""
    return [net.time_text_embed]
