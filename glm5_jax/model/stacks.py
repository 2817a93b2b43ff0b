"""Which layers are stacked together: a depth pattern becomes a few nested scans, whatever the depth.

The kinds of the layers are run-length encoded, and a repeating group of runs becomes one segment. GLM-5 is
`3 dense, 75 sparse`; GLM-5.2 is `3 dense, (3 shared, 1 full) x 18, 3 shared`. Each run of a segment owns one parameter
stack with two leading axes, [repeats, count], named by the index of its first layer.
"""

import itertools
from typing import NamedTuple, Sequence

import numpy as np

from glm5_jax.model.config import LayerKind


class Run(NamedTuple):
    """`count` neighbouring layers of one kind; `layers` [repeats, count] are their indices."""

    kind: LayerKind
    layers: np.ndarray

    @property
    def name(self) -> str:
        return str(self.layers[0, 0])


Segment = tuple[Run, ...]


def plan(kinds: Sequence[LayerKind]) -> tuple[Segment, ...]:
    """Splits the layers into segments, each a group of runs repeated one or more times."""
    lengths = [(kind, len(list(group))) for kind, group in itertools.groupby(kinds)]
    segments, start = [], 0
    while lengths:
        period, repeats = _longest_repetition(lengths)
        segments.append(_segment(lengths[:period], repeats, start))
        start += repeats * sum(count for _, count in lengths[:period])
        lengths = lengths[period * repeats:]
    return tuple(segments)


def _longest_repetition(lengths: list[tuple[LayerKind, int]]) -> tuple[int, int]:
    """The group of leading runs (its size, its repeats) that covers most; a single run where nothing repeats."""
    best = (1, 1)
    for period in range(2, len(lengths) // 2 + 1):
        repeats = 1
        while lengths[period * repeats:period * (repeats + 1)] == lengths[:period]:
            repeats += 1
        if repeats > 1 and period * repeats > best[0] * best[1]:
            best = (period, repeats)
    return best


def _segment(group: list[tuple[LayerKind, int]], repeats: int, start: int) -> Segment:
    stride, offset, runs = sum(count for _, count in group), start, []
    for kind, count in group:
        runs.append(Run(kind, offset + stride * np.arange(repeats)[:, None] + np.arange(count)))
        offset += count
    return tuple(runs)
