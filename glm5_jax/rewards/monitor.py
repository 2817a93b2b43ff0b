"""What a reward looks like in a training step: spread, noise, saturation, length, agreement with witnesses.

    snapshots.append(observe(step, scored))      # the step's trajectories with their scores
    writer.write(step, collect(as_metrics(snapshots[-1])))
    flags(snapshots)                             # `rewards.flags`

All figures of spread and correlation are within groups, the replies to one problem, because there the advantage is
made. A scorer of weight 0 is held out (`blend`): policies do not learn to please it, and so it is a witness.
"""

import dataclasses
from collections.abc import Hashable, Iterable, Sequence

import jax.numpy as jnp
import numpy as np

from glm5_jax.core.metrics import Mean
from glm5_jax.records import Trajectory
from glm5_jax.records.fields import Record
from glm5_jax.rewards.base import final_text
from glm5_jax.rewards.blend import TOTAL, Score
from glm5_jax.rewards.rules import repeated

RUN = 3  # words in a row that count as repeated where they come again
SATURATED = 0.99  # of the most that a value can be
_EVEN = 1e-6  # values that differ by less are the same


@dataclasses.dataclass(frozen=True)
class Figures(Record):
    """Of one scorer, or of the total, in one step. None where nothing shows it."""

    scorer: str
    dimension: str  # empty for the total
    weight: float  # 0: held out
    mean: float
    spread: float | None  # root mean square deviation within groups of two replies or more
    even: float | None  # share of those groups whose values are all the same
    saturated: float  # share of values at the top
    noise: float | None  # root mean square deviation between equal replies to one problem
    length: float | None  # correlation with the number of words, within groups


@dataclasses.dataclass(frozen=True)
class Agreement(Record):
    """The correlation of two scorers of one dimension within groups; None where one of them has no spread."""

    scorer: str  # one that counts
    witness: str  # one that is held out
    correlation: float | None


@dataclasses.dataclass(frozen=True)
class Snapshot(Record):
    """What one training step shows."""

    step: int
    replies: int
    words: float  # of a reply, the mean
    repeated: float  # share of a reply's runs of RUN words that it had before, the mean
    scorers: tuple[Figures, ...]  # the total first
    agreements: tuple[Agreement, ...]


def observe(step: int, scored: Iterable[tuple[Trajectory, Score]]) -> Snapshot:
    """The figures of a step's trajectories; those of one task and seed are a group. The scores must be of one blend.

    Raises ValueError for no trajectory, or scores of other scorers.
    """
    pairs = list(scored)
    if not pairs:
        raise ValueError(f"step {step}: expected trajectories with their scores, found none")
    texts = [final_text(trajectory) for trajectory, _ in pairs]
    keys = [(trajectory.task, trajectory.seed) for trajectory, _ in pairs]
    groups, equal = _index(keys), _index(list(zip(keys, texts)))
    words = np.array([len(text.split()) for text in texts], float)
    parts = pairs[0][1].parts
    names = [part.judgement.scorer for part in parts]
    for trajectory, score in pairs:
        if [part.judgement.scorer for part in score.parts] != names:
            raise ValueError(f"step {step}, trajectory {trajectory.id}: expected scores of {names}, found "
                             f"{[part.judgement.scorer for part in score.parts]}")

    def figures(name: str, dimension: str, weight: float, values: np.ndarray, most: float) -> Figures:
        inside = _centred(values, groups)
        return Figures(name, dimension, weight, values.mean(), _deviation(inside, groups), _even(inside, groups),
                       float(np.mean(values >= SATURATED * most)), _deviation(_centred(values, equal), equal),
                       _correlation(inside, _centred(words, groups)))

    values = {name: np.array([score.parts[i].judgement.value for _, score in pairs]) for i, name in enumerate(names)}
    total = np.array([score.total for _, score in pairs])
    found = [figures(TOTAL, "", 1.0, total, pairs[0][1].highest)]
    found += [figures(name, part.judgement.dimension.value, part.weight, values[name], 1.0)
              for name, part in zip(names, parts)]
    agreements = [Agreement(one.scorer, other.scorer, _correlation(_centred(values[one.scorer], groups),
                                                                   _centred(values[other.scorer], groups)))
                  for one, other in witnessed(found)]
    return Snapshot(step, len(pairs), float(words.mean()), float(np.mean([repeated(text, RUN) for text in texts])),
                    tuple(found), tuple(agreements))


def as_metrics(snapshot: Snapshot) -> dict[str, Mean]:
    """The snapshot for a writer of metrics: `reward/<scorer>/mean` and so on; what nothing shows is not counted."""
    found: dict[str, float | None] = {"reward/words": snapshot.words, "reward/repeated": snapshot.repeated}
    for figures in snapshot.scorers:
        for name in ("mean", "spread", "even", "saturated", "noise", "length"):
            found[f"reward/{figures.scorer}/{name}"] = getattr(figures, name)
    for one in snapshot.agreements:
        found[f"reward/{one.scorer}/agrees_with/{one.witness}"] = one.correlation
    weight = float(snapshot.replies)
    return {name: Mean(jnp.float32(weight * value), jnp.float32(weight)) if value is not None
            else Mean(jnp.float32(0), jnp.float32(0)) for name, value in found.items()}


def witnessed(scorers: Sequence[Figures]) -> list[tuple[Figures, Figures]]:
    """Every scorer that counts, with every one of its dimension that is held out."""
    return [(one, other) for one in scorers for other in scorers
            if one.scorer != TOTAL and one.weight and not other.weight and one.dimension == other.dimension]


def _index(keys: Sequence[Hashable]) -> np.ndarray:
    """Equal keys as equal numbers, from 0."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys])


def _centred(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Each value less the mean of its group, exactly 0 where all of a group are the same."""
    found = values - (np.bincount(groups, values) / np.bincount(groups))[groups]
    return np.where(np.abs(found) > _EVEN, found, 0.0)


def _deviation(centred: np.ndarray, groups: np.ndarray) -> float | None:
    shared = centred[np.bincount(groups)[groups] > 1]
    return float(np.sqrt(np.mean(shared**2))) if shared.size else None


def _even(centred: np.ndarray, groups: np.ndarray) -> float | None:
    sizes = np.bincount(groups)
    uneven = np.bincount(groups, centred != 0) > 0
    return float(np.mean(~uneven[sizes > 1])) if (sizes > 1).any() else None


def _correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    if not one.any() or not other.any():
        return None
    return float(one @ other / np.sqrt((one @ one) * (other @ other)))
