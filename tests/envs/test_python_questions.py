"""Calculations with an interpreter: what the sandbox does is what demonstrations show, and what is a failure."""

import functools
import hashlib
import json
import re
import threading

import pytest

from glm5_jax.envs import python_questions
from glm5_jax.envs.episode import run_episode
from glm5_jax.envs.process import Outcome, Reply
from glm5_jax.envs.sandbox import Limits, Sandbox, SandboxUnavailable
from glm5_jax.envs.tool_loop import ToolLoop
from glm5_jax.envs.verifiable.task import INSTRUCTION
from glm5_jax.records import EndReason, FailureReason
from glm5_jax.text import mask, values
from glm5_jax.text.tokenizer import Tokenizer

SANDBOX = Sandbox(limits=Limits(memory_bytes=200 * 2**20))
LEVELS = (1, 2, 3)
TOKENIZER = Tokenizer.packaged()


def run(code):
    return {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "python",
                                                                             "arguments": {"code": code}}}]}


def env(level=1, sandbox=SANDBOX):
    return ToolLoop(functools.partial(python_questions.problem, level=level, sandbox=sandbox, call_s=60.0))


def play(world, seed, replies):
    rest = iter(replies)
    return run_episode(world, lambda messages, tools: next(rest), task="python", seed=seed)


@pytest.mark.parametrize("level", LEVELS)
def test_the_demonstration_is_what_the_sandbox_does(level):
    shown = python_questions.demonstration(7, level)
    played = play(env(level), 7, shown[1::2])
    assert (played.end, played.reward, len(played.turns)) == (EndReason.DONE, 1, 2)
    assert [*played.sent(1), played.turns[1].reply] == shown
    assert played.tools == (python_questions.DEFINITION,)


@pytest.mark.parametrize("level, form", [
    (1, r"\d\d \* \d\d"), (2, r"\d\d \* \d\d \+ \d\d"), (3, r"\d{3} \* \d{3} % \d{3}")])
def test_questions_differ_and_their_values_are_right_and_short(level, form):
    prompts = set()
    for seed in range(3000):
        task = python_questions.problem(seed, level).task
        code = re.fullmatch(rf"What is ({form})\? Give the final answer as <answer>...</answer>.", task.prompt)[1]
        assert task.solution == str(eval(code)) and 0 <= int(task.solution) < 10_000
        assert all(int(number) >= 11 for number in re.findall(r"\d+", code))
        assert task.check(task.solution) and not task.check(str(int(task.solution) + 1)) and not task.check("")
        prompts.add(task.prompt)
    assert len(prompts) > 2000


def test_steps_may_come_from_any_thread_and_variables_are_kept():
    world = env()
    world.reset(0)
    texts = []

    def step(code):
        texts.append(world.step(run(code)).messages[0]["content"])

    try:
        for code in ("x = 5", "x + 1", "1 / 0", "x * 2"):
            thread = threading.Thread(target=step, args=(code,))
            thread.start()
            thread.join()
    finally:
        world.close()
    assert texts[:2] == ["", "6"] and texts[3] == "10"
    assert "ZeroDivisionError" in texts[2] and len(texts[2]) < 250


def test_nothing_is_started_before_a_call_and_threads_end():
    class Unused:
        def start(self, command):
            raise AssertionError("started")

    before = set(threading.enumerate())
    played = play(env(sandbox=Unused()), 0, [{"role": "assistant", "content": "<answer>1</answer>"}])
    assert (played.end, played.reward) == (EndReason.DONE, 0) and set(threading.enumerate()) <= before


class Fake:
    """A sandbox whose interpreter says 4 to everything, or is killed from outside."""

    limits = Limits()

    def __init__(self, outcome=None):
        self.outcome, self.closed = outcome, False

    def start(self, command):
        return self

    def exchange(self, request, wall_s):
        answer = json.dumps({"id": json.loads(request)["id"], "value": "4", "error": None})
        return Reply(self.outcome, None, None if self.outcome else answer, "", False)

    def close(self):
        self.closed = True


def test_the_interpreter_ends_with_the_episode():
    fake = Fake()
    world = env(sandbox=fake)
    world.reset(0)
    assert world.step(run("1")).messages[0]["content"] == "4" and not fake.closed
    world.close()
    assert fake.closed


def test_a_machine_without_sandboxes_and_an_interpreter_that_is_killed_are_failures():
    class Nowhere:
        def start(self, command):
            raise SandboxUnavailable("no bubblewrap")

    for broken, words in ((Nowhere(), "no bubblewrap"), (Fake(Outcome.KILLED), "killed from outside")):
        played = play(env(sandbox=broken), 0, [run("1")])
        assert (played.end, played.failure.reason) == (EndReason.FAILED, FailureReason.ENVIRONMENT)
        assert words in played.failure.detail


def test_the_same_seed_is_the_same_problem_on_every_python():
    text = repr([python_questions.demonstration(seed, level) for level in LEVELS for seed in range(5)])
    found = hashlib.sha256(text.encode()).hexdigest()
    assert found == "ccd5c52fc603c2fdcec25746300ba06eb5576fc74e9a33d6b48422eb1c545d15"


def test_a_question_without_its_instruction():
    """The sentence and the blank before it go, and nothing else."""
    for level in LEVELS:
        asked = python_questions.problem(5, level, instruction="").task
        shown, full = python_questions.demonstration(5, level, instruction=""), python_questions.demonstration(5, level)
        code = shown[1]["tool_calls"][0]["function"]["arguments"]["code"]
        assert asked.prompt == shown[0]["content"] == f"What is {code}?"
        assert full[0]["content"] == f"{asked.prompt} {INSTRUCTION}" and full[1:] == shown[1:]
        assert asked.check(asked.solution)


def test_a_level_that_there_is_not():
    with pytest.raises(ValueError, match="level: expected 1 to 3, found 0"):
        python_questions.problem(0, 0)


@pytest.mark.parametrize("level", LEVELS)
def test_prompts_are_short_and_code_needs_no_schema(level):
    for seed in range(50):
        shown = python_questions.demonstration(seed, level)
        code = shown[1]["tool_calls"][0]["function"]["arguments"]["code"]
        assert values.guessed(code) == code and len(TOKENIZER.encode(shown[2]["content"])) <= 4
        bare, full = (len(mask.encode(TOKENIZER, shown[:1], definitions, add_generation_prompt=True)[0])
                      for definitions in ([], [python_questions.DEFINITION]))
        assert bare <= 60 and full <= 230
