"""Style anchors: how far a text is from a set of references that people have written.

A text is counted in five profiles: pairs of characters, function words, lengths of words, the signs that words end in,
and its own length in words. The distance of two sets of texts is the mean over the profiles of the square root of the
Jensen-Shannon divergence (base 2) of their frequencies: 0 where they are equal, 1 where they share nothing. Content
hardly counts, so that references of any topic anchor a style (GLM-5, section 3.4, injects expert replies to this end).
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence

from glm5_jax.envs.verifiable.task import Dice
from glm5_jax.records import Trajectory
from glm5_jax.rewards.base import Dimension, Judgement, final_text

FUNCTION_WORDS = frozenset(
    "a an and are as at be been but by can could did do does for from had has have he her him his how i if in is it "
    "its may me must my no not of on or our she should so some than that the their them then there these they this "
    "to us was we were what when which who will with would you your".split())
_WORD = re.compile(r"(\w+(?:['’]\w+)*)([^\w\s]?)")

Counts = collections.Counter[str]


@dataclasses.dataclass(frozen=True)
class Anchors:
    """References of the wanted style, two or more that are not empty. Raises ValueError for others."""

    references: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.references) < 2 or not all(_WORD.search(one) for one in self.references):
            raise ValueError(f"Anchors.references: expected two or more, each with a word in it, found "
                             f"{self.references!r:.200}")
        if self.typical == 1.0:
            raise ValueError("Anchors.references: expected texts that have something in common, found none that do")

    @functools.cached_property
    def pooled(self) -> dict[str, Counts]:
        """The profiles of all references together."""
        return profiles(self.references)

    @functools.cached_property
    def typical(self) -> float:
        """The mean distance of a reference from all the others."""
        alone = [profiles([one]) for one in self.references]
        return math.fsum(_between(one, {name: self.pooled[name] - one[name] for name in one})
                         for one in alone) / len(alone)


@dataclasses.dataclass(frozen=True)
class AnchorScorer:
    """The scorer of `closeness` for the last reply."""

    name: str
    dimension: Dimension
    anchors: Anchors

    async def score(self, trajectories: Sequence[Trajectory]) -> tuple[Judgement, ...]:
        return tuple(Judgement(self.name, self.dimension, closeness(self.anchors, final_text(one)))
                     for one in trajectories)


def closeness(anchors: Anchors, text: str) -> float:
    """1 for a text as near to the references as they are to each other, or nearer, down to 0 for one that shares
    nothing with them."""
    return min(1.0, (1.0 - _between(profiles([text]), anchors.pooled)) / (1.0 - anchors.typical))


def distance(texts: Sequence[str], references: Sequence[str]) -> float:
    """The distance of two sets, 0 to 1. Over training, that of replies from references shows where the style goes."""
    return _between(profiles(texts), profiles(references))


def chosen(anchors: Anchors, count: int, seed: int) -> tuple[str, ...]:
    """`count` of the references, the same for the same seed: what a judge is shown beside the answer."""
    if not 1 <= count <= len(anchors.references):
        raise ValueError(f"count: expected 1 to {len(anchors.references)}, found {count}")
    return tuple(Dice("anchors", seed).shuffled(anchors.references)[:count])


def for_judge(anchors: Anchors, count: int) -> Callable[[Trajectory], tuple[str, ...]]:
    """The `references` of a judge's scorer: those chosen by the trajectory's seed."""
    return lambda trajectory: chosen(anchors, count, trajectory.seed)


def profiles(texts: Sequence[str]) -> dict[str, Counts]:
    """What is counted of all texts together."""
    found: dict[str, Counts] = {name: collections.Counter() for name in ("pairs", "function", "word", "sign", "length")}
    for text in texts:
        spaced = f" {' '.join(text.split())} "
        words = _WORD.findall(text)
        found["pairs"].update(map("".join, zip(spaced, spaced[1:])))
        found["function"].update(word.lower() if word.lower() in FUNCTION_WORDS else "*" for word, _ in words)
        found["word"].update(str(min(len(word), 12)) for word, _ in words)
        found["sign"].update(sign for _, sign in words)
        found["length"].update([str(len(words).bit_length())])  # doubling lengths
    return found


def _between(one: dict[str, Counts], other: dict[str, Counts]) -> float:
    return math.fsum(_root_divergence(one[name], other[name]) for name in one) / len(one)


def _root_divergence(one: Counts, other: Counts) -> float:
    """1 where one of them is empty, since nothing is shared."""
    p_total, q_total = one.total(), other.total()
    if not p_total or not q_total:
        return 1.0
    divergence = 0.0
    for key in one.keys() | other.keys():
        p, q = one[key] / p_total, other[key] / q_total
        divergence += sum(x / 2 * math.log2(2 * x / (p + q)) for x in (p, q) if x)
    return math.sqrt(min(1.0, max(0.0, divergence)))
