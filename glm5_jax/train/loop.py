"""Runs one stage: batches in; progress, metrics and checkpoints out. Stops cleanly and resumes exactly."""

import collections
import contextlib
import dataclasses
import signal
import sys
import threading
import time
from typing import Any, Callable, Iterator, Mapping, Protocol

import jax
import tqdm

from glm5_jax.checkpoint.store import Store
from glm5_jax.core import metrics as core_metrics
from glm5_jax.core.batch import Batch
from glm5_jax.train.state import TrainState
from glm5_jax.train.step import Metrics

_SHOWN = ("lm_loss", "indexer_kl", "expert_load", "grad_norm", "tokens_per_second")


class Batches(Protocol):
    """An endless iterator of batches whose place can be kept as JSON; Grain's iterators are."""

    def __next__(self) -> Batch: ...

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


@dataclasses.dataclass(frozen=True)
class Cadence:
    """Every how many steps metrics are written, a checkpoint is saved, and the state is evaluated (0: never); and how
    many steps skipped in a row are too many."""

    log_every: int
    save_every: int
    eval_every: int = 0
    most_skips: int = 10

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            least = 0 if field.name == "eval_every" else 1
            if getattr(self, field.name) < least:
                raise ValueError(f"Cadence.{field.name}: expected at least {least}, found {getattr(self, field.name)}")


class Diverged(RuntimeError):
    """So many steps in a row were skipped that going on makes no sense."""

    def __init__(self, step: int, in_row: int, reasons: Mapping[str, float]):
        found = ", ".join(f"{reason} in {count:g}" for reason, count in reasons.items() if count)
        super().__init__(f"step {step}: the last {in_row} steps were all skipped ({found}); the parameters are those "
                         f"before them. Look at the data and the learning rate, and resume from the last checkpoint")
        self.step, self.in_row = step, in_row


class Interrupted(Exception):
    """Training was asked to stop by signal `signum`; everything up to `step` is saved."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}, which is saved")
        self.signum, self.step = signum, step


def run(state: TrainState, train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]], batches: Batches, *,
        until: int, cadence: Cadence, store: Store, writer: core_metrics.Writer, name: str = "train",
        evaluate: Callable[[TrainState], Mapping[str, float]] | None = None) -> TrainState:
    """Trains until `until` steps are done in all, those before this call included; `state` is donated.

    A metrics row holds the means since the row before, and `tokens_per_second` without the first step, which compiles.
    Rows and checkpoints come as `cadence` says and at the end; every checkpoint has its row. On SIGINT or SIGTERM the
    step at hand is finished and saved, and `Interrupted` is raised; on a second one KeyboardInterrupt, at once. What
    `evaluate` says of the state every so many steps joins the row. Raises Diverged where `cadence.most_skips` steps in
    a row were skipped.
    """
    done = int(state.step)
    if done >= until:
        return state
    window: list[Metrics] = []
    recent: collections.deque[Metrics] = collections.deque(maxlen=cadence.most_skips)
    clock: float | None = None
    timed = 0
    with _signals() as received, _Progress(name, done, until) as progress:
        while done < until:
            state, metrics = train_step(state, next(batches))
            done += 1
            timed += clock is not None
            jax.block_until_ready(window[-1] if window and clock else metrics)  # the host runs at most one step ahead
            clock = clock or time.perf_counter()
            if recent:
                _check_skips(done - 1, recent)
            window.append(metrics)
            recent.append(metrics)
            progress.advance()
            stopping = bool(received)
            saving = done % cadence.save_every == 0 or done == until or stopping
            evaluating = evaluate is not None and cadence.eval_every > 0 and (
                done % cadence.eval_every == 0 or done == until)
            if saving or evaluating or done % cadence.log_every == 0:
                values = core_metrics.collect(core_metrics.merge(*window))
                now = time.perf_counter()
                if timed:
                    values["tokens_per_second"] = values["tokens"] * timed / (now - clock)
                if evaluating and evaluate is not None:
                    values |= evaluate(state)
                    now = time.perf_counter()
                window, clock, timed = [], now, 0
                writer.write(done, values)
                progress.write(done, values)
            if saving:
                store.save(done, state, {"batches": batches.get_state()})
            if stopping or (received and done == until):
                raise Interrupted(received[0], done)
        _check_skips(done, recent)
    return state


def resume(store: Store, target: TrainState, batches: Batches) -> TrainState | None:
    """The newest saved state, in the shapes and shardings of `target`, with `batches` put where it left them.

    None where nothing is saved. Raises ValueError for a state of other shapes, as `Store.restore` does.
    """
    step = store.latest_step()
    if step is None:
        return None
    state, extra = store.restore(step, target)
    batches.set_state(extra["batches"])
    return state


def _check_skips(step: int, recent: collections.deque[Metrics]) -> None:
    """Raises Diverged where the newest `recent.maxlen` steps were all skipped."""
    in_row = recent[-1].get("skipped_in_row")
    if in_row is not None and recent.maxlen is not None and float(in_row.total) >= recent.maxlen:
        counts = {name.removeprefix("skipped/"): sum(float(metrics[name].total) for metrics in recent)
                  for name in recent[-1] if name.startswith("skipped/")}
        raise Diverged(step, int(in_row.total), counts)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying of the first; a thread other than the main one receives none."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def on_signal(signum: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(signum)
        tqdm.tqdm.write("Finishing the step and saving; once more (Ctrl-C) to stop at once.", file=sys.stderr)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Progress:
    """A bar on a terminal; elsewhere one line per metrics row."""

    def __init__(self, name: str, done: int, until: int):
        self._bar = tqdm.tqdm(desc=name, initial=done, total=until, unit="step", disable=None, dynamic_ncols=True)
        self._lines = core_metrics.ConsoleWriter(lambda line: print(f"{name}  {line}", flush=True))

    def advance(self) -> None:
        self._bar.update()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        shown = {name: values[name] for name in _SHOWN if name in values}
        if self._bar.disable:
            self._lines.write(step, shown)
        else:
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()})

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
