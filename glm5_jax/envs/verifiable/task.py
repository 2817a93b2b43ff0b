"""A task with an exact checker, the answer a reply gives to it, and the environment that asks it.

The contract of an answer: the text between the last `</answer>` of a reply and the last `<answer>` before it, without
outer white space. Reasoning is not searched. What stands before is free, an echo of the prompt included, and of several
answers only the last counts.
"""

import dataclasses
import hashlib
import random
from collections.abc import Callable, Sequence
from typing import TypeVar

from glm5_jax.envs.base import Start, Step
from glm5_jax.records import Message

INSTRUCTION = "Give the final answer as <answer>...</answer>."
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Task:
    """One problem. The model sees `prompt` and nothing else of it."""

    name: str
    seed: int
    prompt: str
    solution: str  # one answer that is right
    check: Callable[[str], bool]  # whether this answer is right; any text may come, of any length

    def reward(self, message: Message) -> float:
        """1.0 for a reply whose answer is right, else 0.0."""
        answer = final_answer(message)
        return float(answer is not None and self.check(answer))


class Verifiable:
    """The environment of one question and one reply: `make` gives the task of a seed."""

    def __init__(self, make: Callable[[int], Task]):
        self._make = make
        self.task: Task | None = None

    def reset(self, seed: int) -> Start:
        self.task = self._make(seed)
        return Start(({"role": "user", "content": self.task.prompt},))

    def step(self, message: Message) -> Step:
        if self.task is None:
            raise RuntimeError("Verifiable.step: expected a reset before it, found none")
        return Step((), self.task.reward(message), True, {"answered": final_answer(message) is not None})

    def close(self) -> None:
        self.task = None


class Dice:
    """Random choices that are the same on every version of Python: only `random.Random.random` promises that."""

    def __init__(self, *key: str | int):
        digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
        self._random = random.Random(int.from_bytes(digest))

    def below(self, count: int) -> int:
        return int(self._random.random() * count)

    def between(self, low: int, high: int) -> int:
        """An integer from `low` to `high`, both included."""
        return low + self.below(high - low + 1)

    def choice(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        rest = list(items)
        return [rest.pop(self.below(len(rest))) for _ in items]


def final_answer(message: Message) -> str | None:
    """The answer that the content of a message gives, by the contract above; None if it gives none."""
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(part["text"] for part in content
                          if isinstance(part, dict) and isinstance(part.get("text"), str))
    if not isinstance(content, str):
        return None
    end = content.rfind("</answer>")
    start = content.rfind("<answer>", 0, max(end, 0))
    return None if start < 0 else content[start + len("<answer>"):end].strip()


def graded(level: int, grades: Sequence[T]) -> T:
    """The grade of a level; raises ValueError for a level that is not one of 1 to the number of grades."""
    if not 1 <= level <= len(grades):
        raise ValueError(f"level: expected 1 to {len(grades)}, found {level}")
    return grades[level - 1]
