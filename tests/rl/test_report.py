"""The metrics of a step, by hand."""

import math

import pytest

from glm5_jax.core.metrics import collect, merge
from glm5_jax.records import Completion, Failure, Group, Trajectory, Turn
from glm5_jax.rl.report import engines, measure, Played, repetition, Since, staleness, Times, tokens, truncated
from glm5_jax.serve.generator import Totals


def rollout(id: str, versions: list[int], reward: float = 0.0, end: str = "done", task: str = "sums") -> Trajectory:
    completion = Completion([5] * len(versions), [-0.5] * len(versions), versions, "stop")
    turn = Turn([{"role": "user", "content": "?"}], {"role": "assistant", "content": ""}, (1,), completion,
                reward=reward)
    return Trajectory(id, task, 1, [turn], end, Failure("reward", "judge") if end == "failed" else None)


STEP_OF = {1: 0, 2: 1, 3: 2, 4: 1, 5: 2}  # steps 1 and 2 were lost once, and taken again


def step(*groups: Group, version: int = 3, **options) -> dict[str, float]:
    options = {"times": Times(waited=2.0, pushed=1.5, whole=8.0), "in_flight": 7, "queued": 5} | options
    return collect(measure(groups, version, STEP_OF, options.pop("since", Since()), **options))


def test_a_step_by_hand():
    played = {"a-0": Played(2, 4.0), "a-1": Played(1, 1.0), "b-0": Played(2, 1.0)}  # a-0 had a token before a restart
    since = Since(resumed=3, retried=6, sampled=[2, 4, 9], discarded=11, played=played)
    since.failed["environment"], since.dropped["stale"], since.dropped["timeout"] = 2, 1, 2
    found = step(
        Group("a", 3, [rollout("a-0", [1, 2, 3], 1.0), rollout("a-1", [2], 0.0), rollout("a-2", [1] * 9, end="failed")],
              repeats=[0]),
        Group("b", 2, [rollout("b-0", [5, 5], 1.0, task="maze"), rollout("b-1", [4, 5], 1.0, task="maze")]),
        since=since)
    expected = {
        "reward/mean": 3 / 4, "reward/sums": 1 / 2, "reward/maze": 1.0,
        "staleness/mean": (3 + 2 + 1 + 2) / 4, "staleness/max": 3,
        "staleness/tokens": (3 + 2 + 1 + 2 + 1 + 1 + 2 + 1) / 8,
        "staleness/policies": (3 + 1 + 1 + 2) / 4, "staleness/share_0": 0, "staleness/share_1": 1 / 4,
        "staleness/share_2": 2 / 4, "staleness/share_3": 1 / 4, "staleness/share_8_and_more": 0,
        "staleness/tokens_share_0": 0, "staleness/tokens_share_1": 4 / 8, "staleness/tokens_share_2": 3 / 8,
        "staleness/tokens_share_3": 1 / 8, "staleness/tokens_share_8_and_more": 0,
        "length/consumed": 8 / 4, "length/sampled": 5, "length/p50": 2, "length/p99": 2 + 0.97,
        "groups/no_spread": 1 / 2, "groups/all_0": 0, "groups/all_1": 1 / 2, "groups/accepted": 2 / 5,
        "groups/repeats": 1 / 2, "groups/in_flight": 7, "rollouts/queued": 5, "rollouts/resumed": 3,
        "rollouts/retried": 6, "trainer/idle": 0.25, "push/seconds": 1.5, "tokens/trained": 8, "tokens/per_second": 1.0,
        "tokens/per_second_of_longest": 1 / 2, "tokens/discarded": 11, "rollouts/failed/environment": 2,
        "rollouts/failed/reward": 0, "groups/dropped/stale": 1, "groups/dropped/timeout": 2, "groups/dropped/worker": 0}
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def turn_of(ids: list[int], stop: str) -> Turn:
    completion = Completion(ids, [-0.5] * len(ids), [1] * len(ids), stop)
    return Turn([{"role": "user", "content": "?"}], {"role": "assistant", "content": ""}, (1,), completion)


def test_engines_by_hand():
    before = Totals(seconds=10, busy=4, drawn=100, fed=50, reused=5, again=0)
    after = before + Totals(seconds=20, busy=15, drawn=300, fed=70, reused=30, again=10)
    assert collect(engines(before, after)) == pytest.approx({
        "engine/idle": 0.25, "engine/tokens_per_second": 15, "engine/cache_hit": 1 / 3, "engine/tokens_again": 10})
    assert engines(after, after) == {}


def test_what_repeats_itself_and_what_was_cut_off():
    """Twelve tokens of a period of three have five runs of eight, three of them different; other turns do not count."""
    again, fresh = turn_of([1, 2, 3] * 4, "length"), turn_of([4, 5] * 3 + [6, 7, 8], "stop")
    both = Trajectory("a-0", "sums", 1, [again, fresh], "done")
    assert repetition(both) == 2 / 7 and truncated(both)
    assert repetition(rollout("a-0", [1] * 7)) == 0 and not truncated(rollout("a-0", [1]))
    assert truncated(rollout("a-0", [1], end="tokens"))


def test_the_last_bar_holds_all_that_is_staler():
    found = step(Group("a", 1, [rollout("a-0", [1, 1, 5])]), version=30)
    assert found["staleness/share_8_and_more"] == found["staleness/tokens_share_8_and_more"] == 1
    assert found["staleness/max"] == 30


def test_tokens_of_a_step_that_was_lost_are_ahead():
    one = rollout("a-0", [3])
    assert staleness(one, 0, STEP_OF) == -2 and tokens(one) == 1
    assert step(Group("a", 1, [one]), version=0)["staleness/share_0"] == 1


def test_rollouts_without_tokens():
    found = step(Group("a", 1, [rollout("a-0", [])]), times=Times(0.0, 0.0, 0.0))
    assert math.isnan(found["staleness/mean"]) and found["length/consumed"] == 0
    assert math.isnan(found["staleness/tokens_share_0"])
    assert Times(0.0, 0.0, 0.0).idle == 0 and Times(2.0, 1.0, 8.0).idle == 0.25


def test_what_nobody_has_measured():
    found = step(Group("a", 1, [rollout("a-0", [1])]))
    assert math.isnan(found["rollouts/retried"]) and math.isnan(found["tokens/per_second_of_longest"])


def test_steps_merge_exactly():
    """As if they had been one."""
    groups = [Group(name, 1, [rollout(f"{name}-0", [2] * length)]) for name, length in (("a", 1), ("b", 3), ("c", 8))]
    options = {"times": Times(1.0, 1.0, 4.0), "in_flight": 0, "queued": 0}
    one, two = (measure(part, 3, STEP_OF, Since(), **options) for part in (groups[:1], groups[1:]))
    merged = collect(merge(one, two))
    assert merged["length/consumed"] == 4 and merged["tokens/per_second"] == 12 / 8
    assert merged["staleness/max"] == 2
