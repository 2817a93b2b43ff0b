"""What to look at: flags over the history of a reward's figures.

A flag is a finding, not a proof: it says which figures crossed which limit, and where to look.
"""

import dataclasses
import enum
import math
from collections.abc import Callable, Iterator, Sequence

from glm5_jax.records import Message
from glm5_jax.records.fields import Record
from glm5_jax.rewards.blend import TOTAL
from glm5_jax.rewards.monitor import Snapshot, witnessed


class Finding(enum.StrEnum):
    """What may be wrong with a reward."""

    DIVERGES = "diverges"  # it rises, and a held-out scorer of its dimension does not: it may be hacked
    LENGTH = "length"  # it goes with length, and replies get longer
    REPEATS = "repeats"  # replies repeat themselves more and more
    EVEN = "even"  # its values are the same all over a group: it teaches nothing
    NOISE = "noise"  # it says different things of equal replies
    SATURATED = "saturated"  # nearly all replies get the most: it teaches nothing any more


LOOK = {
    Finding.DIVERGES: "read the replies that this scorer likes best and the witness least; retrain or replace it",
    Finding.LENGTH: "compare short and long replies of one group; bound the length, or have the scorer ignore it",
    Finding.REPEATS: "read the longest replies; reward `rules.fresh`",
    Finding.EVEN: "take other prompts, or a scorer that grades more finely",
    Finding.NOISE: "ask the judge several times and take the mean, or weigh it less",
    Finding.SATURATED: "take harder prompts, or end the stage",
}


@dataclasses.dataclass(frozen=True)
class Flag(Record):
    """One finding, at the first step where its figures crossed the limits."""

    finding: Finding
    scorer: str  # or the total
    step: int
    evidence: Message  # the figures
    look: str


@dataclasses.dataclass(frozen=True)
class Limits:
    """From where on something is a finding. Means over `window` steps count; changes are from the first such window to
    the latest, which must not overlap."""

    window: int = 5
    rise: float = 0.1  # of a scorer's mean, that its witnesses are asked about
    witness: float = 0.25  # share of that rise: a witness that rises less does not confirm it
    length: float = 0.5  # correlation with the number of words
    longer: float = 1.3  # times as many words as in the beginning
    repeats: float = 0.15  # more than in the beginning, share of runs of words
    most: float = 0.9  # share of even groups, or of saturated values
    noise: float = 0.5  # of the spread

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"Limits.{field.name}: expected more than 0, found {getattr(self, field.name)!r}")


def flags(history: Sequence[Snapshot], limits: Limits = Limits()) -> tuple[Flag, ...]:
    """Every finding of every scorer once, in the order of the steps; fewer snapshots than a window have none.

    Every call goes through the whole history.
    """
    found: dict[tuple[Finding, str, str], Flag] = {}
    for end in range(limits.window, len(history) + 1):
        now = history[end - limits.window:end]
        before = history[:limits.window] if end >= 2 * limits.window else None
        for finding, scorer, witness, evidence in _findings(before, now, limits):
            flag = Flag(finding, scorer, now[-1].step, evidence, LOOK[finding])
            found.setdefault((finding, scorer, witness), flag)
    return tuple(found.values())


_Found = tuple[Finding, str, str, Message]  # with the scorer, its witness or "", and the evidence


def _findings(before: Sequence[Snapshot] | None, now: Sequence[Snapshot], limits: Limits) -> Iterator[_Found]:
    counting = [figures.scorer for figures in now[-1].scorers if figures.weight]
    for scorer in counting:
        yield from _of_level(scorer, now, limits)
    if before is None:
        return
    words, words_before = (_mean(part, lambda one: one.words) for part in (now, before))
    for scorer in counting:
        length = _mean(now, _figure(scorer, "length"))
        if length >= limits.length and words >= limits.longer * words_before:
            yield Finding.LENGTH, scorer, "", _evidence(correlation=length, words_before=words_before, words=words)
    repeated, repeated_before = (_mean(part, lambda one: one.repeated) for part in (now, before))
    if repeated - repeated_before >= limits.repeats:
        yield Finding.REPEATS, TOTAL, "", _evidence(repeated_before=repeated_before, repeated=repeated)
    for one, other in witnessed(now[-1].scorers):
        yield from _of_witness(one.scorer, other.scorer, before, now, limits)


def _of_level(scorer: str, now: Sequence[Snapshot], limits: Limits) -> Iterator[_Found]:
    mean, spread, even, saturated, noise = (_mean(now, _figure(scorer, name))
                                            for name in ("mean", "spread", "even", "saturated", "noise"))
    if saturated >= limits.most:
        yield Finding.SATURATED, scorer, "", _evidence(saturated=saturated, mean=mean)
    elif even >= limits.most:
        yield Finding.EVEN, scorer, "", _evidence(even=even, mean=mean)
    if noise > 0 and noise >= limits.noise * spread:
        yield Finding.NOISE, scorer, "", _evidence(noise=noise, spread=spread)


def _of_witness(scorer: str, witness: str, before: Sequence[Snapshot], now: Sequence[Snapshot],
                limits: Limits) -> Iterator[_Found]:
    rise, confirmed = (_mean(now, _figure(name, "mean")) - _mean(before, _figure(name, "mean"))
                       for name in (scorer, witness))
    if rise >= limits.rise and confirmed <= limits.witness * rise:
        correlation, correlation_before = (_mean(part, _agreement(scorer, witness)) for part in (now, before))
        yield Finding.DIVERGES, scorer, witness, {"witness": witness} | _evidence(
            rise=rise, witness_rise=confirmed, correlation_before=correlation_before, correlation=correlation)


_Get = Callable[[Snapshot], float | None]


def _mean(snapshots: Sequence[Snapshot], get: _Get) -> float:
    """NaN, with which no comparison holds, where nothing shows it."""
    values = [value for value in map(get, snapshots) if value is not None]
    return math.fsum(values) / len(values) if values else math.nan


def _figure(scorer: str, name: str) -> _Get:
    return lambda snapshot: next((getattr(one, name) for one in snapshot.scorers if one.scorer == scorer), None)


def _agreement(scorer: str, witness: str) -> _Get:
    return lambda snapshot: next((one.correlation for one in snapshot.agreements
                                  if (one.scorer, one.witness) == (scorer, witness)), None)


def _evidence(**figures: float) -> Message:
    return {name: None if math.isnan(value) else value for name, value in figures.items()}
