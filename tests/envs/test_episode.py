import copy
import dataclasses
import functools
import itertools
import math

import pytest

from glm5_jax.envs.base import Failed, Limits, Start, Step
from glm5_jax.envs.context import PLACEHOLDER, View, hierarchical, keep_all, keep_recent
from glm5_jax.envs.episode import Act, Ask, CalledBack, OutOfRoom, Reply, episode, run_episode
from glm5_jax.records import Completion, EndReason, Failure, FailureReason, Trajectory, from_json, to_json

TOOLS = ({"type": "function", "function": {"name": "look"}},)


class Count:
    """Done when the model has said as many words as the seed; answers each reply with a tool result."""

    def __init__(self, **broken):
        self.broken = broken  # a name of a call -> what it does instead
        self.calls = []

    def reset(self, seed):
        self.calls.append("reset")
        if "reset" in self.broken:
            return self.broken["reset"]()
        self.left = seed
        return Start(({"role": "user", "content": f"say {seed}"},), TOOLS)

    def step(self, message):
        self.calls.append("step")
        self.left -= 1
        if "step" in self.broken and self.left == 1:
            return self.broken["step"]()
        return Step(({"role": "tool", "content": f"{self.left} left"},), 0.25, self.left <= 0, {"left": self.left})

    def close(self):
        self.calls.append("close")
        if "close" in self.broken:
            self.broken["close"]()


class Model:
    """Says the number of the call, and remembers exactly what it was sent."""

    def __init__(self, tokens=False, broken=None):
        self.tokens, self.broken, self.seen = tokens, broken, []

    def __call__(self, messages, tools):
        assert tuple(tools) == TOOLS
        self.seen.append(copy.deepcopy(list(messages)))
        if self.broken and len(self.seen) == 2:
            return self.broken()
        message = {"role": "assistant", "content": f"call {len(self.seen)}"}
        if not self.tokens:
            return message
        prompt = [token for one in messages for token in ids(one)]
        sampled = ids(message)
        return Reply(message, prompt, Completion(sampled, [-1] * len(sampled), [0] * len(sampled), "stop"))


def ids(message):
    return [ord(letter) for letter in message["role"][0] + message["content"]]


def raising(error):
    def call(*_):
        raise error
    return call


def play(env, generate, *, seed=3, **options):
    return run_episode(env, generate, task="count", seed=seed, **options)


def characters(messages):
    return sum(len(message["content"]) for message in messages)


def test_an_episode_to_its_end():
    env, model = Count(), Model()
    one = play(env, model)
    assert (one.id, one.task, one.seed, one.end, one.failure) == ("count-3", "count", 3, EndReason.DONE, None)
    assert one.reward == 0.75 and [turn.info["left"] for turn in one.turns] == [2, 1, 0]
    assert one.tools == TOOLS
    assert [turn.extends for turn in one.turns] == [None, 0, 1]
    assert one.observations == ({"role": "tool", "content": "0 left"},)
    assert env.calls == ["reset", "step", "step", "step", "close"]
    assert from_json(Trajectory, to_json(one)) == one
    assert play(Count(), Model(), id="count-3-7").id == "count-3-7"


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("context", [
    keep_all,
    functools.partial(keep_recent, k=2),
    functools.partial(hierarchical, k=2, count=characters, limit=120),
    lambda question, rounds: View((*question, {"role": "user", "content": f"{len(rounds)} rounds ago"}), ()),
], ids=["all", "recent", "hierarchical", "invented"])
def test_what_is_sent_is_what_is_recorded(context, tokens):
    model = Model(tokens)
    one = play(Count(), model, seed=9, context=context)
    assert len(model.seen) == len(one.turns) == 9
    for i, seen in enumerate(model.seen):
        assert list(one.sent(i)) == seen
        if tokens:
            assert one.prompt(i) == tuple(token for message in seen for token in ids(message))
    assert any(PLACEHOLDER in str(seen) for seen in model.seen) == (isinstance(context, functools.partial))


def test_a_discarded_history_stays_discarded():
    k, limit, model = 2, 100, Model()
    play(Count(), model, seed=20, context=functools.partial(hierarchical, k=k, count=characters, limit=limit))
    question, rounds, views = {"role": "user", "content": "say 20"}, [], []
    for call in range(1, 21):  # the published loop
        view = [question]
        for i, (reply, observation) in enumerate(rounds, 1):
            view += [reply, observation if i > len(rounds) - k else {**observation, "content": PLACEHOLDER}]
        if characters(view) > limit:
            rounds, view = [], [question]
        views.append(view)
        rounds.append(({"role": "assistant", "content": f"call {call}"},
                       {"role": "tool", "content": f"{20 - call} left"}))
    assert model.seen == views
    assert 3 < sum(len(view) == 1 for view in views) < 10


def test_the_record_survives_those_who_edit_what_they_were_given():
    class Editing(Count):
        def step(self, message):
            message["content"] = "edited"
            return super().step(message)

    class Rude(Model):
        def __call__(self, messages, tools):
            reply = super().__call__(messages, tools)
            messages[0]["content"] = "edited"
            tools[0].clear()
            return reply

    assert play(Editing(), Rude()) == play(Count(), Model())


@pytest.mark.parametrize("limits, end, turns", [
    ({"turns": 2}, EndReason.TURNS, 2),
    ({"turns": 3}, EndReason.DONE, 3),
    ({"tokens": 16}, EndReason.TOKENS, 1),
    ({"tokens": 17}, EndReason.TOKENS, 2),  # "say 3", "call 1", "2 left"
    ({"tokens": 1}, EndReason.TOKENS, 0),
    ({"wall_s": 2}, EndReason.TIME, 1),
    ({"wall_s": 2.5}, EndReason.TIME, 2),
    ({"wall_s": 9, "tokens": 99, "turns": 9}, EndReason.DONE, 3),
], ids=str)
def test_a_limit_cuts_the_episode_off(limits, end, turns):
    env = Count()
    one = play(env, Model(), limits=Limits(**limits), count=characters, clock=itertools.count(5).__next__)
    assert (one.end, len(one.turns), one.failure) == (end, turns, None)
    assert one.reward == 0.25 * turns
    assert env.calls[-1] == "close"
    assert len(one.observations) == 1


def test_a_token_limit_needs_a_count():
    env = Count()
    with pytest.raises(ValueError, match="limits.tokens"):
        play(env, Model(), limits=Limits(tokens=5))
    assert env.calls == []


def nested():
    return functools.reduce(lambda inner, _: [inner], range(10_000), [])


FAILURES = {
    "reset raises": ({"reset": raising(OSError("no disk"))}, None, "environment", "reset", "OSError: no disk", 0),
    "reset gives no pair": ({"reset": lambda: None}, None, "environment", "reset", "TypeError", 0),
    "reset without role": ({"reset": lambda: ([{}], [])}, None, "environment", "reset", "observations[0]", 0),
    "tools are names": ({"reset": lambda: ([], ["look"])}, None, "environment", "reset", "tools[0]", 0),
    "step raises": ({"step": raising(KeyError("x"))}, None, "environment", "step", "KeyError: 'x'", 2),
    "step gives no step": ({"step": lambda: 3}, None, "environment", "step", "TypeError", 2),
    "step without role": ({"step": lambda: Step(({},))}, None, "environment", "step", "observations[0]", 2),
    "reward is no number": ({"step": lambda: Step((), "1")}, None, "environment", "step", "Turn.reward", 2),
    "reward is nan": ({"step": lambda: Step((), math.nan)}, None, "environment", "step", "Turn.reward", 2),
    "info is no json": ({"step": lambda: Step((), 1, True, {"a": {1}})}, None, "environment", "step", "Turn.info.a", 2),
    "close raises": ({"close": raising(OSError("busy"))}, None, "environment", "close", "OSError: busy", 3),
    "step is late": ({"step": raising(TimeoutError("9 s"))}, None, "timeout", "step", "TimeoutError: 9 s", 2),
    "step knows why": ({"step": raising(Failed(Failure("reward", "judge", "no file")))}, None, "reward", "judge",
                       "no file", 2),
    "generate raises": ({}, raising(ConnectionError("gone")), "engine", "generate", "ConnectionError: gone", 1),
    "generate is late": ({}, raising(TimeoutError("10 s")), "timeout", "generate", "TimeoutError: 10 s", 1),
    "generate gives none": ({}, lambda: None, "engine", "generate", "Turn.reply", 1),
    "generate gives a user": ({}, lambda: {"role": "user"}, "engine", "generate", "Turn.reply", 1),
    "generate nests too deep": ({}, lambda: {"role": "assistant", "a": nested()}, "engine", "generate", "Turn.reply.a",
                                1),
    "step nests too deep": ({"step": lambda: Step((), info={"a": nested()})}, None, "environment", "step", "Turn.info",
                            2),
    "tokens without role": ({}, lambda: Reply({}, [1]), "engine", "generate", "Turn.reply", 1),
    "first failure counts": ({"close": raising(OSError)}, lambda: 3, "engine", "generate", "Turn.reply", 1),
}


@pytest.mark.parametrize("env, model, reason, place, detail, turns", FAILURES.values(), ids=FAILURES)
def test_a_failure_is_data_and_the_environment_is_closed(env, model, reason, place, detail, turns):
    env = Count(**env)
    one = play(env, Model(broken=model))
    assert one.end is EndReason.FAILED and one.reward is None
    assert (one.failure.reason, one.failure.place) == (FailureReason(reason), place)
    assert detail in one.failure.detail
    assert len(one.turns) == turns
    assert env.calls.count("close") == 1 and env.calls[-1] == "close"
    assert from_json(Trajectory, to_json(one)) == one


def test_an_engine_that_steps_back_in_versions_has_failed():
    calls = iter([([1], 4), ([1, 2, 5], 3)])

    def generate(messages, tools):
        prompt, version = next(calls)
        return Reply({"role": "assistant", "content": ""}, prompt, Completion([2], [-1], [version], "stop"))

    one = play(Count(), generate)
    assert one.failure.reason is FailureReason.ENGINE and "versions" in one.failure.detail
    assert len(one.turns) == 1


def test_a_completion_called_back_ends_the_episode_for_now():
    def generate(messages, tools):
        return Reply({"role": "assistant", "content": "so f"}, [1], Completion([2], [-1], [0], "abort"))

    env = Count()
    one = play(env, generate)
    assert (one.end, one.reward, one.failure, one.observations) == (EndReason.ABORTED, None, None, ())
    assert one.turns[0].completion.ids == (2,)
    assert env.calls == ["reset", "close"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_passes_but_closes(error):
    env = Count()
    with pytest.raises(error):
        play(env, Model(broken=raising(error)))
    assert env.calls[-1] == "close"


def recorded(one, turns, *, drawn=None):
    """The trajectory as it stood once `turns` of its turns had ended; `drawn` tokens of the next are there too."""
    observations = one.turns[turns].messages if turns < len(one.turns) and drawn is None else ()
    kept = one.turns[:turns]
    if drawn is not None:
        whole = one.turns[turns].completion
        part = Completion(whole.ids[:drawn], whole.logprobs[:drawn], whole.versions[:drawn], "abort")
        kept += (dataclasses.replace(one.turns[turns], reply={"role": "assistant", "content": ""}, completion=part,
                                     reward=0, info={}),)
    return dataclasses.replace(one, turns=kept, end="aborted", observations=observations)


def drive(requests, answer):
    """Answers the requests of an episode; returns its trajectory and what the model was asked for."""
    asked, go_on = [], functools.partial(next, requests)
    while True:
        try:
            request = go_on()
        except StopIteration as ended:
            return ended.value, asked
        if isinstance(request, Ask):
            asked.append(request)
        try:
            value = request.function(*request.args) if isinstance(request, Act) else answer(request)
        except Exception as error:
            go_on = functools.partial(requests.throw, error)
        else:
            go_on = functools.partial(requests.send, value)


def go_on(so_far, env=None, answer=None, **options):
    """Plays on from a trajectory of `Count` with seed 4, by a model that says which turn it is."""
    def model(ask):
        message = {"role": "assistant", "content": f"call {ask.turn + 1}"}
        return Reply(message, [id for one in ask.messages for id in ids(one)],
                     Completion(ids(message), [-1] * 7, [0] * 7, "stop"))

    requests = episode(env or Count(), task="count", seed=4, so_far=so_far, **options)
    return drive(requests, answer or model)


WHOLE = play(Count(), Model(tokens=True), seed=4)


@pytest.mark.parametrize("context", [keep_all, functools.partial(keep_recent, k=1)], ids=["all", "recent"])
@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("drawn", [None, 0, 3])
def test_a_partial_episode_goes_on_as_if_nothing_had_been(turns, drawn, context):
    """Whatever was recorded of it when it was called back, and whatever the messages of each call are."""
    whole = play(Count(), Model(tokens=True), seed=4, context=context)
    so_far, env = recorded(play(Count(), Model(tokens=True), seed=4), turns, drawn=drawn), Count()
    if context is not keep_all:
        so_far = dataclasses.replace(so_far, turns=whole.turns[:len(so_far.turns)] if drawn is None else
                                     (*whole.turns[:turns], dataclasses.replace(
                                         whole.turns[turns], completion=so_far.turns[-1].completion)))
    one, asked = go_on(so_far, env, context=context)
    assert one == whole
    assert [ask.turn for ask in asked] == list(range(turns, 4))
    assert asked[0].so_far == (None if drawn is None else so_far.turns[-1].completion)
    assert not any(ask.so_far for ask in asked[1:])
    assert env.calls == ["reset", "step", "step", "step", "step", "close"]


class Other(Count):
    """Answers otherwise in its second step."""

    def __init__(self, **changes):
        super().__init__()
        self.changes = changes

    def step(self, message):
        step = super().step(message)
        return step._replace(**self.changes) if self.left == 2 else step


@pytest.mark.parametrize("turns, env, place, detail", [
    (3, Other(reward=0.5), "step", "reward of turn 1: expected 0.25 as recorded, found 0.5"),
    (3, Other(done=True), "step", "done after turn 1: expected False as recorded, found True"),
    (3, Other(messages=({"role": "tool", "content": "?"},)), "step", "messages of turn 2: expected"),
    (2, Other(messages=({"role": "tool", "content": "?"},)), "step", "observations: expected"),
    (1, Count(reset=lambda: Start(({"role": "user", "content": "?"},), TOOLS)), "reset", "messages of turn 0: "),
    (1, Count(reset=lambda: Start(({"role": "user", "content": "say 4"},), ())), "reset", "tools: expected"),
], ids=["reward", "done", "messages", "observations", "question", "tools"])
def test_an_environment_that_answers_otherwise_has_failed(turns, env, place, detail):
    so_far = recorded(WHOLE, turns)
    one, asked = go_on(so_far, env)
    assert (one.failure.reason, one.failure.place) == (FailureReason.ENVIRONMENT, place)
    assert one.failure.detail.startswith("played again: " + detail)
    assert one.turns == so_far.turns and not asked  # nothing that was sampled is lost
    assert env.calls[-1] == "close"


def test_an_episode_is_called_back_between_replies():
    def answer(ask):
        raise CalledBack

    for turns in range(4):
        so_far = recorded(WHOLE, turns)
        one, _ = go_on(so_far, answer=answer)
        assert one == dataclasses.replace(so_far, observations=one.observations)
        assert one.observations == (so_far.observations or ({"role": "user", "content": "say 4"},))
    half = recorded(WHOLE, 2, drawn=3)
    assert go_on(half, answer=answer)[0] == half


def test_an_episode_without_room_for_a_reply_has_come_to_its_limit():
    def answer(ask):
        raise OutOfRoom

    one, _ = go_on(recorded(WHOLE, 2), answer=answer)
    assert (one.end, one.reward, len(one.turns)) == (EndReason.TOKENS, 0.5, 2)


def test_limits_count_what_was_before():
    one, asked = go_on(recorded(WHOLE, 2), limits=Limits(turns=3))
    assert (one.end, len(one.turns), len(asked)) == (EndReason.TURNS, 3, 1)


@pytest.mark.parametrize("so_far, message", [
    (WHOLE, "expected an aborted trajectory of 'count' and seed 4, found one of 'count' and 4 that ended with 'done'"),
    (dataclasses.replace(recorded(WHOLE, 1), seed=5), "found one of 'count' and 5 that ended with 'aborted'"),
])
def test_what_is_no_partial_episode(so_far, message):
    with pytest.raises(ValueError, match=message):
        go_on(so_far)


def test_an_episode_that_nobody_drives_to_its_end():
    env = Count()
    requests = episode(env, task="count", seed=4)
    next(requests)
    requests.close()  # asks for nothing more
    assert env.calls == []
