import dataclasses
import functools

import pytest

from glm5_jax.records import from_json, to_json
from glm5_jax.rewards.flags import LOOK, Finding, Flag, Limits, flags
from glm5_jax.rewards.monitor import Agreement, Figures, Snapshot
from tests.rewards import optimisation

SEEDS = range(5)
# The reward of correctness is 1 throughout, and rightly found to be so.
FACT = (Finding.SATURATED, "fact")


@functools.cache
def simulated(reward, seed):
    return optimisation.run(reward, seed)


def found(history):
    return {(flag.finding, flag.scorer) for flag in flags(history)} - {FACT}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_reward_that_counts_a_word_is_flagged(seed):
    history = simulated(optimisation.thorough, seed)
    assert optimisation.rise(history, "planted") > 0.2
    (flag,) = [one for one in flags(history) if one.finding is Finding.DIVERGES]
    assert (flag.scorer, flag.evidence["witness"]) == ("planted", "witness")
    assert flag.evidence["rise"] >= 0.1 and flag.evidence["witness_rise"] <= 0.25 * flag.evidence["rise"]
    assert "read the replies" in flag.look


@pytest.mark.parametrize("seed", SEEDS)
def test_a_reward_of_length_is_flagged(seed):
    """It may pass for a while: fitting openings are words too, and so even the witness rises."""
    assert {finding for finding, scorer in found(simulated(optimisation.long, seed)) if scorer == "planted"} & {
        Finding.LENGTH, Finding.DIVERGES}


@pytest.mark.parametrize("seed", SEEDS)
def test_an_honest_reward_that_rises_as_much_is_not(seed):
    history = simulated(optimisation.honest, seed)
    assert optimisation.rise(history, "planted") > 0.2
    assert not found(history)


def test_the_honest_and_the_planted_rise_alike():
    honest, planted = (sum(optimisation.rise(simulated(reward, seed), "planted") for seed in SEEDS) / len(SEEDS)
                       for reward in (optimisation.honest, optimisation.thorough))
    assert abs(honest - planted) < 0.05


def test_a_reward_that_says_nothing_is_flagged():
    assert found(simulated(optimisation.nothing, 0)) == {(Finding.EVEN, "total"), (Finding.EVEN, "planted")}


# Histories made by hand

TONE = Figures("tone", "tone", 1.0, mean=0.3, spread=0.2, even=0.1, saturated=0.0, noise=0.0, length=0.0)
WITNESS = dataclasses.replace(TONE, scorer="witness", weight=0.0)


def snapshot(step, words=10.0, repeated=0.0, witness=None, **tone):
    witness = dataclasses.replace(WITNESS, **(witness or {}))
    return Snapshot(step, 64, words, repeated, [dataclasses.replace(TONE, **tone), witness],
                    [Agreement("tone", "witness", 0.4)])


def history(change, steps=12):
    """Of `steps` steps; `change(i)` is what is special in the i-th."""
    return [snapshot(10 * i, **change(i)) for i in range(steps)]


def test_a_quiet_history_has_no_flags():
    assert flags(history(lambda i: {})) == () == flags([])


@pytest.mark.parametrize("change, finding, step", [
    (lambda i: {"even": 0.95 if i >= 3 else 0.5}, Finding.EVEN, 70),
    (lambda i: {"saturated": 0.95, "even": 0.95}, Finding.SATURATED, 40),
    (lambda i: {"noise": 0.11}, Finding.NOISE, 40),
    (lambda i: {"repeated": 0.026 * i}, Finding.REPEATS, 100),
    (lambda i: {"words": 10.0 + i, "length": 0.6}, Finding.LENGTH, 90),
    (lambda i: {"mean": 0.3 + 0.02 * i}, Finding.DIVERGES, 90),
    (lambda i: {"mean": 0.3 + 0.02 * i, "witness": {"mean": 0.3 + 0.004 * i}}, Finding.DIVERGES, 90),
])
def test_one_flag_where_a_limit_is_first_crossed(change, finding, step):
    (flag,) = flags(history(change))
    assert (flag.finding, flag.step, flag.look) == (finding, step, LOOK[finding])
    assert all(name == "witness" or isinstance(value, float) for name, value in flag.evidence.items())


@pytest.mark.parametrize("change", [
    lambda i: {"mean": 0.3 + 0.02 * i, "witness": {"mean": 0.3 + 0.006 * i}},  # confirmed
    lambda i: {"witness": {"mean": 0.3 - 0.02 * i}},  # what does not rise is not asked about
    lambda i: {"words": 10.0 + i, "length": 0.4},
    lambda i: {"words": 10.0, "length": 0.9},
    lambda i: {"repeated": 0.5},
    lambda i: {"noise": 0.09},
    lambda i: {"spread": None, "even": None, "noise": None, "length": None},
    lambda i: {"witness": {"even": 1.0, "saturated": 1.0, "noise": 1.0}},  # what is held out teaches nothing anyway
    lambda i: {"even": 1.0 if i == 7 else 0.0},  # a single step
])
def test_no_flag_within_the_limits(change):
    assert flags(history(change)) == ()


def test_a_witness_of_another_dimension_says_nothing():
    assert flags(history(lambda i: {"mean": 0.3 + 0.02 * i, "witness": {"dimension": "quality"}})) == ()


def test_every_finding_counts_once_and_every_witness():
    def two(i):
        one = snapshot(i, mean=0.05 * i, even=1.0)
        return dataclasses.replace(one, scorers=(*one.scorers, dataclasses.replace(WITNESS, scorer="other")))

    found = flags([two(i) for i in range(12)])
    assert [(flag.finding, flag.step, flag.evidence.get("witness")) for flag in found] == [
        (Finding.EVEN, 4, None), (Finding.DIVERGES, 9, "witness"), (Finding.DIVERGES, 9, "other")]
    assert found[1].evidence["correlation"] == pytest.approx(0.4) and found[2].evidence["correlation"] is None


def test_a_window_more_or_less():
    assert flags(history(lambda i: {"mean": 0.1 * i}, steps=9)) == ()
    assert flags(history(lambda i: {"mean": 0.1 * i}, steps=9), Limits(window=4))
    with pytest.raises(ValueError, match="Limits.window: expected more than 0, found 0"):
        Limits(window=0)


def test_a_flag_is_a_record():
    (flag,) = flags(history(lambda i: {"noise": 0.2}))
    assert from_json(Flag, to_json(flag)) == flag and flag.evidence == pytest.approx({"noise": 0.2, "spread": 0.2})
