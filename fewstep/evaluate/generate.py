"""Images out of any diffusers pipeline, by its own call, the same for every batch size and number of processes."""

import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from fewstep import io
from fewstep.data.base import Condition, ConditionKind
from fewstep.errors import FewstepError
from fewstep.teachers import NETWORKS

Rounding = Literal["round", "truncate"]

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin


DIT_NULL_LABEL = 1000


def network(pipeline: "DiffusionPipeline") -> nn.Module:
    """The network that a pipeline evaluates at every step."""
    for name in NETWORKS:
        if isinstance(module := pipeline.components.get(name), nn.Module):
            return module
    raise FewstepError("pipeline", type(pipeline).__name__, f"a pipeline with one of {', '.join(NETWORKS)}")


def num_labels(pipeline: "DiffusionPipeline") -> int | None:
    """Number of classes of a class-conditional pipeline."""
    config: Mapping[str, int | None] = network(pipeline).config  # type: ignore[assignment]  # of diffusers' ConfigMixin
    # DiT counts its classes under the name of the layer that embeds them.
    return config.get("num_class_embeds") or config.get("num_embeds_ada_norm")


def condition_kind(pipeline: "DiffusionPipeline") -> ConditionKind:
    """Kind of condition of a pipeline's call; ValueError for a call that takes no prompt, label or batch size."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    if "prompt" in parameters:
        return "prompt"
    # ConsistencyModelPipeline takes labels but may hold an unconditional network.
    if "class_labels" in parameters and ("batch_size" not in parameters or num_labels(pipeline)):
        return "label"
    if "batch_size" in parameters:
        return "none"
    raise FewstepError(
        "pipeline", type(pipeline).__name__, "a pipeline whose call takes prompt, class_labels or batch_size"
    )


def check_guidance_scale(pipeline: "DiffusionPipeline", guidance_scale: float | None) -> None:
    """Check a guidance scale. Raises FewstepError for one that the pipeline's call does not take, or cannot guide by.

    DiTPipeline takes label 1000 for the unconditional one, whatever its network's is.
    """
    parameters = inspect.signature(type(pipeline).__call__).parameters
    if "guidance_scale" not in parameters:
        if guidance_scale is not None:
            raise FewstepError("guidance_scale", guidance_scale, f"none, for {type(pipeline).__name__} takes none")
        return
    scale = parameters["guidance_scale"].default if guidance_scale is None else guidance_scale
    labels = num_labels(pipeline) if type(pipeline).__name__ == "DiTPipeline" else DIT_NULL_LABEL
    if labels != DIT_NULL_LABEL and scale > 1:
        raise FewstepError(
            "guidance_scale",
            f"{scale:g}{' by default' if guidance_scale is None else ''}",
            f"1, for DiTPipeline guides away from label {DIT_NULL_LABEL}, and this network has {labels} labels",
        )


def noise_generator(seed: int, index: int) -> torch.Generator:
    """The source of all noise of image `index`, on the CPU so that every device draws the same."""
    digest = io.blake2b(f"{seed}:{index}", 8)
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@torch.no_grad()
def sample(
    pipeline: "DiffusionPipeline",
    conditions: Sequence[Condition],
    indices: Sequence[int],
    *,
    steps: int,
    seed: int,
    guidance_scale: float | None = None,
    uint8: Rounding = "round",
) -> Tensor:
    """One image per condition (prompt, label or None) as uint8 [B, 3, H, W] on the CPU.

    The noise of an image depends on (seed, index) only. Without `guidance_scale` the pipeline's own default holds.
    Raises ValueError for a guidance scale that the pipeline cannot take, and for images that are not finite.
    """
    if len(conditions) != len(indices):
        raise FewstepError("conditions", f"{len(conditions)} for {len(indices)} indices", "as many as indices")
    kwargs: dict[str, object] = {}
    match condition_kind(pipeline):
        case "prompt":
            kwargs["prompt"] = list(conditions)
        case "label":
            kwargs["class_labels"] = [int(str(label)) for label in conditions]
            if "batch_size" in inspect.signature(type(pipeline).__call__).parameters:
                kwargs["batch_size"] = len(indices)
        case "none":
            kwargs["batch_size"] = len(indices)
    check_guidance_scale(pipeline, guidance_scale)
    if guidance_scale is not None:
        kwargs["guidance_scale"] = guidance_scale
    pipeline.set_progress_bar_config(disable=True)
    generators = [noise_generator(seed, i) for i in indices]
    # "np" is the one output type that every pipeline has: float [B, H, W, C] in [0, 1].
    with step_noise(pipeline.scheduler, generators):
        images = pipeline(num_inference_steps=steps, generator=generators, output_type="np", **kwargs).images
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    if not pixels.isfinite().all():
        raise FewstepError(
            "images",
            f"values that are not finite, by {type(pipeline).__name__} in {steps} steps",
            "finite pixels",
            "Load the pipeline in another dtype, or train it again",
        )
    return _uint8(pixels, uint8).expand(-1, 3, -1, -1).contiguous()


@contextmanager
def step_noise(scheduler: "SchedulerMixin", generators: list[torch.Generator]) -> Iterator[None]:
    """Inside the block a scheduler that draws noise draws it from the generators, also in pipelines that pass it none.

    DiT's, SD3's and Flux's pass none. A batch doubled for guidance draws twice from each; only its first half counts.
    """
    step = scheduler.step
    if "generator" not in inspect.signature(step).parameters:
        yield
        return

    @functools.wraps(step)
    def stepped(output: Tensor, *args: object, **options: object) -> object:
        own = generators * (len(output) // len(generators))
        return step(output, *args, **{"generator": own} | options)

    scheduler.step = stepped
    try:
        yield
    finally:
        del scheduler.step


def _uint8(pixels: Tensor, how: Rounding) -> Tensor:
    # diffusers rounds when it makes a PIL image; some papers' scripts truncate, which darkens by half a level.
    levels = (pixels * 255).round() if how == "round" else (pixels * 255).floor()
    return levels.clamp(0, 255).to(torch.uint8)


def batches(num_images: int, batch_size: int, rank: int = 0, world: int = 1) -> list[range]:
    """The index ranges of one process: batch b of the whole belongs to rank b % world, whatever the world."""
    starts = range(0, num_images, batch_size)
    return [range(s, min(s + batch_size, num_images)) for s in starts[rank::world]]


def remaining_batches(done: Iterable[int], num_images: int, batch_size: int, rank: int, world: int) -> list[list[int]]:
    """`batches` of the indices that are not done; the same batches as ever where whole ones of that size are done."""
    left = sorted(set(range(num_images)) - set(done))
    return [left[s : s + batch_size] for s in range(0, len(left), batch_size)[rank::world]]


@dataclass
class Evaluations:
    """Network evaluations so far, counted per sample: a batch doubled for guidance counts twice."""

    count: int = 0


@contextmanager
def counted(pipeline: "DiffusionPipeline") -> Iterator[Evaluations]:
    """Count the samples that go through the pipeline's network inside the block."""
    evaluations = Evaluations()

    def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: object) -> None:
        first = args[0] if args else kwargs["hidden_states" if "hidden_states" in kwargs else "sample"]
        evaluations.count += len(first)

    handle = network(pipeline).register_forward_hook(hook, with_kwargs=True)
    try:
        yield evaluations
    finally:
        handle.remove()
