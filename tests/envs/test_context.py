import copy
import functools

import pytest
from hypothesis import given, strategies as st

from glm5_jax.envs.context import (
    PLACEHOLDER, TOKENS, Round, View, discard_all, hierarchical, keep_all, keep_recent)

QUESTION = [{"role": "system", "content": "search"}, {"role": "user", "content": "who?"}]


def a_round(i, size=1, calls=1):
    reply = {"role": "assistant", "reasoning_content": f"think {i}", "content": "",
             "tool_calls": [{"id": f"{i}.{j}", "function": {"name": "open", "arguments": {}}} for j in range(calls)]}
    return Round(reply, tuple({"role": "tool", "tool_call_id": f"{i}.{j}", "content": f"{i}" * size}
                              for j in range(calls)))


def characters(messages):
    return sum(len(message["content"]) for message in messages)


def contents(view):
    return [message["content"] for message in view.messages if message["role"] == "tool"]


def test_the_published_constants():
    assert PLACEHOLDER == "Tool result is omitted to save tokens."
    assert TOKENS == 32 * 1024
    assert contents(keep_recent(QUESTION, [a_round(i) for i in range(7)])) == [PLACEHOLDER] * 2 + list("23456")


def test_keep_all_is_the_history():
    rounds = [a_round(0), a_round(1, calls=2)]
    assert keep_all(QUESTION, rounds).messages == (*QUESTION, rounds[0].reply, *rounds[0].observations, rounds[1].reply,
                                                   *rounds[1].observations)
    assert keep_all(QUESTION, []) == View(tuple(QUESTION), ())


@given(st.lists(st.integers(0, 3), max_size=9), st.integers(0, 9))
def test_keep_recent_folds_older_observations_and_nothing_else(calls, k):
    """Invariant 21."""
    rounds = [a_round(i, calls=count) for i, count in enumerate(calls)]
    before = copy.deepcopy((QUESTION, rounds))
    view, whole = keep_recent(QUESTION, rounds, k=k), keep_all(QUESTION, rounds)
    folded = sum(calls[:max(len(calls) - k, 0)])
    assert contents(view) == [PLACEHOLDER] * folded + contents(whole)[folded:]
    assert [{**message, "content": ""} for message in view.messages] == [
        {**message, "content": ""} for message in whole.messages]
    assert [message for message in view.messages if message["role"] != "tool"] == [
        message for message in whole.messages if message["role"] != "tool"]
    assert view.rounds == whole.rounds == tuple(rounds)
    assert (QUESTION, rounds) == before


def test_what_a_user_says_is_no_observation():
    one = Round({"role": "assistant", "content": "?"}, ({"role": "user", "content": "the taller one"},))
    assert keep_recent(QUESTION, [one], k=0) == keep_all(QUESTION, [one])


def test_a_negative_k_is_refused():
    with pytest.raises(ValueError, match="k: .*found -1"):
        keep_recent(QUESTION, [], k=-1)


@pytest.mark.parametrize("policy, kept", [
    (discard_all, keep_all),
    (functools.partial(hierarchical, k=1), functools.partial(keep_recent, k=1)),
], ids=["discard_all", "hierarchical"])
def test_discarding_begins_exactly_past_the_limit(policy, kept):
    """Invariant 21."""
    rounds = [a_round(0, size=50), a_round(1, size=50)]
    size = characters(kept(QUESTION, rounds).messages)
    assert policy(QUESTION, rounds, count=characters, limit=size) == kept(QUESTION, rounds)
    assert policy(QUESTION, rounds, count=characters, limit=size - 1) == View(tuple(QUESTION), ())


def test_folding_comes_before_discarding():
    rounds = [a_round(i, size=100) for i in range(4)]
    limit = characters(keep_recent(QUESTION, rounds, k=2).messages)
    assert limit < characters(keep_all(QUESTION, rounds).messages)
    assert len(hierarchical(QUESTION, rounds, count=characters, k=2, limit=limit).rounds) == 4
    assert discard_all(QUESTION, rounds, count=characters, limit=limit).rounds == ()


def test_a_question_past_the_limit_is_still_asked():
    assert hierarchical(QUESTION, [], count=characters, limit=1).messages == tuple(QUESTION)


def published(question, sizes, k, limit):
    """The loop of the paper as it is printed, over tool results of these sizes; yields the contents of each view."""
    rounds = []
    for i, size in enumerate(sizes):
        n = len(rounds)
        view = [*question]
        for j, (action, observation) in enumerate(rounds, 1):
            view += [action, observation if j > n - k else {**observation, "content": PLACEHOLDER}]
        if characters(view) > limit:
            rounds, view = [], [*question]
        yield view
        one = a_round(i, size)
        rounds.append((one.reply, one.observations[0]))


@given(st.lists(st.integers(0, 60), max_size=30), st.integers(0, 4), st.integers(0, 300))
def test_hierarchical_is_the_published_loop(sizes, k, limit):
    rounds, views = (), []
    for i, size in enumerate(sizes):
        view = hierarchical(QUESTION, rounds, count=characters, k=k, limit=limit)
        views.append(list(view.messages))
        rounds = (*view.rounds, a_round(i, size))
    assert views == list(published(QUESTION, sizes, k, limit))
