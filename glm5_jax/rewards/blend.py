"""The reward of general RL: what several scorers say of an episode in three dimensions, as one number.

    total = gate(correctness) * (w_tone * tone + w_quality * quality) + w_correctness * correctness

Correctness gates the rest (GLM-5, section 3.4, calls it the prerequisite; the weights are unpublished). The value of a
dimension is the weighted mean of its scorers. A scorer of weight 0 is held out: it is asked and kept, and counts
nothing, so that it shows whether what is rewarded is what is meant (`monitor`).
"""

import asyncio
import dataclasses
import math
from collections.abc import Awaitable, Callable, Sequence

from glm5_jax.records import Trajectory
from glm5_jax.records.fields import Record
from glm5_jax.rewards.base import Dimension, Judgement, Scorer, ScorerFailed

CORRECTNESS = Dimension.CORRECTNESS
TOTAL = "total"  # what it is called among the names of scorers


def _require_weight(name: str, weight: float) -> None:
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"{name}: expected a finite number, 0 or more, found {weight!r}")


@dataclasses.dataclass(frozen=True)
class Weights:
    """Of the dimensions in the total. Raises ValueError for a negative or infinite one."""

    correctness: float = 0.5
    tone: float = 0.25
    quality: float = 0.25

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _require_weight(f"Weights.{field.name}", getattr(self, field.name))


@dataclasses.dataclass(frozen=True)
class Weighted:
    """A scorer and its weight within its dimension; 0 holds it out."""

    scorer: Scorer
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Part(Record):
    """One judgement and the weight that it had."""

    judgement: Judgement
    weight: float


@dataclasses.dataclass(frozen=True)
class Score(Record):
    """The total of one episode and everything it was made of; `tone` and `quality` are None where nobody judges."""

    total: float
    highest: float  # the total of an episode that everybody judges 1
    gate: float
    correctness: float
    tone: float | None
    quality: float | None
    parts: tuple[Part, ...]


def at_least(threshold: float) -> Callable[[float], float]:
    """The gate that is open, 1, from `threshold` on and closed, 0, below."""
    return lambda correctness: float(correctness >= threshold)


def proportional(correctness: float) -> float:
    """The gate that opens as far as the reply is correct."""
    return correctness


@dataclasses.dataclass(frozen=True)
class Blend:
    """Scorers and how they are put together. Raises ValueError where names repeat, a weight makes no sense, no scorer
    of correctness counts, or a dimension has a weight and no scorer that counts."""

    scorers: tuple[Weighted, ...]
    weights: Weights = Weights()
    gate: Callable[[float], float] = at_least(0.5)

    def __post_init__(self) -> None:
        names = [one.scorer.name for one in self.scorers]
        if len({TOTAL, *names}) <= len(names):
            raise ValueError(f"Blend.scorers: expected a name of its own for each, and not {TOTAL!r}, found {names}")
        for one in self.scorers:
            _require_weight(f"Blend.scorers: weight of {one.scorer.name!r}", one.weight)
        counting = {one.scorer.dimension for one in self.scorers if one.weight}
        for dimension in Dimension:
            needed = dimension is CORRECTNESS or getattr(self.weights, dimension) > 0
            if needed and dimension not in counting:
                raise ValueError(f"Blend.scorers: expected one of {dimension} with a weight above 0, found none"
                                 + ("; it gates the rest" if dimension is CORRECTNESS else
                                    f"; add one, or set Weights.{dimension} to 0"))


async def score(blend: Blend, trajectories: Sequence[Trajectory]) -> tuple[Score, ...]:
    """The score of each trajectory; the scorers work at the same time, and what one of them raises is raised here, with
    a note that names it. Raises ScorerFailed where one gives other judgements than one per trajectory, of its name and
    dimension."""
    judged = await asyncio.gather(*(_judgements(one.scorer, trajectories) for one in blend.scorers))
    return tuple(_score(blend, judgements) for judgements in zip(*judged, strict=True))


def as_reward(blend: Blend, keep: Callable[[Trajectory, Score], None] | None = None,
              ) -> Callable[[Trajectory], Awaitable[float]]:
    """The reward of single trajectories that an orchestrator asks for; `keep` is told each score, for log and monitor.
    """

    async def reward(trajectory: Trajectory) -> float:
        (found,) = await score(blend, [trajectory])
        if keep is not None:
            keep(trajectory, found)
        return found.total

    return reward


async def _judgements(scorer: Scorer, trajectories: Sequence[Trajectory]) -> Sequence[Judgement]:
    try:
        found = await scorer.score(trajectories)
    except Exception as error:
        error.add_note(f"while scorer {scorer.name} judged {[one.id for one in trajectories]}")
        raise
    wanted = [(scorer.name, scorer.dimension)] * len(trajectories)
    if [(one.scorer, one.dimension) for one in found] != wanted:
        raise ScorerFailed(f"scorer {scorer.name}: expected {len(trajectories)} judgements of its own name and of "
                           f"{scorer.dimension}, found {[(one.scorer, one.dimension.value) for one in found]}")
    return found


def _score(blend: Blend, judgements: Sequence[Judgement]) -> Score:
    parts = tuple(Part(judgement, one.weight) for judgement, one in zip(judgements, blend.scorers))
    correctness, tone, quality = (_mean(parts, dimension) for dimension in Dimension)
    assert correctness is not None  # a blend has a scorer of it
    return Score(_total(blend, correctness, tone or 0.0, quality or 0.0), _total(blend, 1.0, 1.0, 1.0),
                 blend.gate(correctness), correctness, tone, quality, parts)


def _total(blend: Blend, correctness: float, tone: float, quality: float) -> float:
    weights = blend.weights
    return (blend.gate(correctness) * (weights.tone * tone + weights.quality * quality)
            + weights.correctness * correctness)


def _mean(parts: Sequence[Part], dimension: Dimension) -> float | None:
    counting = [part for part in parts if part.judgement.dimension is dimension and part.weight]
    if not counting:
        return None
    return (math.fsum(part.weight * part.judgement.value for part in counting)
            / math.fsum(part.weight for part in counting))
