"""More trajectories than samples in a batch: every batch draws others, each goes on by itself."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from builders.consistency import batch_for, config, consistency, nets_for, sections
from builders.states import FREE, TIMES, advance, fresh, imageless, onwards
from fewstep.methods.consistency.pool import Pool, Replay
from fewstep.methods.registry import settings_class
from fewstep.teachers import load_teacher

BATCH, SIZE = 12, 60


def turns(pool, count, first=0):
    """States of `count` iterations; every fresh sample has a tag of its own."""
    for turn in range(first, first + count):
        at = pool.draw(advance, TIMES, fresh(BATCH, turn))
        cond = {key: v.clone() for key, v in at.cond.items()}
        yield SimpleNamespace(x=at.x.clone(), index=pool.index.clone(), cond=cond, scale=at.guidance_scale)
        pool.move(onwards(pool), fresh(BATCH, 1000 + turn))


def seen(states):
    """Tag of a sample -> its states, (index, x), in order."""
    found: dict[int, list[tuple[int, torch.Tensor]]] = {}
    for at in states:
        for tag, index, x in zip(at.cond["tag"].tolist(), at.index.tolist(), at.x, strict=True):
            found.setdefault(tag, []).append((index, x))
    return found


def test_every_trajectory_goes_on_by_itself():
    """By one step of the teacher, segment for segment to the last, whenever it is drawn; with its own conditions and scale."""
    torch.manual_seed(0)
    states = list(turns(Replay(8, SIZE), 200))
    for at in states:
        tags = at.cond["tag"]
        assert len(tags.unique()) == BATCH
        words = torch.stack([fresh(BATCH, int(tag) // 100).cond["words"][int(tag) % 100] for tag in tags])
        assert torch.equal(at.cond["words"], words)
        assert torch.equal(at.scale, (tags // 100).float())
    whole = [track for track in seen(states).values() if track[0][0] == 39]
    assert len(whole) > 100
    for track in whole:
        segments = [index // 5 for index, _ in track[1:]]
        assert segments == [7, 6, 5, 4, 3, 2, 1, 0][: len(segments)]
        for (i, x), (j, y) in pairwise(track):
            assert torch.allclose(advance(x[None], None, [i], [j]), y[None])


def test_batches_are_of_other_samples_and_of_all_segments():
    torch.manual_seed(0)

    def shared(states):
        tags = [set(at.cond["tag"].tolist()) for at in states]
        return sum(len(a & b) for a, b in pairwise(tags)) / (len(tags) - 1)

    pool = Replay(8, SIZE)
    list(turns(pool, 5))
    states = list(turns(pool, 300, first=5))
    assert shared(states) == pytest.approx(BATCH**2 / SIZE * 8 / 9, rel=0.1)  # a ninth of the drawn have begun anew
    assert shared(turns(Pool(8), 100)) == pytest.approx(BATCH * 8 / 9, rel=0.1)
    index = torch.cat([at.index for at in states])
    start = (index == 39).float().mean().item()
    parts = torch.histc(index[index < 39].float() // 5, 8, 0, 7) / len(index)
    # The noisiest point is every trajectory's start and a fifth of its first segment.
    assert start == pytest.approx(1 / 9 + 1 / 45, abs=0.02)
    assert parts[:7].tolist() == pytest.approx([1 / 9] * 7, abs=0.02)


def test_evaluations_are_spent_at_the_start_alone():
    counted: list[int] = []

    def counting(x, rows, before, after):
        counted.append(len(after))
        return advance(x, rows, before, after)

    pool = Replay(8, 30)
    for turn, sizes in enumerate([12, 24, 30, 30, 30]):
        counted.clear()
        pool.draw(counting, TIMES, fresh(BATCH, turn))
        assert pool.kept is not None and len(pool.kept) == sizes
        assert sum(counted) == (sum(i % 9 for i in range(BATCH)) if turn < 3 else 0)
        pool.move(onwards(pool), fresh(BATCH, turn))
    pool.draw(lambda x, *_: x, TIMES[1::2], fresh(BATCH))  # another stage's grid
    assert pool.kept is not None and len(pool.kept) == BATCH and pool.kept_at[0].max() == 19


@pytest.mark.parametrize("before", [1, 7])  # while trajectories are still begun, and after
def test_goes_on_from_its_state(before):
    torch.manual_seed(0)
    pool, rest = Replay(8, SIZE), Replay(8, SIZE)
    list(turns(pool, before))
    rest.load_state_dict({key: v.clone() for key, v in pool.state_dict().items()})
    random = torch.get_rng_state()
    whole = list(turns(pool, 12, first=before))
    torch.set_rng_state(random)
    for a, b in zip(whole, turns(rest, 12, first=before), strict=True):
        assert torch.equal(a.x, b.x) and torch.equal(a.index, b.index) and torch.equal(a.cond["words"], b.cond["words"])


def test_a_loss_resumes(tiny_sd):
    """The method's own state gives the same losses to the bit, and is of as many trajectories as are kept."""
    teacher = load_teacher(str(tiny_sd))
    one, other = (consistency(config(**FREE, target_decay=None, replay=10), teacher) for _ in range(2))
    nets, batch = nets_for(one), imageless(teacher)
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(3):
            one.loss(nets, batch)
        state = one.state()
        other.load_state({key: v.clone() for key, v in state.items()})
        random = torch.get_rng_state()
        losses = [one.loss(nets, batch).losses["consistency"] for _ in range(3)]
        torch.set_rng_state(random)
        assert [other.loss(nets, batch).losses["consistency"] for _ in range(3)] == losses
    assert {len(v) for key, v in state.items() if key != "times"} == {10}


@pytest.mark.parametrize("kind", ["noised_data", "sampled_trajectories"])
def test_impossible(kind):
    """Only pools of trajectories have the key."""
    with pytest.raises(ValidationError, match="replay"):
        settings_class("pcm").model_validate(sections(**FREE) | {"states": {"kind": kind, "replay": 8}})


def test_fewer_trajectories_than_samples(tiny_sd):
    teacher = load_teacher(str(tiny_sd))
    method = consistency(config(**FREE, target_decay=None, replay=3), teacher)
    with pytest.raises(ValueError, match=r"method\.states\.replay: found 3; expected at least a batch's 4 samples"):
        method.loss(nets_for(method), batch_for(teacher))
