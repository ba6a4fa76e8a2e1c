"""Conditions of a network: prompts, labels or nothing."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from fewstep.errors import FewstepError
from fewstep.teachers.denoiser import Cond
from fewstep.teachers.placement import Placement
from fewstep.teachers.prompt_cache import PromptCache

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

ConditionKind = Literal["prompt", "label", "none"]


class Conditioner(ABC):
    """Turns prompts, labels or Nones into a network's conditions.

    Attributes:
        kind: what is turned into conditions.
        cache: keeps the conditions of prompts; None where there are no prompts.
    """

    kind: ConditionKind
    cache: PromptCache | None = None

    @abstractmethod
    def __call__(self, raw: Sequence[object]) -> Cond:
        """The conditions [B, ...] of B prompts, labels or Nones. Raises ValueError for anything else."""

    @abstractmethod
    def null(self, size: int) -> Cond:
        """Unconditional conditions of classifier-free guidance, for `size` samples."""

    def negative(self, prompt: str) -> str:
        """The text to encode for a negative prompt; "" is for unconditional.

        The prompt itself, but for pipelines that encode the two kinds differently.
        """
        return prompt


class Prompts(Conditioner):
    """Prompts by the pipeline's own text encoders, each encoded once. Unconditional is the empty prompt.

    encode: B prompts to their conditions, called with the text encoders in place.
    """

    kind = "prompt"
    cache: PromptCache

    def __init__(self, placement: Placement, encode: Callable[[list[str]], Cond]) -> None:
        def encode_in_place(prompts: list[str]) -> Cond:
            placement.recall(placement.text_parts)
            return encode(prompts)

        self.cache = PromptCache(encode_in_place, lambda: placement.device)
        placement.moved.append(self.cache.clear)

    def __call__(self, raw: Sequence[object]) -> Cond:
        return self.cache(raw)

    def null(self, size: int) -> Cond:
        return self([self.negative("")] * size)


class Labels(Conditioner):
    """Labels 0 ... count - 1 as `class_labels` [B].

    null_label: the label of unconditional predictions. For a network without one it is any, and guidance is refused.
    """

    kind = "label"

    def __init__(self, placement: Placement, count: int, null_label: int, dtype: torch.dtype = torch.long) -> None:
        self.placement, self.count, self.null_label, self.dtype = placement, count, null_label, dtype

    def __call__(self, raw: Sequence[object]) -> Cond:
        labels = [v for v in raw if isinstance(v, int) and 0 <= v < self.count]
        if len(labels) < len(raw):
            wrong = next(v for v in raw if not isinstance(v, int) or not 0 <= v < self.count)
            raise FewstepError(
                "data.source",
                f"condition {wrong!r}",
                f"labels 0 to {self.count - 1}, the teacher's conditions",
                "Set data.source to one with labels, and data.num_labels",
            )
        return {"class_labels": torch.tensor(labels, dtype=self.dtype, device=self.placement.device)}

    def null(self, size: int) -> Cond:
        labels = torch.full((size,), self.null_label, dtype=self.dtype, device=self.placement.device)
        return {"class_labels": labels}


class Unconditional(Conditioner):
    """No conditions."""

    kind = "none"

    def __call__(self, raw: Sequence[object]) -> Cond:
        return {}

    def null(self, size: int) -> Cond:
        return {}


def call_defaults(pipeline: "DiffusionPipeline", *names: str) -> dict[str, Any]:
    """Values that the pipeline's call passes on for missing arguments: encode_prompt's own defaults differ."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    return {name: parameters[name].default for name in names}
