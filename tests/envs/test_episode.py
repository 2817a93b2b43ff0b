import copy
import functools
import itertools
import math

import pytest

from glm5_jax.envs.base import Failed, Limits, Start, Step
from glm5_jax.envs.context import PLACEHOLDER, View, hierarchical, keep_all, keep_recent
from glm5_jax.envs.episode import Reply, run_episode
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
    versions = iter([4, 3])

    def generate(messages, tools):
        return Reply({"role": "assistant", "content": ""}, [1], Completion([2], [-1], [next(versions)], "stop"))

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
