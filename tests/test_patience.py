"""The end of a run whose scores have stopped to get better."""

import math

import pytest
from pydantic import ValidationError
from test_consistency import config

from fewstep.config import ScoreConfig
from fewstep.methods.consistency import Consistency
from fewstep.methods.consistency_config import StageConfig
from fewstep.patience import Patience
from fewstep.teachers import load_teacher


def ends_at(patience, scores):
    """The place of the score after which it is over; None = it never is."""
    for i, score in enumerate(scores, 1):
        patience.see(score, 10 * i)
        if patience.over:
            return i
    return None


@pytest.mark.parametrize(
    ("scores", "end"),
    [
        ([5, 4, 3, 2, 1], None),
        ([5, 6, 7], 3),
        ([5, 5, 5], 3),  # as good is no better
        ([5, 6, 4, 6, 3, 6], None),  # not in a row
        ([5, 4, 4.5, 4.1], 4),  # better than the last one is not better than the best
        ([5, math.nan, math.nan], 3),
    ],
)
def test_scores_in_a_row(scores, end):
    assert ends_at(Patience(2), scores) == end
    assert ends_at(Patience(None), scores) is None


def test_the_last_stage_is_measured_by_itself():
    """Scores of earlier stages, up to the last one's first iteration, neither end the run nor have to be reached again."""
    assert ends_at(Patience(2), [1, 9, 8, 7, 6]) == 3
    assert ends_at(Patience(2, start=20), [1, 9, 8, 7, 6]) is None
    assert ends_at(Patience(2, start=20), [1, 2, 3, 4, 5]) == 5


def test_goes_on_from_its_state():
    first, rest = Patience(2), Patience(2)
    assert ends_at(first, [5, 6]) is None
    rest.load_state(first.state())
    assert rest == first and ends_at(rest, [7]) == 1


def test_stages_tell_when_the_last_begins(tiny_sd):
    stages = (StageConfig(iterations=30), StageConfig(iterations=12), StageConfig())
    teacher = load_teacher(str(tiny_sd))
    assert Consistency(config(stages=stages), teacher).last_stage == 42
    assert Consistency(config(), teacher).last_stage == 0


def test_needs_scores():
    with pytest.raises(ValidationError, match="while every is 0"):
        ScoreConfig(patience=3)
