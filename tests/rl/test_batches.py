"""Packed rows of groups against the rollouts one by one: tokens, advantages, and the loss that comes of them."""

import collections
import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.losses import advantage, policy
from glm5_jax.records import Completion, Failure, Group, Trajectory, Turn, extend
from glm5_jax.rl import batches

GROUP_MEAN = functools.partial(advantage.group_advantage, std=False)


def say(role: str, text: str) -> dict:
    return {"role": role, "content": text}


def sampled(ids, version: int) -> Completion:
    return Completion(ids, [-0.01 * id for id in ids], [version] * len(ids), "stop")


def rollout(name: str, reward: float, *ids: int, version: int = 3) -> Trajectory:
    turn = Turn([say("user", "a")], say("assistant", name), prompt=(1, 2), completion=sampled(ids, version),
                reward=reward)
    return Trajectory(name, "sums", 1, [turn], "done")


def forked(name: str, reward: float) -> Trajectory:
    """Three contexts of 2 + 1, 2 and 1 new tokens: a turn, one that extends it, a fork of it, and a fresh start."""
    a, b = say("user", "a"), say("user", "b")
    first = Turn([a], say("assistant", "x"), prompt=(1, 2), completion=sampled((31, 41), 2))
    second = extend([first], [a, first.reply, b], say("assistant", "y"), prompt=(1, 2, 31, 41, 5),
                    completion=sampled((61,), 3))
    third = extend([first, second], [a, first.reply, say("user", "c")], say("assistant", "z"),
                   prompt=(1, 2, 31, 41, 7), completion=sampled((81, 91), 3))
    fourth = extend([first, second, third], [b], say("assistant", "w"), prompt=(5,), completion=sampled((66,), 4),
                    reward=reward)
    return Trajectory(name, "sums", 1, [first, second, third, fourth], "done")


def failed(name: str) -> Trajectory:
    return Trajectory(name, "sums", 1, [], "failed", Failure("worker", "w"))


GROUPS = [Group("g0", 3, [rollout("a", 1.0, 11, 12, 13, version=2), rollout("b", 0.0, 14), forked("c", 0.5)]),
          Group("g1", 4, [rollout("d", 2.0, 21), failed("e"), forked("f", 0.0), rollout("h", 1.0, 22, 23)], [2])]


def token_terms(member: Trajectory, value: float) -> list[float]:
    """GRPO's term of each sampled token where r = exp(id / 100)."""
    ratios = [math.exp(0.01 * id) for turn in member.turns for id in turn.completion.ids]
    return [min(r * value, min(max(r, 0.8), 1.28) * value) for r in ratios]


def reference(groups, aggregation: str) -> float:
    members, tokens = [], []
    for group in groups:
        complete = [one for one in group.trajectories if one.end.complete]
        mean = sum(one.reward for one in complete) / len(complete)
        members += [token_terms(one, one.reward - mean) for one in group.members]
    tokens = [term for member in members for term in member]
    if aggregation == "token_mean":
        return -sum(tokens) / len(tokens)
    inside = {"sequence_mean": sum, "sequence_mean_of_token_means": lambda terms: sum(terms) / len(terms)}[aggregation]
    return -sum(map(inside, members)) / len(members)


@pytest.mark.parametrize("aggregation", ["sequence_mean_of_token_means", "sequence_mean", "token_mean"])
@pytest.mark.parametrize("length", [7, 20])
def test_the_loss_is_that_of_the_rollouts_one_by_one(aggregation, length):
    """Invariants 2, 6, 15 and 16: forks, failures and repeats, whatever the packing."""
    rows = batches.of_groups(GROUPS, length=length, multiple=4, advantage=GROUP_MEAN, aggregation=aggregation)
    behaviour = jnp.asarray(rows.streams["logp_behaviour"])
    loss, _ = policy.grpo(behaviour + 0.01 * rows.targets, logp_old=behaviour, logp_behaviour=behaviour,
                          advantage=jnp.asarray(rows.streams["advantage"]), mask=jnp.asarray(rows.weights),
                          segment_ids=jnp.asarray(rows.segment_ids), aggregation=aggregation)
    np.testing.assert_allclose(loss, reference(GROUPS, aggregation), rtol=1e-5)
    assert len(rows.tokens) % 4 == 0 and rows.tokens.shape[1] == length


def test_what_is_trained_on_is_what_was_sampled():
    """Invariant 1: every sampled token once for each member, with the log-prob and the version it was stamped with."""
    rows = batches.of_groups(GROUPS, length=9, multiple=1, advantage=GROUP_MEAN, aggregation="token_mean")
    on = rows.weights > 0
    found = collections.Counter(zip(rows.targets[on].tolist(), rows.streams["version"][on].tolist(),
                                    rows.streams["logp_behaviour"][on].tolist()))
    expected = collections.Counter(
        (id, version, float(np.float32(logp))) for group in GROUPS for member in group.members for turn in member.turns
        for id, logp, version in zip(turn.completion.ids, turn.completion.logprobs, turn.completion.versions))
    assert found == expected and set(rows.weights.ravel().tolist()) == {0.0, 1.0}


def test_every_token_has_the_teacher_of_its_task():
    of = {"sums": 0, "turns": 2, "products": 1}
    groups = [dataclasses.replace(group, trajectories=[dataclasses.replace(one, task=task)
                                                       for one in group.trajectories])
              for task, group in zip(("turns", "sums", "products"), (*GROUPS, Group("g2", 1, [rollout("i", 0.0, 51)])))]
    options = {"length": 20, "multiple": 1, "advantage": GROUP_MEAN, "aggregation": "token_mean"}
    rows = batches.of_groups(groups, **options, teacher=of.__getitem__)
    on = rows.weights > 0
    found = collections.Counter(zip(rows.targets[on].tolist(), rows.streams["teacher"][on].tolist()))
    assert found == collections.Counter((id, of[member.task]) for group in groups for member in group.members
                                        for turn in member.turns for id in turn.completion.ids)
    without = batches.of_groups(groups, **options)
    assert rows.streams.keys() - without.streams.keys() == {"teacher"}
    for name, stream in without.streams.items():
        np.testing.assert_array_equal(rows.streams[name], stream)


def test_a_context_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="rollout 'c': expected at most 6 tokens in a context .*, found 7"):
        batches.of_groups(GROUPS, length=6, multiple=1, advantage=GROUP_MEAN, aggregation="token_mean")


def test_nothing_sampled_is_refused():
    empty = Group("g", 1, [rollout("a", 1.0)])
    with pytest.raises(ValueError, match=r"expected sampled tokens, found none in \['g'\]"):
        batches.of_groups([empty], length=6, multiple=1, advantage=GROUP_MEAN, aggregation="token_mean")
