"""Questions with tools: what a call results in, when an episode ends, and what a failing environment leaves."""

import asyncio
import functools

import pytest

from glm5_jax.envs import lookup
from glm5_jax.envs.base import Failed, Limits
from glm5_jax.envs.episode import run_episode
from glm5_jax.envs.tool_loop import NEITHER, Problem, Tool, ToolError, ToolLoop, call_tools, conversation
from glm5_jax.envs.verifiable.task import Task
from glm5_jax.records import EndReason, FailureReason
from glm5_jax.rl import rollout
from glm5_jax.serve.gateway import Gateway, Options
from glm5_jax.text import mask
from glm5_jax.text.tokenizer import Tokenizer
from tests.serve.fakes import ScriptedGenerator

TOKENIZER = Tokenizer.packaged()


def divide(a, by=1):
    if by == 0:
        raise ToolError("error: division by zero")
    return str(a // by)


DIVIDE = Tool({"name": "divide", "parameters": {"properties": {"a": {"type": "integer"}, "by": {"type": "integer"}},
                                                "required": ["a"]}}, divide)
NOW = Tool({"type": "function", "function": {"name": "now", "parameters": {}}}, lambda: "noon")


def calling(*calls, content=""):
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def call(name, **arguments):
    return {"function": {"name": name, "arguments": arguments}}


def say(content):
    return {"role": "assistant", "content": content}


def seven(seed):
    return Problem(Task("seven", seed, "Seven?", "7", lambda answer: answer == "7"), (DIVIDE, NOW))


def play(env, *replies, limits=Limits(), seed=0):
    """The trajectory in which the model gives these replies."""
    rest = iter(replies)
    return run_episode(env, lambda messages, tools: next(rest), task="seven", seed=seed, limits=limits)


# Calls

@pytest.mark.parametrize("made, text, well", [
    (call("divide", a=7, by=2), "3", True),
    (call("divide", a=7), "7", True),
    ({"name": "divide", "arguments": '{"a": 9, "by": 3}'}, "3", True),
    (call("now"), "noon", True),
    ({"function": {"name": "now", "arguments": None}}, "noon", True),
    (call("divide", a=7, by=0), "error: division by zero", False),
    (call("dvide", a=7), "error: no tool 'dvide', only divide, now", False),
    (call("divide", by=7), "error: a: expected a value, found none", False),
    (call("divide", a="7"), "error: a: expected integer, found '7'", False),
    (call("divide", a=7, c=1), "error: c: expected one of ['a', 'by'], found 'c'", False),
    (call("now", a=7), "error: a: expected one of [], found 'a'", False),
    ({"name": "divide", "arguments": [1]}, "error: arguments: expected object, found [1]", False),
    ({"name": "divide", "arguments": "{"}, "error: arguments: Expecting property name", False),
    ({"name": 3}, "error: not a call", False),
    ({"function": "now"}, "error: not a call", False),
    ("now", "error: not a call", False),
    ({}, "error: not a call", False),
])
def test_the_result_of_a_call(made, text, well):
    (found, fine), = call_tools(calling(made), (DIVIDE, NOW))
    assert found.startswith(text) and (well is False or found == text) and fine is well


@pytest.mark.parametrize("calls", [None, [], ()])
def test_without_calls_there_are_no_results(calls):
    assert call_tools({"role": "assistant", "content": "", "tool_calls": calls}, (NOW,)) == []
    assert call_tools(say(""), (NOW,)) == []


def test_calls_that_are_no_list_are_one_bad_call():
    assert call_tools({"role": "assistant", "tool_calls": "now"}, (NOW,)) == [("error: not a call", False)]


def test_what_a_tool_raises_but_its_error_passes():
    broken = Tool(NOW.definition, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call_tools(calling(call("now")), (broken,))


# Episodes

def test_results_come_in_the_order_of_the_calls_and_an_answer_ends_it():
    played = play(ToolLoop(seven), calling(call("divide", a=7, by=2), call("no"), call("now")),
                  say("<answer>7</answer>"))
    assert played.turns[0].reward == 0 and played.turns[0].info == {"calls": 3, "errors": 1, "answered": False}
    assert [message["content"] for message in played.turns[1].messages] == [
        "3", "error: no tool 'no', only divide, now", "noon"]
    assert {message["role"] for message in played.turns[1].messages} == {"tool"}
    assert played.turns[1].info == {"calls": 0, "errors": 0, "answered": True}
    assert (played.end, played.reward, played.observations) == (EndReason.DONE, 1, ())


@pytest.mark.parametrize("content, reward", [
    ("<answer>7</answer>", 1), ("<answer>8</answer>", 0), ("<answer></answer>", 0), ("It is <answer> 7 </answer>!", 1)])
def test_an_answer_earns_one_or_nothing(content, reward):
    played = play(ToolLoop(seven), say(content))
    assert (played.end, played.reward, len(played.turns)) == (EndReason.DONE, reward, 1)


def test_a_reply_with_neither_goes_on_and_so_does_an_answer_beside_a_call():
    played = play(ToolLoop(seven), say("Hm."), calling(call("now"), content="<answer>7</answer>"), say(None),
                  limits=Limits(turns=3))
    assert (played.end, played.reward) == (EndReason.TURNS, 0)
    told = [message["content"] for turn in played.turns for message in turn.messages] + [
        message["content"] for message in played.observations]
    assert told == ["Seven?", NEITHER, "noon", NEITHER]


def test_the_tools_stand_in_the_prompt_or_do_not():
    assert ToolLoop(seven).reset(0).tools == (DIVIDE.definition, NOW.definition)
    bare = ToolLoop(seven, tools_in_prompt=False)
    assert bare.reset(0).tools == ()
    assert bare.step(calling(call("now"))).messages == ({"role": "tool", "content": "noon"},)


def test_what_a_problem_holds_is_freed_once():
    freed = []
    env = ToolLoop(lambda seed: Problem(seven(seed).task, (NOW,), lambda: freed.append(seed)))
    env.close()
    assert freed == []
    play(env, say("<answer>7</answer>"), seed=5)
    env.close()
    assert freed == [5]
    with pytest.raises(RuntimeError, match="expected a reset before it"):
        env.step(say(""))


def test_a_tool_that_breaks_fails_the_episode():
    broken = Tool(NOW.definition, lambda: 1 / 0)
    played = play(ToolLoop(lambda seed: Problem(seven(seed).task, (broken,))), calling(call("now")))
    assert (played.end, played.failure.reason, len(played.turns)) == (EndReason.FAILED, FailureReason.ENVIRONMENT, 1)
    assert "division by zero" in played.failure.detail


def test_a_conversation_is_a_call_and_its_result_and_then_the_solution():
    assert conversation(seven(0).task, [("now", {}, "noon")]) == [
        {"role": "user", "content": "Seven?"},
        calling({"function": {"name": "now", "arguments": {}}}),
        {"role": "tool", "content": "noon"},
        say("<answer>7</answer>")]


# Failures made on purpose

def fails(seed, **options):
    env = ToolLoop(seven, **options)
    env.reset(seed)
    try:
        env.step(say("<answer>7</answer>"))
    except Failed as failed:
        assert failed.failure.reason is FailureReason.ENVIRONMENT and failed.failure.place == "step"
        return True
    return False


def test_a_share_of_the_seeds_fails_always_the_same():
    failing = [fails(seed, flaky=0.25) for seed in range(2000)]
    assert 400 < sum(failing) < 600
    assert failing[:100] == [fails(seed, flaky=0.25) for seed in range(100)]
    assert not any(fails(seed) for seed in range(20)) and all(fails(seed, flaky=1) for seed in range(20))


def test_rollouts_of_one_seed_fail_each_by_itself():
    failing = [fails(3, flaky=0.25, rollout=f"seven-3-{index}") for index in range(2000)]
    assert 400 < sum(failing) < 600


def test_a_flaky_episode_keeps_the_turn_that_it_failed_in():
    played = play(ToolLoop(seven, flaky=1), say("<answer>7</answer>"))
    assert (played.end, played.reward, len(played.turns)) == (EndReason.FAILED, None, 1)
    assert played.failure.detail == "made to fail: flaky is 1"


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_is_one(share):
    with pytest.raises(ValueError, match="flaky: expected a share from 0 to 1, found"):
        ToolLoop(seven, flaky=share)


def test_an_interrupted_episode_is_played_again_to_the_same_end():
    """As a rollout that was called back goes on: a new environment is given the recorded replies."""
    replies = lookup.demonstration(4, 2)[1::2]
    first, again = (ToolLoop(functools.partial(lookup.problem, level=2)) for _ in range(2))
    assert first.reset(4) == again.reset(4)
    assert [first.step(reply) for reply in replies] == [again.step(reply) for reply in replies]


# Through the gateway

@pytest.mark.parametrize("tools_in_prompt", [True, False])
def test_a_call_that_breaks_the_format_is_told_of_and_all_turns_are_one_context(tools_in_prompt):
    written = [TOKENIZER.encode("<tool_call>lookup<arg_key>key</tool_call><|observation|>", specials=True)]
    for reply in lookup.demonstration(3, 2)[1::2]:
        after = {"role": "tool" if "tool_calls" in reply else "user", "content": ""}
        ids, weights = mask.encode(TOKENIZER, [reply, after])
        written.append([id for id, weight in zip(ids, weights) if weight])
    rest = iter(written)
    gateway = Gateway(ScriptedGenerator(lambda prompt, sampling, session: next(rest)), TOKENIZER)
    env = ToolLoop(functools.partial(lookup.problem, level=2), tools_in_prompt=tools_in_prompt)
    played = asyncio.run(rollout.play(env, gateway, task="lookup", seed=3, id="lookup-3",
                                      options=Options(thinking=False)))
    assert (played.end, played.reward) == (EndReason.DONE, 1)
    assert [turn.info["calls"] for turn in played.turns] == [0, 1, 1, 0]
    assert [turn.extends for turn in played.turns] == [None, 0, 1, 2]
    assert played.turns[1].messages == ({"role": "tool", "content": NEITHER},)
