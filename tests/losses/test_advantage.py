"""Group advantages against a loop over groups; [16] uneven groups, forks and failures. The penalty for length."""

import statistics

from hypothesis import given, settings, strategies as st
import jax
import numpy as np
import pytest

from glm5_jax import losses
from glm5_jax.losses.advantage import group_advantage, overlong_penalty, rloo_advantage
from tests.losses import reference

few = settings(max_examples=20)


@pytest.fixture(autouse=True, scope="module")
def wide():
    with reference.float64(True):
        yield


@st.composite
def groups(draw, size=9):
    """Rewards, group ids and validity of rollouts: groups uneven and in any order, a failed one with reward NaN."""
    rewards = draw(st.lists(st.sampled_from([0.0, 1.0, 0.1, -2.5, 1 / 3]), min_size=size, max_size=size))
    ids = draw(st.lists(st.sampled_from([-7, 0, 3, 10 ** 9]), min_size=size, max_size=size))
    valid = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    return np.where(valid, rewards, np.nan), np.array(ids), np.array(valid)


def by_loop(reward, group, valid, baseline):
    found = []
    for i, (r, g) in enumerate(zip(reward, group)):
        members = [reward[j] for j in range(len(reward)) if group[j] == g and valid[j]]
        others = [reward[j] for j in range(len(reward)) if group[j] == g and valid[j] and j != i]
        found.append(baseline(r, members, others) if valid[i] else 0.0)
    return found


BASELINES = {
    "std": (group_advantage,
            lambda r, members, _: (r - statistics.fmean(members)) / (statistics.pstdev(members) + 1e-6)),
    "mean": (lambda *x, **y: group_advantage(*x, std=False, **y), lambda r, members, _: r - statistics.fmean(members)),
    "others": (rloo_advantage, lambda r, _, others: r - statistics.fmean(others) if others else 0.0),
}


@pytest.mark.parametrize("function, baseline", BASELINES.values(), ids=BASELINES)
@few
@given(groups())
def test_16_advantages_by_loop(function, baseline, drawn):
    reward, group, valid = drawn
    found = np.asarray(function(reward, group, valid_N=valid))
    np.testing.assert_allclose(found, by_loop(reward, group, valid, baseline), atol=1e-9)


@pytest.mark.parametrize("function", [group_advantage, rloo_advantage])
@few
@given(groups(), st.integers(0, 8), st.sampled_from([np.nan, np.inf, 100.0]))
def test_16_a_failed_rollout_moves_no_other(function, drawn, place, reward_of_failure):
    reward, group, valid = drawn
    reward, valid = np.insert(reward, place, reward_of_failure), np.insert(valid, place, False)
    with_failure = np.asarray(function(reward, np.insert(group, place, group[0]), valid_N=valid))
    without = np.asarray(function(np.delete(reward, place), group, valid_N=np.delete(valid, place)))
    np.testing.assert_allclose(np.delete(with_failure, place), without, atol=1e-12)
    assert with_failure[place] == 0


def test_16_a_failure_that_counts_as_reward_0_would_move_the_others():
    reward, group, valid = np.full(10, np.nan), np.zeros(10, int), np.arange(10) < 2
    reward[:2] = 1.0, 0.5
    excluded = group_advantage(reward, group, valid_N=valid)
    as_zero = group_advantage(np.nan_to_num(reward), group)
    assert abs(np.asarray(excluded - as_zero)[0]) > 0.1


def test_16_forks_share_the_advantage_of_their_rollout():
    reward, group = np.array([1.0, 0, 0] * 3), np.repeat([5, 6, 7], 3)
    rollout_of_trace = np.array([0, 0, 1, 2, 3, 4, 5, 6, 7, 8])
    of_traces = np.asarray(group_advantage(reward, group))[rollout_of_trace]
    np.testing.assert_allclose(of_traces, np.array([2, 2, -1, -1, 2, -1, -1, 2, -1, -1]) / 3 / (np.sqrt(2) / 3 + 1e-6))
    counted_twice = np.asarray(group_advantage(reward[rollout_of_trace], group[rollout_of_trace]))
    assert abs(counted_twice - of_traces)[:4].max() > 0.1 > abs(counted_twice - of_traces)[4:].max()


@pytest.mark.parametrize("function", [group_advantage, rloo_advantage])
@pytest.mark.parametrize("wide", [False, True])
def test_equal_rewards_have_advantages_of_exactly_0(function, wide):
    group = np.repeat(np.arange(4), [1, 2, 3, 4])
    with reference.float64(wide):
        for reward in (0.1, 1 / 3, -1e-3, 1e6):
            assert not np.asarray(function(reward * (1 + group), group)).any()
    assert sum([0.1] * 3) / 3 != 0.1  # what a plain mean would leave


@pytest.mark.parametrize("function", [group_advantage, rloo_advantage])
def test_15_order_does_not_matter(function):
    rng = np.random.default_rng(0)
    reward, group, order = rng.normal(size=10), rng.integers(0, 3, 10), rng.permutation(10)
    np.testing.assert_allclose(function(reward[order], group[order]), np.asarray(function(reward, group))[order],
                               atol=1e-12)


def test_groups_of_64_bits_stay_apart():
    hashes = np.array([0, 2 ** 32, 0, 2 ** 32])  # of equal lower halves
    with reference.float64(False):
        found = group_advantage(np.array([1.0, 2, 3, 6]), hashes, std=False)
    assert found.tolist() == [-1, -2, 1, 2]


def test_it_compiles():
    reward, group, valid = np.array([1.0, 0.0, 5.0]), np.array([3, 3, 3]), np.array([True, True, False])
    np.testing.assert_allclose(jax.jit(group_advantage)(reward, group, valid_N=valid), [1, -1, 0], atol=1e-5)


def test_float32_by_default():
    with reference.float64(False):
        assert group_advantage(np.array([1, 0]), np.array([0, 0])).dtype == np.float32
        assert group_advantage([1.0, 0.0], [5, 5]).tolist() == pytest.approx([1, -1], rel=1e-5)


@pytest.mark.parametrize("change, message", [
    (dict(reward_N=np.zeros((2, 2))), r"reward_N: expected shape \[N\], found \(2, 2\)"),
    (dict(group_N=np.zeros(3, int)), r"group_N: expected integers of shape \(2,\), found int64 of shape \(3,\)"),
    (dict(group_N=np.zeros(2)), "group_N: expected integers of .* found float64"),
    (dict(valid_N=np.ones(2)), "valid_N: expected bool of .* found float64"),
])
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        group_advantage(**{"reward_N": np.zeros(2), "group_N": np.zeros(2, int), **change})


def test_penalty_for_length():
    found = overlong_penalty(np.array([0, 80, 81, 90, 99, 100, 500]), limit=100, buffer=20)
    np.testing.assert_allclose(found, [0, 0, -0.05, -0.5, -0.95, -1, -1], atol=1e-7)
    for buffer in (0, 101):
        with pytest.raises(ValueError, match=f"buffer: expected 1 to 100 tokens, the limit, found {buffer}"):
            overlong_penalty(np.array([1]), limit=100, buffer=buffer)


def test_it_is_public():
    assert losses.group_advantage is group_advantage and losses.rloo_advantage is rloo_advantage
