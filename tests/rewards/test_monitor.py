import asyncio
import json
import math

import numpy as np
import pytest

from glm5_jax.core.metrics import JsonlWriter, collect, merge
from glm5_jax.records import from_json, to_json
from glm5_jax.rewards.base import Dimension
from glm5_jax.rewards.blend import Blend, Weighted, Weights, score
from glm5_jax.rewards.monitor import Snapshot, as_metrics, observe
from tests.rewards.episodes import Says, episode

# Two groups of three replies and one of one: (seed, reply, tone, witness).
REPLIES = [(1, "a", 0.0, 0.2), (1, "a", 1.0, 0.2), (1, "a b c", 1.0, 0.8),
           (2, "x y x y x y", 1.0, 0.5), (2, "x", 1.0, 0.6), (2, "y", 1.0, 0.7), (3, "z", 0.5, 0.9)]


def scored(replies, weights=Weights(0.5, 1.0, 0.0)):
    told = {f"t{i}": one for i, one in enumerate(replies)}
    blend = Blend((Weighted(Says("fact", Dimension.CORRECTNESS, 1)),
                   Weighted(Says("tone", Dimension.TONE, lambda one: told[one.id][2])),
                   Weighted(Says("witness", Dimension.TONE, lambda one: told[one.id][3]), 0)), weights)
    episodes = [episode(text, seed=seed, id=id) for id, (seed, text, *_) in told.items()]
    return list(zip(episodes, asyncio.run(score(blend, episodes))))


@pytest.fixture(scope="module")
def snapshot():
    return observe(4, scored(REPLIES))


def named(snapshot, name):
    return next(one for one in snapshot.scorers if one.scorer == name)


def test_a_step_by_hand(snapshot):
    assert (snapshot.step, snapshot.replies, snapshot.words) == (4, 7, 14 / 7)
    assert snapshot.repeated == pytest.approx((2 / 4) / 7)  # xyx yxy xyx yxy
    tone = named(snapshot, "tone")
    assert (tone.dimension, tone.weight, tone.even) == ("tone", 1, 1 / 2)
    assert tone.mean == pytest.approx(5.5 / 7) and tone.saturated == 5 / 7
    # Deviations of the first group: -2/3, 1/3, 1/3; the second has none, and the group of one does not count.
    assert tone.spread == pytest.approx(math.sqrt((4 + 1 + 1) / 9 / 6))
    assert tone.noise == pytest.approx(0.5)  # of the two "a", 0 and 1
    assert named(snapshot, "witness").noise == 0 and named(snapshot, "witness").weight == 0


def test_correlations_are_those_within_groups(snapshot):
    """Of the values less their group's mean, as NumPy correlates them."""
    words, tone, witness = (np.array(column, float) for column in (
        [1, 1, 3, 6, 1, 1, 1], [one[2] for one in REPLIES], [one[3] for one in REPLIES]))
    for part in (slice(0, 3), slice(3, 6), slice(6, 7)):
        for values in (words, tone, witness):
            values[part] -= values[part].mean()
    assert named(snapshot, "tone").length == pytest.approx(np.corrcoef(tone, words)[0, 1])
    (agreement,) = snapshot.agreements
    assert (agreement.scorer, agreement.witness) == ("tone", "witness")
    assert agreement.correlation == pytest.approx(np.corrcoef(tone, witness)[0, 1])


def test_a_level_of_a_group_is_no_signal():
    """Values that differ between the problems alone have no spread, and correlate with nothing."""
    found = observe(0, scored([(seed, "a" * i, seed / 10, 0.5) for seed in range(4) for i in range(3)]))
    tone = named(found, "tone")
    assert (tone.spread, tone.even, tone.length) == (0, 1, None)
    assert found.agreements[0].correlation is None


def test_the_total_saturates_at_its_own_most():
    replies = [(1, "a", 1.0, 0), (1, "b", 0.9, 0)]
    assert named(observe(0, scored(replies)), "total").saturated == 0.5
    assert named(observe(0, scored(replies, Weights(3, 0.1, 0))), "total").saturated == 1.0


def test_what_nothing_shows_is_not_counted():
    found = observe(0, scored([(1, "a", 0.2, 0.1), (2, "b", 0.3, 0.1)]))
    tone = named(found, "tone")
    assert (tone.spread, tone.even, tone.noise, tone.length) == (None, None, None, None)
    assert math.isnan(collect(as_metrics(found))["reward/tone/spread"])


def test_a_snapshot_is_a_record(snapshot):
    assert from_json(Snapshot, to_json(snapshot)) == snapshot


def test_metrics_reach_their_file_and_merge_by_replies(tmp_path, snapshot):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write(4, collect(as_metrics(snapshot)))
    writer.close()
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row["step"] == 4 and row["reward/words"] == 2
    assert row["reward/tone/mean"] == pytest.approx(5.5 / 7)
    assert row["reward/total/mean"] == pytest.approx(0.5 + 5.5 / 7)
    assert row["reward/tone/agrees_with/witness"] == pytest.approx(snapshot.agreements[0].correlation)
    more = observe(5, scored([(9, "a", 0.0, 0.0)]))
    both = collect(merge(as_metrics(snapshot), as_metrics(more)))
    assert both["reward/tone/mean"] == pytest.approx(5.5 / 8)
    assert both["reward/tone/spread"] == pytest.approx(named(snapshot, "tone").spread)


def test_what_cannot_be_observed():
    with pytest.raises(ValueError, match="step 3: expected trajectories with their scores, found none"):
        observe(3, [])
    fewer = Blend((Weighted(Says("fact", Dimension.CORRECTNESS, 1)),), Weights(1, 0, 0))
    other = episode("a", id="odd")
    with pytest.raises(ValueError, match=r"step 3, trajectory odd: expected scores of \['fact', 'tone', 'witness'\]"):
        observe(3, [*scored(REPLIES), (other, asyncio.run(score(fewer, [other]))[0])])
