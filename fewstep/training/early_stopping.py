"""Which scores of a run count, and when they end it: a measure that it is not descending has stopped to get better."""

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Patience:
    """Counts scores in a row without a new best one, lower being better.

    Attributes:
        scores: how many are borne; None = any number.
        start: iteration up to which scores do not count: what an earlier stage could do, a later one has first to regain.
        best: the best of those that count, and the iteration it was taken at.
        waited: scores since.
    """

    scores: int | None
    start: int = 0
    best: float = math.inf
    best_at: int = 0
    waited: int = 0

    def counts(self, iteration: int) -> bool:
        """Whether it is one of the last stage, counted as in the log: after its update."""
        return iteration > self.start

    def beats(self, score: float, iteration: int, held: dict[str, float]) -> bool:
        """Whether a score's weights take the place of the best ones, `held` as {"fid", "iteration"}, or {} for none.

        A later stage makes another student: the first number that it scores replaces an earlier stage's, however low that is.
        """
        outdated = bool(held) and self.counts(iteration) and not self.counts(int(held["iteration"]))
        return score < (held["fid"] if held and not outdated else math.inf)

    def see(self, score: float, iteration: int) -> None:
        """A score that is not a number counts as one that is not better."""
        if not self.counts(iteration):
            return
        if score < self.best:
            self.best, self.best_at, self.waited = score, iteration, 0
        else:
            self.waited += 1

    @property
    def over(self) -> bool:
        return self.scores is not None and self.waited >= self.scores

    def state(self) -> dict[str, Any]:
        """What a resumed run goes on from; the settings are the config's."""
        kept = asdict(self)
        del kept["scores"], kept["start"]
        return kept

    def load_state(self, state: dict[str, Any]) -> None:
        self.best, self.best_at, self.waited = state["best"], state["best_at"], state["waited"]
