"""Precise, narrow rules: small functions of the last reply's text, and the scorer that they make.

    Rule("short", Dimension.QUALITY, final(every(words(most=40), without(["as an AI"]))))

A check of a text gives a number from 0 to 1; `final` applies it to the last reply of a trajectory. What a check raises
is a failure of the scorer.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence

from glm5_jax.envs.verifiable.task import Task
from glm5_jax.records import Trajectory
from glm5_jax.rewards.base import Dimension, Judgement, ScorerFailed, final_text

Check = Callable[[str], float]


@dataclasses.dataclass(frozen=True)
class Rule:
    """The scorer that applies `check` to each trajectory. It raises ScorerFailed for what `check` raises."""

    name: str
    dimension: Dimension
    check: Callable[[Trajectory], float]

    async def score(self, trajectories: Sequence[Trajectory]) -> tuple[Judgement, ...]:
        return tuple(map(self._judge, trajectories))

    def _judge(self, trajectory: Trajectory) -> Judgement:
        try:
            return Judgement(self.name, self.dimension, self.check(trajectory))
        except Exception as error:
            raise ScorerFailed(f"scorer {self.name}, trajectory {trajectory.id}: {type(error).__name__}: {error}"
                               ) from error


def final(check: Check) -> Callable[[Trajectory], float]:
    """`check` of the text of the last reply."""
    return lambda trajectory: check(final_text(trajectory))


def answers(task: Callable[[int], Task]) -> Callable[[Trajectory], float]:
    """1 where the last reply gives the exact answer of `task(seed)`, by the contract of `envs.verifiable.task`."""
    def check(trajectory: Trajectory) -> float:
        final_text(trajectory)  # raises where there is no reply
        return task(trajectory.seed).reward(trajectory.turns[-1].reply)

    return check


def every(*checks: Check) -> Check:
    """The product: 1 only where all are."""
    return lambda text: math.prod(check(text) for check in checks)


def average(*checks: Check) -> Check:
    """The mean."""
    return lambda text: math.fsum(check(text) for check in checks) / len(checks)


def matches(pattern: str) -> Check:
    """1 where the regular expression matches the whole text; `.` is any character."""
    compiled = re.compile(pattern, re.DOTALL)
    return lambda text: float(compiled.fullmatch(text) is not None)


def words(least: int = 0, most: int | None = None) -> Check:
    """1 for `least` to `most` words, both included; words are what white space parts."""
    return lambda text: _within(len(text.split()), least, most)


def characters(least: int = 0, most: int | None = None) -> Check:
    """1 for `least` to `most` code points, both included."""
    return lambda text: _within(len(text), least, most)


def without(phrases: Sequence[str]) -> Check:
    """1 for a text with none of these phrases as whole words, whatever the case and the white space."""
    inner = has(phrases)
    return lambda text: 1.0 - inner(text)


def has(phrases: Sequence[str]) -> Check:
    """1 for a text with one of these phrases as whole words, whatever the case and the white space."""
    patterns = [_phrase(phrase) for phrase in phrases]
    return lambda text: float(any(pattern.search(text) for pattern in patterns))


def opens(phrases: Sequence[str]) -> Check:
    """1 for a text that begins with one of these phrases, such as a greeting; else as `has`."""
    patterns = [_phrase(phrase) for phrase in phrases]
    return lambda text: float(any(pattern.match(text.lstrip()) for pattern in patterns))


def fresh(run: int) -> Check:
    """1 less the share of runs of `run` words that were there before (`repeated`)."""
    return lambda text: 1.0 - repeated(text, run)


def repeated(text: str, run: int) -> float:
    """The share of a text's runs of `run` words that stand earlier in it too; 0 for a text of fewer words."""
    if run < 1:
        raise ValueError(f"run: expected 1 or more, found {run}")
    pieces = text.casefold().split()
    runs = [tuple(pieces[i:i + run]) for i in range(len(pieces) - run + 1)]
    return 1.0 - len(set(runs)) / len(runs) if runs else 0.0


def _within(count: int, least: int, most: int | None) -> float:
    return float(least <= count and (most is None or count <= most))


def _phrase(phrase: str) -> re.Pattern[str]:
    # Not \b: a phrase may begin or end with a sign.
    body = r"\s+".join(map(re.escape, phrase.split()))
    if not body:
        raise ValueError(f"phrases: expected text in each, found {phrase!r}")
    return re.compile(rf"(?<!\w){body}(?!\w)", re.IGNORECASE)
