"""Timing on an accelerator: calls are queued without waiting for any, so that what it takes to dispatch them is hidden.

Where one run of a program is shorter than its dispatch, several runs are put into one program.
"""

from concurrent.futures import ThreadPoolExecutor
import functools
import math
import statistics
import time
from typing import Any, Callable, Mapping, NamedTuple, Sequence

import jax
from jax import lax
import jax.numpy as jnp

COMPILED_AT_ONCE = 8
Row = dict[str, Any]


class Pace(NamedTuple):
    """How long measurements take."""

    rounds: int = 7
    seconds: float = 0.02  # of work queued in a round
    deadline: float = math.inf  # of `time.monotonic`: nothing is begun after it


def repeated(fn: Callable[..., Any], times: int) -> Callable[..., Any]:
    """`fn`, so many times in one program: none is left out, and each waits for the one before.

    Barriers keep XLA on a GPU from taking out of the loop what is the same in every run. A CPU disregards them: so one
    number of the smallest floating argument depends on the run before, which it does not change but might.
    """
    if times == 1:
        return fn

    def program(*args: Any) -> jax.Array:
        leaves, tree = jax.tree.flatten(args)
        _, place = min((x.size, n) for n, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating))

        def run(_: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            carried, before = state
            carried = carried.at[(0,) * carried.ndim].add((before == 0.1234567).astype(carried.dtype))
            given, _ = lax.optimization_barrier(([*leaves[:place], carried, *leaves[place + 1:]], before))
            results = lax.optimization_barrier(jax.tree.leaves(fn(*tree.unflatten(given))))
            return carried, sum(result[(0,) * result.ndim].astype(jnp.float32) for result in results)

        return lax.fori_loop(0, times, run, (leaves[place], jnp.float32(0)))[1]

    return program


def timed(programs: Mapping[str, Sequence[Any]], pace: Pace, *, times: int = 1) -> dict[str, Row]:
    """Of every program, `function, *arguments`: median, lowest and highest seconds of one run, by turns in every round.

    A program that does not compile or run has the reason as "failed" instead. `times`: see `repeated`.
    """
    if time.monotonic() > pace.deadline:
        return {name: {"failed": "left out: the time is up"} for name in programs}
    failed: dict[str, Row] = {}

    def tried(name: str, step: Callable[[], Any]) -> Any:
        try:
            return step()
        except Exception as error:  # whatever a compiler or an allocator raises: the other programs are still of use
            failed[name] = {"failed": f"{type(error).__name__}: {error}"[:400]}

    def compiled(name: str) -> Any:
        fn, *args = programs[name]
        return tried(name, lambda: jax.jit(repeated(fn, times)).lower(*args).compile())

    with ThreadPoolExecutor(COMPILED_AT_ONCE) as pool:
        executables = dict(zip(programs, pool.map(compiled, programs)))
    runs = {name: functools.partial(executables[name], *args) for name, (_, *args) in programs.items()
            if name not in failed}
    for name, run in runs.items():
        tried(name, lambda: jax.block_until_ready(run()))
    runs = {name: run for name, run in runs.items() if name not in failed}
    calls = {name: max(1, min(1000, round(pace.seconds / _seconds(run, 1)))) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(pace.rounds):
        for name, run in runs.items():
            seconds[name].append(_seconds(run, calls[name]) / times)
    return {name: {"seconds": statistics.median(seconds[name]), "lowest": min(seconds[name]),
                   "highest": max(seconds[name])} if name in runs else failed[name] for name in programs}


def _seconds(run: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        result = run()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


def ratio(above: Row, below: Row) -> float | None:
    """How many times as long the one takes as the other; None where either failed."""
    return above["seconds"] / below["seconds"] if "seconds" in above and "seconds" in below else None


def per_second(amount: float, row: Row) -> float | None:
    return amount / row["seconds"] if "seconds" in row else None
