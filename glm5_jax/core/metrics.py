"""Metrics as (total, count), so that they merge exactly over steps and devices, and the writers that log their values.

A writer is anything with `write(step, values)` and `close()`.
"""

import contextlib
import json
import os
import pathlib
from typing import Any, Callable, Mapping, Protocol

from flax import struct
import jax
import jax.numpy as jnp

from glm5_jax.core import masked


@struct.dataclass
class Mean:
    """A weighted mean that has not been divided yet; float32 scalars."""

    total: jax.Array
    count: jax.Array

    @classmethod
    def of(cls, x: jax.Array, mask: jax.Array | None = None) -> "Mean":
        """The mean of `x` over `mask` (boolean or weights, see `masked_sum`), or over all of `x`."""
        mask = jnp.ones(jnp.shape(x), bool) if mask is None else jnp.broadcast_to(mask, jnp.shape(x))
        return cls(masked.masked_sum(jnp.asarray(x), mask), jnp.sum(mask, dtype=jnp.float32))

    def merge(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.count + other.count)

    def value(self) -> jax.Array:
        """Total over count; NaN where nothing was counted, which is not the same as a measured 0."""
        return jnp.where(self.count > 0, self.total / jnp.where(self.count > 0, self.count, 1), jnp.nan)


class Metric(Protocol):
    """What merges exactly with others of its kind, and has a value in the end: `Mean` and those of `losses`."""

    def merge(self, other: Any) -> Any: ...

    def value(self) -> jax.Array: ...


def merge(*groups: Mapping[str, Metric]) -> dict[str, Any]:
    """Merges metrics of the same name; a name may be missing from some of the groups."""
    merged: dict[str, Metric] = {}
    for group in groups:
        for name, metric in group.items():
            merged[name] = merged[name].merge(metric) if name in merged else metric
    return merged


def collect(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Brings the values to the host in one transfer, ready for a writer."""
    return {name: float(value) for name, value in jax.device_get({k: m.value() for k, m in metrics.items()}).items()}


class Writer(Protocol):
    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonlWriter:
    """Appends one line `{"step": 10, "loss": 3.2}` per call; NaN and Infinity stand as Python's `json` writes them.

    Each line is handed to the system whole, so that a killed process loses at most its last line; a line torn that way
    is cut off when the file is opened again.
    """

    def __init__(self, path: str | os.PathLike):
        self._path = pathlib.Path(path)
        self._file = open(self._path, "ab")
        if (end := _end_of_last_line(self._path)) < self._path.stat().st_size:
            self._file.truncate(end)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if "step" in values:
            raise ValueError(f"{self._path}: a metric cannot be named 'step', the step's own field; rename it")
        row = {"step": int(step)} | {name: float(value) for name, value in values.items()}
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()

    def truncate_after(self, step: int) -> None:
        """Drops everything from the first line of a later step on, so that a run resumed at `step` repeats no line."""
        offset = 0
        with open(self._path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    found = json.loads(line)["step"]
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{self._path}, line {number}: expected an object with a 'step', found {line!r}; "
                                     f"remove the line") from error
                if found > step:
                    break
                offset += len(line)
        self._file.truncate(offset)

    def close(self) -> None:
        self._file.close()


class ConsoleWriter:
    """Prints one line per call, its columns aligned from call to call; `emit` may be `tqdm.write`."""

    def __init__(self, emit: Callable[[str], Any] = print):
        self._emit = emit

    def write(self, step: int, values: Mapping[str, float]) -> None:
        cells = [f"{name} {float(value):<10.4g}" for name, value in values.items()]
        self._emit("  ".join([f"step {step:>7d}", *cells]).rstrip())

    def close(self) -> None:
        pass


class TensorBoardWriter:
    """Writes TensorBoard event files into a directory, by tensorboardX (extra `metrics`)."""

    def __init__(self, path: str | os.PathLike):
        try:
            import tensorboardX
        except ImportError as error:
            raise ImportError("TensorBoardWriter needs tensorboardX, which is not installed: "
                              "pip install 'glm5-jax[metrics]'") from error
        self._writer = tensorboardX.SummaryWriter(os.fspath(path))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, float(value), step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class MultiWriter:
    """Writes to several writers, and closes every one of them even if one fails."""

    def __init__(self, *writers: Writer):
        self._writers = writers

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for writer in self._writers:
            writer.write(step, values)

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            for writer in self._writers:
                stack.callback(writer.close)


def _end_of_last_line(path: pathlib.Path) -> int:
    """The offset behind the last newline, found from the end because the file may be long."""
    block = 1 << 16
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = file.seek(max(end - block, 0))
            if (found := file.read(end - start).rfind(b"\n")) >= 0:
                return start + found + 1
            end = start
    return 0
