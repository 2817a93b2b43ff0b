import copy
import dataclasses
import doctest
import functools
import json
import math

import numpy as np
import pytest
from hypothesis import given, strategies as st

from glm5_jax import records
from glm5_jax.records import (
    Completion, EndReason, Failure, FailureReason, Group, PolicyVersion, StopReason, Trajectory, Turn, extend,
    from_json, to_json)

QUESTION = {"role": "user", "content": "1 + 1?"}
ANSWER = {"role": "assistant", "content": "2"}

probabilities = st.floats(max_value=0, allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=5)


@st.composite
def completions(draw, oldest=0):
    sampled = draw(st.lists(st.tuples(st.integers(0, 2**40), probabilities), max_size=4))
    versions = sorted(draw(st.lists(st.integers(oldest, oldest + 3), min_size=len(sampled), max_size=len(sampled))))
    return Completion([i for i, _ in sampled], [p for _, p in sampled], versions, draw(st.sampled_from(StopReason)))


@st.composite
def trajectories(draw):
    turns = []
    for i in range(draw(st.integers(0, 4))):
        turns.append(Turn(
            messages=[{"role": "tool", "content": draw(values)}], reply={"role": "assistant", "x": draw(values)},
            prompt=draw(st.lists(st.integers(0, 9), max_size=3)), completion=draw(completions(oldest=3 * i)),
            extends=draw(st.none() | st.integers(0, i - 1)) if i else None, reward=draw(st.floats(-1, 1)),
            info={"note": draw(values)}))
    failure = draw(st.none() | st.builds(Failure, st.sampled_from(FailureReason), st.text(), st.text()))
    end = "failed" if failure else draw(st.sampled_from([end for end in EndReason if end is not EndReason.FAILED]))
    return Trajectory("a", draw(st.text()), draw(st.integers(0)), turns, end, failure, [{"name": draw(st.text())}])


def trajectory(id="t-0", **changes):
    turn = Turn([QUESTION], ANSWER, (5, 6), Completion((7,), (-0.5,), (3,), "stop"), reward=1.0)
    return dataclasses.replace(Trajectory(id, "sums", 17, (turn,), EndReason.DONE), **changes)


def sampled(ids, version=0):
    return Turn([QUESTION], ANSWER, (), Completion(ids, [-1] * len(ids), [version] * len(ids), "stop"))


def nested(levels):
    return functools.reduce(lambda inner, _: [inner], range(levels - 1), [])


def test_calls_that_overlapped_end_in_any_order_of_versions():
    one = trajectory(turns=[*trajectory().turns, sampled((1,), version=2)])
    assert one.first_version == 2


def failed(id="t-9"):
    return trajectory(id, end="failed", failure=Failure(FailureReason.ENGINE, "generate"))


def test_the_worked_examples_hold_and_every_record_has_one():
    assert doctest.testmod(records).failed == 0
    named = [getattr(records, name) for name in records.__all__]
    assert [one.__name__ for one in named if isinstance(one, type) and one is not dict
            and ">>>" not in (one.__doc__ or "")] == []


@given(trajectories())
def test_json_keeps_a_trajectory_exactly(one):
    text = to_json(one)
    again = from_json(Trajectory, text)
    assert again == one
    assert to_json(again) == text  # 0.0 and -0.0, 1 and True are equal, but not as text


@pytest.mark.parametrize("record", [
    PolicyVersion(3, 12, "ab"),
    Failure(FailureReason.TIMEOUT, "reward", "10 s \ud800"),
    Completion((), (), (), StopReason.LENGTH),
    Completion((1, 2), (-0.1 - 0.2, -5e-324), (0, 1), StopReason.ABORT),
    Group("g", 2, [trajectory(), failed()], [0]),
], ids=lambda record: type(record).__name__)
def test_json_keeps_the_other_records(record):
    assert from_json(type(record), to_json(record)) == record
    assert "\n" not in to_json(record)


def test_fields_take_arrays_and_are_plain_afterwards():
    logprobs = np.array([-0.1, -2], np.float32)
    one = Completion(np.array([1, 2], np.int32), logprobs, np.array([0, 0]), "stop")
    assert one.logprobs == tuple(map(float, logprobs))
    assert {type(value) for field in (one.ids, one.logprobs, one.versions) for value in field} == {int, float}
    assert one.stop is StopReason.STOP


def test_a_record_owns_its_messages():
    message = {"role": "user", "content": [{"text": "a"}]}
    turn = Turn([message], ANSWER)
    message["content"][0]["text"] = "b"
    assert turn.messages[0]["content"] == [{"text": "a"}]


def test_messages_are_kept_up_to_the_deepest():
    one = trajectory(turns=[Turn([QUESTION], {**ANSWER, "a": nested(127)})])
    assert from_json(Trajectory, to_json(one)) == one
    assert copy.deepcopy(one) == one


def test_a_record_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        trajectory().seed = 1


BROKEN = {
    "lengths": (lambda: Completion((1, 2), (-0.5,), (0, 0), "stop"), r"Completion\.logprobs: expected 2 .* found 1"),
    "version lengths": (lambda: Completion((1,), (-0.5,), (), "stop"), r"Completion\.versions: expected 1"),
    "negative id": (lambda: Completion((1, -2), (-1, -1), (0, 0), "stop"), r"Completion\.ids\[1\]: .*found -2"),
    "negative version": (lambda: Completion((1,), (-1,), (-1,), "stop"), r"Completion\.versions\[0\]"),
    "probability above 1": (lambda: Completion((1,), (1e-9,), (0,), "stop"), r"Completion\.logprobs\[0\]: .*at most 0"),
    "probability 0": (lambda: Completion((1,), (-math.inf,), (0,), "stop"), r"Completion\.logprobs\[0\]: .*finite"),
    "nan": (lambda: Completion((1,), (math.nan,), (0,), "stop"), r"Completion\.logprobs\[0\]: .*finite"),
    "versions fall": (lambda: Completion((1, 2), (-1, -1), (4, 3), "stop"), r"Completion\.versions: "),
    "unknown stop": (lambda: Completion((), (), (), "eos"), r"Completion\.stop: expected one of .*'length'.*'eos'"),
    "boolean id": (lambda: Completion((True,), (-1,), (0,), "stop"), r"Completion\.ids\[0\]: expected an integer"),
    "float id": (lambda: Completion((1.0,), (-1,), (0,), "stop"), r"Completion\.ids\[0\]: expected an integer"),
    "text as ids": (lambda: Completion("12", (-1, -1), (0, 0), "stop"), r"Completion\.ids: expected a list"),
    "no reply": (lambda: Turn([QUESTION], QUESTION), r"Turn\.reply: expected a message of role 'assistant'"),
    "reply no message": (lambda: Turn([QUESTION], "2"), r"Turn\.reply: expected an object"),
    "no role": (lambda: Turn([QUESTION, {}], ANSWER), r"Turn\.messages\[1\]: expected a message with a role"),
    "not json": (lambda: Turn([QUESTION], {**ANSWER, "a": [{1}]}), r"Turn\.reply\.a\[0\]: expected a JSON value"),
    "not json key": (lambda: Turn([QUESTION], {**ANSWER, "a": {1: 2}}), r"Turn\.reply\.a: expected strings"),
    "nested too deep": (lambda: Turn([QUESTION], {**ANSWER, "a": nested(128)}),
                        r"Turn\.reply\.a\[0\].*at most 128 levels"),
    "nan inside": (lambda: Turn([QUESTION], ANSWER, info={"a": math.nan}), r"Turn\.info\.a: expected a JSON value"),
    "prompt alone": (lambda: Turn([QUESTION], ANSWER, prompt=(1,)), r"Turn\.prompt: expected no ids"),
    "infinite reward": (lambda: Turn([QUESTION], ANSWER, reward=math.inf), r"Turn\.reward: expected a finite"),
    "no id": (lambda: trajectory(id=""), r"Trajectory\.id"),
    "negative seed": (lambda: trajectory(seed=-1), r"Trajectory\.seed: expected 0 or more, found -1"),
    "failed without failure": (lambda: trajectory(end="failed"), r"Trajectory\.failure: expected a failure"),
    "failure without failed": (lambda: trajectory(failure=Failure("engine", "x")), r"Trajectory\.failure: .*none"),
    "extends itself": (lambda: trajectory(turns=[Turn([], ANSWER, extends=0)]), r"turns\[0\]\.extends"),
    "extends tokens with none": (lambda: trajectory(turns=[*trajectory().turns, Turn([], ANSWER, extends=0)]),
                                 r"turns\[1\]\.completion"),
    "older turn": (lambda: trajectory(turns=[
        *trajectory().turns, dataclasses.replace(sampled((1,), version=2), extends=0)]),
                   r"turns\[1\]\.completion\.versions: expected at least 3.*found 2"),
    "two problems": (lambda: Group("g", 2, [trajectory(), trajectory("u", seed=18)]), r"Group\.trajectories: .*seed"),
    "one id twice": (lambda: Group("g", 2, [trajectory(), trajectory()]), r"Group\.trajectories: .*different ids"),
    "too many": (lambda: Group("g", 1, [trajectory()], [0]), r"Group\.repeats: expected at most 1"),
    "a failure repeated": (lambda: Group("g", 2, [failed()], [0]), r"Group\.repeats\[0\]: expected .*complete"),
    "nothing repeated": (lambda: Group("g", 2, [trajectory()], [1]), r"Group\.repeats\[0\]"),
    "not a record": (lambda: Group("g", 2, [3]), r"Group\.trajectories\[0\]: expected a Trajectory, found 3"),
    "version": (lambda: PolicyVersion(-1, 0), r"PolicyVersion\.number"),
    "resumed after a stop": (lambda: trajectory().turns[0].completion + trajectory().turns[0].completion,
                             r"Completion\.stop: expected 'abort'"),
}


@pytest.mark.parametrize("build, message", BROKEN.values(), ids=BROKEN)
def test_a_broken_record_names_the_field(build, message):
    with pytest.raises((TypeError, ValueError), match=message):
        build()


@pytest.mark.parametrize("path, value, message", [
    (["turns", 0, "completion", "ids", 0], "7", r"Trajectory\.turns\[0\]\.completion\.ids\[0\]: expected an integer"),
    (["turns", 0, "completion", "stop"], "eos", r"Trajectory\.turns\[0\]\.completion\.stop: expected one of"),
    (["turns", 0, "completion", "entropy"], 1, r"Trajectory\.turns\[0\]\.completion: .*unknown \['entropy'\]"),
    (["turns", 0, "reward"], "1", r"Trajectory\.turns\[0\]\.reward: expected a number"),
    (["turns", 0], [], r"Trajectory\.turns\[0\]: expected a Turn"),
    (["seed"], None, r"Trajectory\.seed: expected an integer, found None"),
    (["seed"], True, r"Trajectory\.seed: expected an integer"),
    (["task"], 1, r"Trajectory\.task: expected a string"),
    (["turns"], {}, r"Trajectory\.turns: expected a list"),
], ids=lambda value: str(value)[:30])
def test_broken_json_names_the_field(path, value, message):
    data = json.loads(to_json(trajectory()))
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises((TypeError, ValueError), match=message):
        from_json(Trajectory, json.dumps(data))


def test_a_missing_field_is_named():
    with pytest.raises(ValueError, match=r"Failure: .*missing \['place'\]"):
        from_json(Failure, '{"reason": "engine"}')
    with pytest.raises(ValueError):
        from_json(Failure, '{"reason": "engine", "place')


def test_an_aborted_completion_resumes_under_newer_weights():
    whole = (Completion((1, 2), (-1, -2), (3, 3), "abort") + Completion((), (), (), "abort")
             + Completion((4,), (-4,), (5,), "stop"))
    assert whole == Completion((1, 2, 4), (-1, -2, -4), (3, 3, 5), "stop")


def call(turns, sent, prompt, ids):
    return [*turns, extend(turns, sent, ANSWER, prompt=prompt, completion=sampled(ids).completion)]


def test_a_call_is_stored_as_what_is_new_and_read_as_what_was_sent():
    tool, user = {"role": "tool", "content": "42"}, {"role": "user", "content": "again"}
    sent = [[QUESTION], [QUESTION, ANSWER, tool], [QUESTION], [QUESTION, ANSWER, user], [user]]
    prompts = [(1, 2), (1, 2, 3, 4), (1, 2), (1, 2, 3, 9), (9,)]
    turns = []
    for messages, prompt in zip(sent, prompts):
        turns = call(turns, messages, prompt, (3,))
    one = trajectory(turns=turns)
    assert [turn.extends for turn in turns] == [None, 0, None, 2, None]
    assert [list(one.sent(i)) for i in range(5)] == sent
    assert [one.prompt(i) for i in range(5)] == prompts
    assert [turn.prompt for turn in turns] == [(1, 2), (4,), (1, 2), (9,), (9,)]


@pytest.mark.parametrize("sent, prompt", [
    ([QUESTION, ANSWER], (1, 2, 8, 4)),  # another id than was sampled: text rendered and tokenised again
    ([QUESTION, ANSWER], (1, 2)),
    ([QUESTION, {**ANSWER, "content": "3"}], (1, 2, 3, 4)),
    ([QUESTION, dict(reversed(ANSWER.items()))], (1, 2, 3, 4)),  # the order of keys shows in a prompt
    ([{**QUESTION, "n": True}, ANSWER], (1, 2, 3, 4)),  # equal to 1 in Python
], ids=["drift", "cut", "reply edited", "keys", "true is not 1"])
def test_what_does_not_extend_is_a_fork_in_full(sent, prompt):
    turns = call(call([], [{**QUESTION, "n": 1} if "n" in sent[0] else QUESTION], (1, 2), (3,)), sent, prompt, (5,))
    assert turns[1].extends is None
    assert list(turns[1].messages) == sent and turns[1].prompt == prompt


def test_messages_alone_extend_messages_alone():
    first = extend([], [QUESTION], ANSWER)
    assert extend([first], [QUESTION, ANSWER, QUESTION], ANSWER) == Turn([QUESTION], ANSWER, extends=0)
    assert call([first], [QUESTION, ANSWER, QUESTION], (1,), (2,))[1].extends is None


def test_the_reward_is_the_sum_of_a_complete_episode_alone():
    turns = [Turn([QUESTION], ANSWER, reward=0.1)] * 10
    assert trajectory(turns=turns).reward == 1.0
    assert trajectory(turns=turns, end="tokens").reward == 1.0
    assert trajectory(turns=turns, end="aborted").reward is None
    assert failed().reward is None


def test_staleness_is_read_off_the_first_sampled_token():
    empty = Turn([QUESTION], ANSWER, (), Completion((), (), (), "abort"))
    later = Turn([QUESTION], ANSWER, (), Completion((1, 2), (-1, -1), (4, 6), "stop"))
    assert trajectory(turns=[empty, later]).first_version == 4
    assert trajectory(turns=[empty]).first_version is None
    assert trajectory(turns=[Turn([QUESTION], ANSWER)]).first_version is None


def test_failed_and_aborted_trajectories_are_kept_but_no_members():
    group = Group("g", 3, [failed(), trajectory("a"), trajectory("b", end="aborted"), trajectory("c")], [3])
    assert [one.id for one in group.members] == ["a", "c", "c"]
