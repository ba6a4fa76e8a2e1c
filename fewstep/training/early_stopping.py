"""Early stopping on a score that training does not optimise."""

import math
from dataclasses import dataclass
from typing import TypedDict


class StoppingState(TypedDict):
    """State of early stopping in a checkpoint's state.json."""

    best: float
    best_at: int
    waited: int


@dataclass
class EarlyStopping:
    """Counts scores in a row without a new best one, lower being better.

    Attributes:
        patience: scores without a better one after which training ends; None = any number.
        start: iteration up to which scores do not count: a later stage has to regain first what an earlier one reached.
        best: the best of those that count, and the iteration it was taken at.
        waited: scores since.
    """

    patience: int | None
    start: int = 0
    best: float = math.inf
    best_at: int = 0
    waited: int = 0

    def counts(self, iteration: int) -> bool:
        """Whether a score belongs to the last stage, counted as in the log: after its update."""
        return iteration > self.start

    def improves(self, score: float, iteration: int, held: dict[str, float]) -> bool:
        """Whether a score's weights replace the best ones, `held` as {"fid", "iteration"}, or {} for none.

        The first number that the last stage scores replaces an earlier stage's, however low that is: it is another student.
        """
        outdated = bool(held) and self.counts(iteration) and not self.counts(int(held["iteration"]))
        return score < (held["fid"] if held and not outdated else math.inf)

    def add(self, score: float, iteration: int) -> None:
        """Count a score; one that is not a number counts as one that is not better."""
        if not self.counts(iteration):
            return
        if score < self.best:
            self.best, self.best_at, self.waited = score, iteration, 0
        else:
            self.waited += 1

    @property
    def over(self) -> bool:
        return self.patience is not None and self.waited >= self.patience

    def state(self) -> StoppingState:
        """The state from which a resumed run continues; the settings are the config's."""
        return {"best": self.best, "best_at": self.best_at, "waited": self.waited}

    def load_state(self, state: StoppingState) -> None:
        self.best, self.best_at, self.waited = state["best"], state["best_at"], state["waited"]
