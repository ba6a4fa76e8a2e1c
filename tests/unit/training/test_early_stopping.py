"""The end of a run whose scores have stopped to get better."""

import math

import pytest
from pydantic import ValidationError
from safetensors.torch import load_file

from builders.consistency import config, consistency
from builders.trainer import assert_equal, make
from fewstep.config import ScoreConfig
from fewstep.teachers import load_teacher
from fewstep.training.early_stopping import EarlyStopping


def ends_at(patience, scores):
    """The place of the score after which it is over; None = it never is."""
    for i, score in enumerate(scores, 1):
        patience.add(score, 10 * i)
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
    assert ends_at(EarlyStopping(2), scores) == end
    assert ends_at(EarlyStopping(None), scores) is None


def test_the_last_stage_is_measured_by_itself():
    """Scores of earlier stages, up to the last one's first iteration, neither end the run nor have to be reached again."""
    assert ends_at(EarlyStopping(2), [1, 9, 8, 7, 6]) == 3
    assert ends_at(EarlyStopping(2, start=20), [1, 9, 8, 7, 6]) is None
    assert ends_at(EarlyStopping(2, start=20), [1, 2, 3, 4, 5]) == 5


def test_goes_on_from_its_state():
    first, rest = EarlyStopping(2), EarlyStopping(2)
    assert ends_at(first, [5, 6]) is None
    rest.load_state(first.state())
    assert rest == first and ends_at(rest, [7]) == 1


@pytest.mark.parametrize(
    ("held", "score", "iteration", "beats"),
    [
        ({}, 9.0, 10, True),
        ({}, math.nan, 10, False),
        ({"fid": 1.0, "iteration": 10}, 2.0, 20, False),  # both of earlier stages: the better one
        ({"fid": 1.0, "iteration": 10}, 0.5, 20, True),
        ({"fid": 1.0, "iteration": 20}, 9.0, 21, True),  # the first of the last stage
        ({"fid": 1.0, "iteration": 20}, math.nan, 21, False),
        ({"fid": 9.0, "iteration": 21}, 9.5, 30, False),
        ({"fid": 9.0, "iteration": 21}, 8.5, 30, True),
    ],
)
def test_the_best_is_of_the_last_stage(held, score, iteration, beats):
    assert EarlyStopping(None, start=20).improves(score, iteration, held) is beats


def test_weights_of_an_earlier_stage_are_not_exported_for_a_later_one(tiny_sd, tmp_path, monkeypatch):
    """Stages of 2 and 4 iterations, of which the second costs FID: its own best is exported, also by a resumed run."""
    fids = {1: 3.0, 2: 2.0, 3: 9.0, 4: 7.0, 5: 8.0, 6: 8.0}
    changes = {
        "method": {"stages": [{"iterations": 2}, {"lr": 1e-4}]}, "train": {"ema_decay": 0.5},
        "checkpoint": {"keep": 9, "every": 1},
        "score": {"every": 1, "steps": 1, "num_images": 8},
    }  # fmt: skip
    running = []

    def scripted(*_):
        return {"fid": fids[running[-1].iteration], "clip_score": None, "images": 8}

    monkeypatch.setattr("fewstep.training.validation.small_scores", scripted)

    def trained(folder, until, resume=None):
        running.append(make(tiny_sd, folder, max_iterations=until, **changes))
        if resume:
            running[-1].resume(str(folder / "checkpoints" / resume))
        assert running[-1].fit()
        return running[-1]

    def exported(trainer):
        return {key: value.clone() for key, value in trainer.exported_weights().state_dict().items()}

    stopped = trained(tmp_path / "stopped", 2)  # only the first stage was scored
    assert stopped.progress.best == {"fid": 2.0, "iteration": 2}
    assert_equal(exported(stopped), load_file(tmp_path / "stopped" / "checkpoints" / "2" / "ema.safetensors"))
    whole = trained(tmp_path / "whole", 6)
    assert whole.progress.best == {"fid": 7.0, "iteration": 4}
    best = exported(whole)
    assert_equal(best, load_file(tmp_path / "whole" / "checkpoints" / "4" / "ema.safetensors"))
    for start in ("2", "3"):
        again = trained(tmp_path / "whole", 6, start)
        assert again.progress.best == whole.progress.best
        assert_equal(exported(again), best)


def test_stages_tell_when_the_last_begins(tiny_sd):
    stages = (dict(iterations=30), dict(iterations=12), dict())
    teacher = load_teacher(str(tiny_sd))
    assert consistency(config(stages=stages), teacher).last_stage == 42
    assert consistency(config(), teacher).last_stage == 0


def test_needs_scores():
    with pytest.raises(ValidationError, match="with every 0"):
        ScoreConfig(patience=3)
