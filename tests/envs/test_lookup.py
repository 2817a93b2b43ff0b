"""The store behind a tool: what is asked, what calls show of it, and how a demonstration solves it."""

import hashlib

import pytest

from glm5_jax.envs import lookup
from glm5_jax.envs.base import Limits
from glm5_jax.envs.episode import run_episode
from glm5_jax.envs.tool_loop import ToolLoop
from glm5_jax.envs.verifiable.task import INSTRUCTION
from glm5_jax.records import EndReason
from glm5_jax.text import mask, stream, tools
from glm5_jax.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.packaged()
LEVELS = (1, 2, 3)


def ask(key):
    return {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "lookup",
                                                                             "arguments": {"key": key}}}]}


def env(level, **options):
    return ToolLoop(lambda seed: lookup.problem(seed, level), **options)


def play(level, seed, generate, turns=5):
    return run_episode(env(level), generate, task="lookup", seed=seed, limits=Limits(turns=turns))


@pytest.mark.parametrize("level", LEVELS)
def test_the_demonstration_solves_it_and_sees_what_it_shows(level):
    for seed in range(20):
        shown = lookup.demonstration(seed, level)
        replies = iter(shown[1::2])
        played = play(level, seed, lambda messages, tools: next(replies))
        assert (played.end, played.reward, len(played.turns)) == (EndReason.DONE, 1, level + 1)
        assert [*played.sent(level), played.turns[level].reply] == shown
        assert played.tools == (lookup.DEFINITION,)


def follow(messages, definitions):
    """Solves any level by the question and the results alone."""
    last = messages[-1]["content"]
    if messages[-1]["role"] == "user":
        return ask(last.split('"')[1])
    return ask(last) if not last.isdigit() else {"role": "assistant", "content": f"<answer>{last}</answer>"}


@pytest.mark.parametrize("level", LEVELS)
def test_the_question_and_the_results_are_enough(level):
    assert all(play(level, seed, follow).reward == 1 for seed in range(50))


def test_one_call_too_few_earns_nothing():
    assert all(play(2, seed, follow, turns=2).reward == 0 for seed in range(10))


def test_the_question_alone_does_not_tell_the_answer():
    """One question has many answers: only the store knows."""
    answers = {}
    for seed in range(6000):
        task = lookup.problem(seed).task
        assert task.solution not in task.prompt and 100 <= int(task.solution) <= 999
        answers.setdefault(task.prompt, []).append(task.solution)
    assert len(answers) > 1000
    assert all(len(set(some)) > 1 for some in answers.values() if len(some) > 4)


def test_an_unknown_key_can_be_reacted_to():
    world = env(1)
    question = world.reset(0).messages[0]
    step = world.step(ask("no such thing"))
    assert (step.messages[0]["content"], step.done, step.info["errors"]) == ("error: no key 'no such thing'", False, 1)
    number = world.step(follow([question], ())).messages[0]["content"]
    assert world.step({"role": "assistant", "content": f"<answer>{number}</answer>"}).reward == 1


def test_a_question_without_its_instruction():
    """The sentence and the blank before it go, and nothing else."""
    for level, rest in ((1, "."), (2, " and then each result, until it is a number.")):
        asked, shown = (lookup.problem(5, level, instruction="").task, lookup.demonstration(5, level, instruction=""))
        key = shown[1]["tool_calls"][0]["function"]["arguments"]["key"]
        assert asked.prompt == shown[0]["content"] == f'Look up "{key}"{rest}'
        full = lookup.demonstration(5, level)
        assert full[0]["content"] == f"{asked.prompt} {INSTRUCTION}" and full[1:] == shown[1:]
        assert asked.check(asked.solution)


def test_a_level_that_there_is_not():
    with pytest.raises(ValueError, match="level: expected 1 to 3, found 4"):
        lookup.problem(0, 4)


def test_the_same_seed_is_the_same_problem_on_every_python():
    text = repr([lookup.demonstration(seed, level) for level in LEVELS for seed in range(5)])
    found = hashlib.sha256(text.encode()).hexdigest()
    assert found == "d9a30da118ee96c8508e5950cc253e538d01a48ae9e2765a035e5ce700af5356"


# Tokens

@pytest.mark.parametrize("tool_tokens, in_prompt", [(0, False), (170, True)])
def test_a_prompt_is_short(tool_tokens, in_prompt):
    for level in LEVELS:
        for seed in range(50):
            start = env(level, tools_in_prompt=in_prompt).reset(seed)
            ids, _ = mask.encode(TOKENIZER, start.messages, start.tools, add_generation_prompt=True)
            assert len(ids) <= tool_tokens + 60


@pytest.mark.parametrize("level", (1, 2))
@pytest.mark.parametrize("instruction", ("", INSTRUCTION))
def test_every_key_is_the_same_two_tokens_in_the_question_in_a_result_and_in_a_call(level, instruction):
    """A small model copies tokens: those behind the quotation mark in the question, and those of a result."""
    question = lookup.demonstration(0, level, instruction=instruction)[0]["content"].split('"')
    keys = {f"{adjective} {noun}" for adjective in lookup.ADJECTIVES for noun in lookup.NOUNS}
    assert len(keys) == 1280
    for key in keys:
        ids, _ = mask.encode(TOKENIZER, [{"role": "user", "content": f'{question[0]}"{key}"{question[2]}'}, ask(key),
                                         {"role": "tool", "content": key}])
        pair = TOKENIZER.encode(key)
        assert len(pair) == 2 and sum(list(some) == pair for some in zip(ids, ids[1:])) == 3, key


def test_prompts_of_a_level_are_as_long_as_each_other():
    for level in LEVELS:
        assert len({len(mask.encode(TOKENIZER, lookup.demonstration(seed, level, instruction="")[:1])[0])
                    for seed in range(100)}) == 1


@pytest.mark.parametrize("definitions", [[lookup.DEFINITION], []])
def test_a_call_that_is_written_in_tokens_is_read_back(definitions):
    for message in lookup.demonstration(0, 3)[1:-1:2]:
        ids, weights = mask.encode(TOKENIZER, [message, {"role": "tool", "content": ""}])
        written = [id for id, weight in zip(ids, weights) if weight]
        reply = stream.read_ids(TOKENIZER, written, thinking=False)
        found, errors = tools.understand(reply, definitions)
        assert found["tool_calls"][0]["function"] == message["tool_calls"][0]["function"]
        assert bool(errors) is (not definitions)
