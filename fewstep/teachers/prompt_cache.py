"""Prompts to conditions, each encoded once."""

from collections.abc import Callable, Sequence

import torch

from fewstep.errors import FewstepError
from fewstep.teachers.denoiser import Cond

CACHED = 4096
"""Prompts whose conditions are kept on the device, if they are small."""

CACHED_BYTES = 2**30
"""At most; T5's of 4096 prompts would take twenty times as much."""

Stored = Callable[[list[str]], Cond]
"""Conditions [B, ...] of B prompts, on the CPU, that were encoded earlier. Raises ValueError for a prompt that was not."""


class PromptCache:
    """Conditions of prompts by a pipeline's own encoding, so that padding, truncation and masks are those of sampling.

    Attributes:
        encode: B prompts to their conditions, each [B, ...].
        device: of the returned conditions.
        stored: if there is one, it is asked instead, and no prompt is encoded.
    """

    def __init__(self, encode: Callable[[list[str]], Cond], device: Callable[[], torch.device]) -> None:
        self.encode, self.device = encode, device
        self.stored: Stored | None = None
        self.known: dict[str, Cond] = {}

    def __call__(self, raw: Sequence[object]) -> Cond:
        """The conditions of B prompts. Raises ValueError for what is no text."""
        prompts = [prompt for prompt in raw if isinstance(prompt, str)]
        if len(prompts) < len(raw):
            wrong = next(prompt for prompt in raw if not isinstance(prompt, str))
            raise FewstepError(
                "data.source",
                f"condition {wrong!r}",
                "prompts, the teacher's conditions",
                "Set data.source to one with prompts",
            )
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.known]
        if new:
            encoded = self._encode(new)
            self.known |= {prompt: {key: v[i] for key, v in encoded.items()} for i, prompt in enumerate(new)}
        rows = [self.known[prompt] for prompt in prompts]
        cond = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        # What is stored can be read again at any time.
        limit = 0 if self.stored is not None else min(CACHED, CACHED_BYTES // sum(v.nbytes for v in rows[0].values()))
        while len(self.known) > limit:
            del self.known[next(iter(self.known))]
        return cond

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> Cond:
        if self.stored is None:
            return self.encode(prompts)
        return {key: v.to(self.device()) for key, v in self.stored(prompts).items()}

    def clear(self) -> None:
        self.known.clear()
