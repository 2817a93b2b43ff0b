"""Rows of several sources in given shares, which change from stage to stage at a count of tokens."""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import math
from typing import Any

import grain
import jax
import numpy as np

from glm5_jax.core.batch import Batch
from glm5_jax.data import packing


@dataclasses.dataclass(frozen=True)
class Stage:
    """Shares of the sources in the rows, by name, until `until` tokens are seen in all; None for the last stage.

    `weights` need not sum to 1; a source that is not named, or has weight 0, gives nothing. Tokens are slots of the
    global batch, padding too, so that a stage ends at a known step. Raises ValueError for weights that are negative,
    not finite or all zero, and for an end below 1.
    """

    weights: Mapping[str, float]
    until: int | None = None

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"Stage.weights[{name!r}]: expected a number of at least 0, found {weight}")
        if not any(self.weights.values()):
            raise ValueError(f"Stage.weights: expected at least one above 0, found {dict(self.weights)}")
        if self.until is not None and self.until < 1:
            raise ValueError(f"Stage.until: expected at least 1 token, or None for the last stage; found {self.until}")


def batches(rows: Mapping[str, grain.IterDataset], stages: Sequence[Stage], *, length: int, batch_size: int,
            process_index: int = 0, process_count: int = 1, read_ahead: int = 2) -> grain.IterDataset:
    """Batches of `batch_size` rows over all processes, of which this one gets its `batch_size / process_count`.

    `rows` gives for each source its rows of `length` tokens (`stream.PackedRows`). A thread prepares `read_ahead`
    batches, none where it is 0. Raises ValueError as `Mixture` and `packing.process_rows` do.

    Every process reads all documents, draws the same global rows, and keeps its own. So the state, a dictionary that
    survives JSON, is the same on all: that of any one resumes all of them exactly, on another number of processes
    too, with the same global batches.
    """
    mine = packing.process_rows(batch_size, process_index, process_count)
    dataset = Mixture(rows, stages, length=length, batch_size=batch_size).batch(
        batch_size, drop_remainder=True, batch_fn=functools.partial(_stack, mine))
    return grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=read_ahead) if read_ahead \
        else dataset


class Mixture(grain.IterDataset[Batch]):
    """Rows of the sources, one after the other: each time of the source that lags most behind its share.

    So at any row of a stage the sources have given their shares to within a few rows, and the order is a function of
    the stages alone. A stage ends with the first whole batch at or after its `until`. The mixture ends with the first
    source that does; sources of `stream.token_documents` are endless.

    Raises ValueError for ends that do not rise, a last stage with an end, an unknown source, or a number below 1.
    """

    def __init__(self, rows: Mapping[str, grain.IterDataset], stages: Sequence[Stage], *, length: int,
                 batch_size: int):
        super().__init__()
        for field, value in (("length", length), ("batch_size", batch_size), ("stages", len(stages))):
            if value < 1:
                raise ValueError(f"{field}: expected at least 1, found {value}")
        ends = [math.inf if stage.until is None else stage.until for stage in stages]
        if ends[-1] < math.inf or any(end >= later for end, later in zip(ends, ends[1:])):
            raise ValueError(f"stages: expected ends that rise, and none for the last stage; "
                             f"found {[stage.until for stage in stages]}")
        for number, stage in enumerate(stages):
            if unknown := sorted(set(stage.weights) - set(rows)):
                raise ValueError(f"stages[{number}].weights: expected sources of {sorted(rows)}, found {unknown[0]!r}")
        self.rows, self.stages = dict(rows), tuple(stages)
        per_batch = length * batch_size
        self.ends = [end if end == math.inf else math.ceil(end / per_batch) * batch_size for end in ends]  # in rows

    def __iter__(self) -> "MixtureIterator":
        return MixtureIterator(self)


class MixtureIterator(grain.DatasetIterator[Batch]):
    """Where a `Mixture` stands; `get_state` is {"total": rows given, "stage": its number, "given": rows of each source
    in this stage, "rows": where each source stands}."""

    def __init__(self, dataset: Mixture):
        self._rows = {name: iter(rows) for name, rows in dataset.rows.items()}
        super().__init__(list(self._rows.values()))
        self._dataset = dataset
        self._total = self._stage = 0
        self._given = dict.fromkeys(self._rows, 0)

    def __next__(self) -> Batch:
        stage = next(number for number, end in enumerate(self._dataset.ends) if self._total < end)
        if stage != self._stage:
            self._stage, self._given = stage, dict.fromkeys(self._rows, 0)
        name = self._lagging(self._dataset.stages[stage].weights)
        row = next(self._rows[name])
        self._total += 1
        self._given[name] += 1
        return row

    def get_state(self) -> dict[str, Any]:
        return {"total": self._total, "stage": self._stage, "given": dict(self._given),
                "rows": {name: rows.get_state() for name, rows in self._rows.items()}}

    def set_state(self, state: dict[str, Any]) -> None:
        if set(state["rows"]) != set(self._rows):
            raise ValueError(f"state: expected one of the sources {sorted(self._rows)}, found {sorted(state['rows'])}; "
                             f"resume with the sources it was saved with")
        self._total, self._stage, self._given = state["total"], state["stage"], dict(state["given"])
        for name, rows in self._rows.items():
            rows.set_state(state["rows"][name])

    def _lagging(self, weights: Mapping[str, float]) -> str:
        """The source with the largest share still owed; of equals, the first by name."""
        share = sum(weights.values())
        after = sum(self._given.values()) + 1
        owed = {name: weight / share * after - self._given[name] for name, weight in weights.items() if weight}
        return max(sorted(owed), key=owed.__getitem__)


def _stack(mine: slice, rows: Sequence[Batch]) -> Batch:
    return jax.tree.map(lambda *values: np.stack(values), *rows[mine])
