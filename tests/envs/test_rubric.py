"""Rubrics over functions that behave and functions that do not; the worker imports them from this very module."""

import concurrent.futures
import ctypes
import math
import os
import sys
import time
from fractions import Fraction

import pytest

from glm5_jax.envs.rubric import PartFailure, Rubric

WALL_S = 60


def exact(answer, expected):
    return float(answer == expected)


def share(answer, expected):
    return len(set(answer) & set(expected)) / len(set(expected))


def constant(value):
    return value


def hangs(value):
    time.sleep(1000)


def raises(value):
    raise LookupError(f"nothing about {value}")


def leaves(value):
    sys.exit(0)


def crashes(value):
    ctypes.string_at(0)


def ends(value):
    print("last words", file=sys.stderr, flush=True)
    os._exit(3)


def prints(value):
    print("loud")
    sys.stdin.read()
    os.system("echo loud")
    return value


def garbles(value):
    for fd in range(3, 20):
        try:
            os.write(fd, b"[]\n")
        except OSError:
            pass
    return value


def answers_twice(value):
    for fd in range(3, 20):
        try:
            os.write(fd, b'{"value": 0.5}\n')
        except OSError:
            pass
    return value


def forks(value):
    if child := os.fork():
        os.waitpid(child, 0)
    return value


def half(value):
    return value / 2


def grows(value):
    held = []
    while True:
        held.append(b"x" * 10**6)


def process(value):
    return os.getpid() / 2**32


def has_jax(value):
    return any(name.split(".")[0] in ("jax", "flax") for name in sys.modules)


class Reward:
    def method(self, value):
        return 1.0


def test_a_weighted_sum():
    with Rubric([("exact", exact, 0.75), ("share", share, 0.5)], wall_s=WALL_S) as rubric:
        right, half = rubric.score("ab", expected="ab"), rubric.score("a", expected="ab")
    assert (right.total, half.total) == (1.25, 0.25)
    assert {name: (part.value, part.weight, part.failure) for name, part in half.parts.items()} == {
        "exact": (0.0, 0.75, None), "share": (0.5, 0.5, None)}


@pytest.mark.parametrize("function, failure, detail", [
    (raises, PartFailure.ERROR, "LookupError: nothing about 1"),
    (leaves, PartFailure.ERROR, "SystemExit"),
    (crashes, PartFailure.CRASH, "code 139"),
    (ends, PartFailure.CRASH, "last words"),
    (garbles, PartFailure.CRASH, "JSON object"),
    (answers_twice, PartFailure.CRASH, "JSON object"),
])
def test_a_failing_function_costs_its_own_points_alone(function, failure, detail):
    with Rubric([("before", constant, 1.0), ("bad", function, 1.0), ("after", constant, 1.0)], wall_s=WALL_S) as rubric:
        for _ in range(2):
            score = rubric.score(1)
            bad = score.parts["bad"]
            assert (score.total, bad.value, bad.failure) == (2.0, 0.0, failure)
            assert detail in bad.detail


def test_a_function_has_its_time():
    with Rubric([("first", hangs, 1.0), ("second", hangs, 1.0)], wall_s=0.5) as rubric:
        score = rubric.score(1)
    assert (score.total, {part.failure for part in score.parts.values()}) == (0.0, {PartFailure.TIMEOUT})


def test_a_function_may_fork():
    parts = [("before", process, 1.0), ("forks", forks, 1.0), ("half", half, 1.0), ("after", process, 1.0)]
    with Rubric(parts, wall_s=WALL_S) as rubric:
        for value in (1.0, 0.5, 0.25):
            before, *found, after = (part.value for part in rubric.score(value).parts.values())
            assert (found, after) == ([value, value / 2], before)


def test_an_interrupted_call_is_not_answered_to_the_next(monkeypatch):
    def interrupted(*arguments, **keywords):
        raise KeyboardInterrupt
    with Rubric([("process", process, 1.0)], wall_s=WALL_S) as rubric:
        first = rubric.score(1).total
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(rubric._worker, "exchange", interrupted)
            rubric.score(1)
        assert rubric.score(1).total != first


def test_a_function_has_its_memory():
    with Rubric([("grows", grows, 1.0)], wall_s=WALL_S, memory_bytes=300 * 2**20) as rubric:
        assert rubric.score(1).parts["grows"].failure is PartFailure.MEMORY


def test_what_is_no_reward_is_invalid():
    with Rubric([("constant", constant, 1.0)], wall_s=WALL_S) as rubric:
        for value in (-0.1, 1.1, math.nan, math.inf, None, "1", [1.0], 10**400, 1j):
            part = rubric.score(value).parts["constant"]
            assert (part.value, part.failure) == (0.0, PartFailure.INVALID), value
            assert part.detail == f"expected a finite number from 0 to 1, found {value!r}"


def test_what_is_a_number_is_a_reward():
    with Rubric([("constant", constant, 1.0)], wall_s=WALL_S) as rubric:
        for value in (0, 1, True, 0.25, Fraction(1, 4)):
            total = rubric.score(value).total
            assert (type(total), total) == (float, float(value))


def test_a_function_may_print_and_read():
    with Rubric([("prints", prints, 1.0)], wall_s=WALL_S) as rubric:
        assert [rubric.score(value).total for value in (1, 0.5)] == [1.0, 0.5]


def test_another_process_without_jax_and_the_same_for_all_calls():
    with Rubric([("process", process, 1.0), ("jax", has_jax, 1.0)], wall_s=WALL_S) as rubric:
        first, second = rubric.score(0), rubric.score(0)
    assert first == second
    assert first.parts["process"].value != process(0)
    assert first.parts["jax"].value == 0


def test_threads_wait_for_each_other():
    with Rubric([("constant", constant, 1.0)], wall_s=WALL_S) as rubric, \
            concurrent.futures.ThreadPoolExecutor(4) as pool:
        values = [i / 20 for i in range(20)]
        assert [score.total for score in pool.map(rubric.score, values)] == values


def test_closed_rubrics_leave_no_process():
    rubric = Rubric([("process", process, 1.0)], wall_s=WALL_S)
    worker = round(rubric.score(0).total * 2**32)
    assert os.path.exists(f"/proc/{worker}")
    rubric.close()
    rubric.close()
    assert not os.path.exists(f"/proc/{worker}")


def inner():
    def function(value):
        return 1.0
    return function


def main_function():
    function = lambda value: 1.0
    function.__module__, function.__qualname__ = "__main__", "main_function"
    sys.modules["__main__"].main_function = function
    return function


@pytest.mark.parametrize("function", [lambda value: 1.0, inner(), 3, None, main_function(), Reward().method])
def test_a_function_must_be_importable(function):
    with pytest.raises(ValueError, match="part strange: expected a function at the top"):
        Rubric([("fine", constant, 1.0), ("strange", function, 1.0)])


@pytest.mark.parametrize("parts, message", [
    ([], "one or more"),
    ([("a", constant, 1.0), ("a", exact, 1.0)], "name of its own"),
    ([("a", constant, math.nan)], "part a: expected a finite weight"),
])
def test_wrong_parts_are_named(parts, message):
    with pytest.raises(ValueError, match=message):
        Rubric(parts)


def test_arguments_must_be_picklable():
    with Rubric([("constant", constant, 1.0)]) as rubric, pytest.raises(ValueError, match="pickled"):
        rubric.score(lambda: 1)
