"""The endless shuffled order of a source, shared among the ranks and resumed exactly."""

from collections.abc import Iterator

import numpy as np

from fewstep.data.base import Raw, Source
from fewstep.errors import FewstepError


class Stream(Iterator[Raw]):
    """Micro-batches of one rank, from a global order that depends on seed and source alone.

    Every epoch is a permutation of the source drawn from (seed, epoch); epochs follow each other without a gap. A
    micro-batch of rank r is the r-th run of batch_size samples from `position`, which moves on by batch_size * world_size.
    """

    def __init__(self, source: Source, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if not 0 <= rank < world_size:
            raise FewstepError("rank", rank, f"0 to {world_size - 1}")
        self.source, self.batch_size, self.seed, self.rank, self.world_size = source, batch_size, seed, rank, world_size
        self.position = 0
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def __next__(self) -> Raw:
        raw = self.source.get(self._indices())
        # Last, so that a sample that cannot be read does not move the stream.
        self.position += self.batch_size * self.world_size
        return raw

    def next_indices(self) -> list[int]:
        """The indices of the next micro-batch, for a caller that needs no images or holds them already; moves the stream on."""
        indices = self._indices()
        self.position += self.batch_size * self.world_size
        return indices

    def _indices(self) -> list[int]:
        start = self.position + self.rank * self.batch_size
        return [self._index(i) for i in range(start, start + self.batch_size)]

    def state_dict(self) -> dict[str, int]:
        """Plain numbers, the same on every rank."""
        return {"position": self.position, "seed": self.seed, "length": len(self.source)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a state. Raises FewstepError for another seed or another number of samples."""
        for name, value in (("seed", self.seed), ("length", len(self.source))):
            if state[name] != value:
                raise FewstepError("resume", f"{name} {value} of the data", f"{state[name]}, as in the checkpoint")
        self.position = state["position"]

    def _index(self, global_position: int) -> int:
        epoch, offset = divmod(global_position, len(self.source))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.source))
        return int(self._order[offset])
