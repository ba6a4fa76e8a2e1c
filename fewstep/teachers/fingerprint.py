"""Names for what a teacher makes of prompts and of images, by which kept encodings are found again."""

from collections.abc import Iterable, Sequence

from torch import nn

from fewstep import io
from fewstep.teachers.base import Teacher

SAMPLES = 64
"""Weights of each tensor that are looked at: training changes all of a tensor, and all of T5 takes long to read."""

PROBE = "A photo of 12 cats, isn't it? (4k)"
"""Tokenizers that encode this identically count as the same."""


def text_identity(teacher: Teacher) -> str:
    """32 hexadecimal digits that change with whatever `Teacher.condition` makes of prompts.

    All parts of the teacher have to be in memory, in float32.
    """
    components = teacher.pipeline.components
    tokenizers = [v for k, v in sorted(components.items()) if k.startswith("tokenizer") and v is not None]
    read = [str((t.model_max_length, list(t(PROBE, truncation=True).input_ids))) for t in tokenizers]
    return _digest(
        [
            type(teacher.pipeline).__name__,
            str(teacher.image_size),
            *read,
            *_weights(teacher, teacher.placement.text_parts),
        ]
    )


def image_identity(teacher: Teacher) -> str:
    """32 hexadecimal digits that change with whatever `Teacher.encode` makes of images; see `text_identity`."""
    parts = [teacher.pipeline.components[name] for name in teacher.placement.image_parts]
    scales = [str((p.config.get("scaling_factor"), p.config.get("shift_factor"))) for p in parts]
    shape = str((teacher.latent_shape, teacher.image_size))
    return _digest([shape, *scales, *_weights(teacher, teacher.placement.image_parts)])


def text_key(prompt: str) -> str:
    return _digest([prompt])


def _weights(teacher: Teacher, names: Sequence[str]) -> list[str]:
    """Fingerprint of each part by name: its class, and its weights whatever they are called, for libraries rename them."""
    parts = [(n, teacher.pipeline.components[n]) for n in sorted(names)]
    return [f"{n} {_of_module(p)}" for n, p in parts if p is not None]


def _of_module(module: nn.Module) -> str:
    found = []
    for p in module.parameters():
        flat = p.detach().flatten()
        some = flat[:: max(1, len(flat) // SAMPLES)].float().cpu().numpy().tobytes()
        found.append(f"{tuple(p.shape)} {io.blake2b(some, 16).hex()}")
    return _digest(sorted(found))


def _digest(parts: Iterable[str]) -> str:
    return io.blake2b_of_parts(parts, 16)
