"""Rewards as a weighted sum of functions, each called in another process under a time limit.

A function that raises, hangs, crashes or answers nonsense scores 0 with a typed reason, and the episode goes on. The
process protects from accidents, not from malice: what a model wrote belongs into the sandbox, and a reward function
may call that. Cost: the process starts at the first `score`, some 50 ms and what importing the functions' modules
takes, and again after a hang or a crash; a call costs the pickling of its arguments and well below a millisecond.
"""

import base64
import contextlib
import dataclasses
import enum
import json
import math
import os
import pickle
import secrets
import sys
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from glm5_jax.envs import plain, rubric_worker
from glm5_jax.envs.confine import Limits
from glm5_jax.envs.process import Outcome, Process, Reply

RewardFunction = Callable[..., float]

_START_S = 120.0
# The worker lives long; each of its calls has a time limit already.
_LIFE_S = 1e7


class PartFailure(enum.StrEnum):
    """Why a part scored 0."""

    ERROR = "error"
    """The function raised an exception."""
    TIMEOUT = "timeout"
    MEMORY = "memory"
    CRASH = "crash"
    """The function ended its process, or garbled its output."""
    INVALID = "invalid"
    """The function returned something else than a finite number from 0 to 1."""


@dataclasses.dataclass(frozen=True)
class PartScore:
    """What one function said; `failure` is None where `value` is its own."""

    value: float
    weight: float
    failure: PartFailure | None = None
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Score:
    """`total` is the sum of weight times value over `parts`, which are named and in the rubric's order."""

    total: float
    parts: Mapping[str, PartScore]


class Rubric:
    """Scores with a list of (name, function, weight); use it as a context manager, for it holds a process.

    A function takes the arguments of `score`, all picklable, and returns a number from 0 to 1. It must be importable by
    name, so no lambda, no inner function, nothing of `__main__`. `wall_s` seconds are for each function, `memory_bytes`
    for the process. Raises ValueError for a rubric that breaks these rules. Calls of `score` from several threads wait
    for each other.
    """

    def __init__(self, parts: Sequence[tuple[str, RewardFunction, float]], *, wall_s: float = 10.0,
                 memory_bytes: int = 2**31) -> None:
        names = [name for name, _, _ in parts]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"parts: expected one or more, each with a name of its own, found {names}")
        for name, function, weight in parts:
            _check_importable(name, function)
            if not math.isfinite(weight):
                raise ValueError(f"part {name}: expected a finite weight, found {weight!r}")
        self._parts = tuple(parts)
        self._limits = Limits(wall_s=wall_s, cpu_s=_LIFE_S, memory_bytes=memory_bytes)
        self._worker: Process | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> "Rubric":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process; the next `score` would start another."""
        with self._lock:
            self._stop()

    def score(self, *arguments: Any, **keywords: Any) -> Score:
        """Calls every function with these arguments. Raises ValueError for an argument that cannot be pickled."""
        found = {}
        with self._lock:
            for name, function, weight in self._parts:
                value, failure, detail = self._call(function, arguments, keywords)
                found[name] = PartScore(value, weight, failure, detail)
        return Score(sum(part.weight * part.value for part in found.values()), found)

    def _call(self, function: RewardFunction, arguments: tuple,
              keywords: dict) -> tuple[float, PartFailure | None, str]:
        try:
            request = _pack([function], self._limits.wall_s, arguments, keywords)
        except Exception as error:
            raise ValueError(f"score: expected arguments that can be pickled, found {error}") from error
        requests = [(request, self._limits.wall_s)]
        answer: dict[str, Any] = {}
        try:
            if self._worker is None:
                self._worker = self._start()
                # Imports are not the first function's time.
                everything = [other for _, other, _ in self._parts]
                requests.insert(0, (_pack(everything, _START_S, None, {}), _START_S))
            for text, seconds in requests:
                number = secrets.token_hex(16)
                reply = self._worker.exchange(f"{number} {text}", wall_s=seconds)
                read = _read(reply.line, number)
                if reply.outcome is not None or read is None:
                    self._stop()
                    return 0.0, *_failure(reply)
                answer = read
        except BaseException:
            # A worker that may still answer this call is of no use for the next one.
            self._stop()
            raise
        value, problem = answer.get("value"), answer.get("error")
        if problem is not None:
            return 0.0, PartFailure.ERROR, str(problem)
        if not isinstance(value, float) or not 0 <= value <= 1:
            return 0.0, PartFailure.INVALID, f"expected a finite number from 0 to 1, found {value}"
        return value, None, ""

    def _start(self) -> Process:
        path = os.pathsep.join(folder for folder in sys.path if folder)
        return plain.start([sys.executable, "-m", rubric_worker.__name__], self._limits,
                           {**os.environ, "PYTHONPATH": path}, os.getcwd(), contextlib.ExitStack())

    def _stop(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None


def _read(line: str | None, number: str) -> dict[str, Any] | None:
    """The reply to request `number`, or None for what is another one or none."""
    try:
        answer = json.loads(line or "")
    except (ValueError, RecursionError):
        return None
    return answer if isinstance(answer, dict) and answer.get("id") == number else None


def _failure(reply: Reply) -> tuple[PartFailure, str]:
    if reply.outcome is None:
        found = (reply.line or "")[:1000]
        return PartFailure.CRASH, f"expected a JSON object that answers this call, found {found!r}"
    failure = {Outcome.TIMEOUT: PartFailure.TIMEOUT, Outcome.MEMORY: PartFailure.MEMORY}
    code = "" if reply.returncode is None else f", code {reply.returncode}"
    return failure.get(reply.outcome, PartFailure.CRASH), f"{reply.outcome}{code}: {reply.stderr[-1000:]}"


def _pack(functions: list[RewardFunction], seconds: float, arguments: tuple | None, keywords: dict) -> str:
    return base64.b64encode(pickle.dumps((functions, seconds, arguments, keywords))).decode()


def _check_importable(name: str, function: RewardFunction) -> None:
    found = repr(function)
    if isinstance(function, (types.FunctionType, types.BuiltinFunctionType)):
        try:
            pickle.dumps(function)
            if function.__module__ != "__main__":
                return
            found = "one of __main__, which another process cannot import"
        except (pickle.PicklingError, AttributeError) as error:
            found = str(error)
    raise ValueError(f"part {name}: expected a function at the top of an importable module, found {found}")
