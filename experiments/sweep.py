"""Many runs of one experiment: a file's `sweep()` gives the overrides, each set becomes a run, all become one table.

    python experiments/sweep.py experiments/sweeps/learning_rate.py --config experiments/glm5.py:tiny --workers 2

`sweep()` yields or returns overrides such as {"train.steps": 100, "seed": 1}. A sweep file takes the combinators with
`from sweep import product, zip_, chain`; an experiment file, which also runs without this one, does without them.

Each run is one process, `python -m glm5_jax --config ... --config.seed=1`, in a directory of --workdir that is named by
its overrides and keeps what it prints in log.txt. Finished runs are skipped and interrupted ones resume, so the same
command continues a sweep, also one that has grown. A failed run is reported and tried again the next time. --shard 0/4
takes the first of four disjoint parts, for four machines with one --workdir. Workers share the cores between them; on
an accelerator use one worker a device (CUDA_VISIBLE_DEVICES and --shard). At the end, and at any time with --report,
--workdir gets table.csv, table.md and plot.png of the whole sweep.
"""

import argparse
import contextlib
import csv
import dataclasses
import fcntl
import functools
import hashlib
import importlib.machinery
import itertools
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
import types
from typing import Any, Iterable, Iterator, Mapping, Sequence

from absl import flags

from glm5_jax import __main__ as command_line, job
from glm5_jax.train import report

Overrides = dict[str, Any]
COMMAND = (sys.executable, "-m", "glm5_jax")
CURVE = "lm_loss"
POLL = 0.1  # seconds
_say = functools.partial(print, flush=True)


def product(*sweeps: Iterable[Overrides], **axes: Iterable[Any]) -> list[Overrides]:
    """Every combination: product(**{"optimizer.learning_rate": [1e-3, 2e-3], "seed": range(3)}) are six.

    An axis is a key and its values; a sweep, such as that of `zip_`, counts as one more. Raises ValueError for an axis
    that is no list of values, and for a key that is set twice.
    """
    return [_merge(point) for point in itertools.product(*_axes(sweeps, axes))]


def zip_(*sweeps: Iterable[Overrides], **axes: Iterable[Any]) -> list[Overrides]:
    """The axes side by side; raises ValueError as `product` does, and for axes of unequal lengths."""
    columns = _axes(sweeps, axes)
    if len({len(column) for column in columns}) > 1:
        raise ValueError(f"zip_: expected axes of one length, found {[len(column) for column in columns]}")
    return [_merge(point) for point in zip(*columns)]


def chain(*sweeps: Iterable[Overrides]) -> list[Overrides]:
    """One sweep after the other; what several of them hold is run once."""
    return [overrides for sweep in sweeps for overrides in sweep]


def _axes(sweeps: Sequence[Iterable[Overrides]], axes: Mapping[str, Iterable[Any]]) -> list[list[Overrides]]:
    for name, values in axes.items():
        if isinstance(values, (str, Mapping)) or not isinstance(values, Iterable):
            raise ValueError(f"sweep axis {name}: expected its values, such as [1, 2], found {values!r}")
    return [list(sweep) for sweep in sweeps] + [[{name: value} for value in axes[name]] for name in axes]


def _merge(point: Iterable[Overrides]) -> Overrides:
    merged: Overrides = {}
    for part in point:
        if twice := merged.keys() & part.keys():
            raise ValueError(f"sweep: expected each key on one axis, found {min(twice)} on two")
        merged |= part
    return merged


@dataclasses.dataclass(frozen=True)
class Run:
    """One set of overrides and the directory it owns."""

    overrides: Overrides
    path: pathlib.Path

    @property
    def state(self) -> str:
        """"finished", "failed", "unfinished" (running or interrupted) or "missing" (never started)."""
        if (self.path / "result.json").exists():
            return "finished"
        if (self.path / "failure.txt").exists():
            return "failed"
        return "unfinished" if self.path.exists() else "missing"

    def arguments(self, config: str) -> list[str]:
        """What `python -m glm5_jax` is given."""
        values = [f"--config.{name}={value}" for name, value in self.overrides.items()]
        return ["--config", config, *values, "--workdir", str(self.path)]


def run_name(overrides: Overrides) -> str:
    """Readable, the same on every machine and in every order, and different for different overrides."""
    values = dict(sorted(overrides.items()))
    readable = ",".join(f"{name}={value}" for name, value in values.items()) or "no-overrides"
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9._=,-]+', '-', readable)[:100]}-{digest[:8]}"


def read_sweep(file: str, workdir: pathlib.Path) -> list[Run]:
    """The runs of a sweep file in its order, each once; raises OSError, and ValueError for no sweep of values."""
    loader = importlib.machinery.SourceFileLoader("sweep_file", file)
    module = types.ModuleType(loader.name)
    loader.exec_module(module)
    if not hasattr(module, "sweep"):
        raise ValueError(f"{file}: expected a function sweep() that yields overrides, found none")
    runs = {}
    for overrides in module.sweep():
        try:
            run = Run(dict(overrides), workdir / run_name(overrides))
        except (AttributeError, TypeError) as error:
            raise ValueError(f"{file}: expected overrides of plain values, such as {{'seed': 1}}, found {overrides!r} "
                             f"({error})") from error
        runs[run.path] = run
    if not runs:
        raise ValueError(f"{file}: expected overrides from sweep(), found none")
    return list(runs.values())


def check(runs: Iterable[Run], config: str) -> None:
    """Raises ValueError where an override or a value is wrong, or a directory holds another run; nothing is started."""
    for run in runs:
        try:
            values, _, _ = command_line.parse(["sweep", *run.arguments(config)])
            job.resolve(values)
        except (flags.Error, OSError, ValueError) as error:
            # absl puts the traceback of an experiment file into its message: the last line says what is wrong.
            raise ValueError(f"run {run.overrides}: {str(error).splitlines()[-1]}") from error
        stored = run.path / "config.json"
        if stored.exists() and json.loads(stored.read_text("utf-8")) != json.loads(json.dumps(values.to_dict())):
            raise ValueError(f"{run.path} holds a run of other values than {config} with {run.overrides}; pass another "
                             f"--workdir, or delete that directory")


def shard(runs: Sequence[Run], part: str) -> Sequence[Run]:
    """The runs of part `i/n`, i from 0: every n-th."""
    index, count = map(int, part.split("/")) if re.fullmatch(r"\d+/\d+", part) else (0, 0)
    if index >= count:
        raise ValueError(f"--shard: expected i/n with i from 0 to n - 1, such as 0/4, found {part!r}")
    return runs[index::count]


def run_all(runs: Iterable[Run], config: str, workers: int, command: Sequence[str] = COMMAND) -> list[Run]:
    """Runs what is not finished, `workers` at a time, and returns the runs that did not finish.

    KeyboardInterrupt passes through after every process was asked to stop and did; a second one kills them.
    """
    waiting = [run for run in reversed(list(runs)) if run.state != "finished"]
    workers = min(workers, len(waiting))
    free, left = list(range(workers)), []
    running: dict[subprocess.Popen, tuple[Run, int]] = {}
    try:
        while waiting or running:
            while waiting and free:
                run = waiting.pop()
                with _cores(free[-1], workers):
                    process = _start(run, [*command, *run.arguments(config)])
                if process is None:
                    left.append(run)
                    _say(f"skipped   {run.path.name}: another process is running it")
                else:
                    running[process] = run, free.pop()
                    _say(f"started   {run.path.name}")
            time.sleep(POLL)
            for process in [process for process in running if process.poll() is not None]:
                run, slot = running.pop(process)
                free.append(slot)
                if run.state == "finished":
                    _say(f"finished  {run.path.name}")
                else:
                    left.append(run)
                    _record_failure(run, process.returncode)
    finally:
        if running:
            _stop(list(running))
    return left


def _start(run: Run, command: Sequence[str]) -> subprocess.Popen | None:
    """The run's process, or None where one is alive already, even if its sweep was killed."""
    run.path.mkdir(parents=True, exist_ok=True)
    with open(run.path / "log.txt", "ab") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the child holds the file, and the lock, while it lives
        except BlockingIOError:
            return None
        log.truncate(0)
        (run.path / "failure.txt").unlink(missing_ok=True)
        # In a session of its own a Ctrl-C reaches it through _stop alone, once.
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                start_new_session=True)


@contextlib.contextmanager
def _cores(slot: int, workers: int) -> Iterator[None]:
    """What starts inside runs on this worker's share of the cores; XLA takes as many threads as it finds cores."""
    if not hasattr(os, "sched_setaffinity"):  # macOS
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[slot::workers] or cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def _record_failure(run: Run, status: int) -> None:
    how = f"killed by signal {-status}" if status < 0 else f"exit status {status}, no result.json"
    tail = (run.path / "log.txt").read_text("utf-8", errors="replace").splitlines()[-15:]
    text = "\n    ".join([f"FAILED    {run.path.name}: {how}; the end of its log.txt:", *tail])
    (run.path / "failure.txt").write_text(text + "\n", encoding="utf-8")
    _say(text)


def _stop(processes: Sequence[subprocess.Popen]) -> None:
    _say(f"\nStopping {len(processes)} runs; those that train save their step first. Again: at once.")
    try:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
    except KeyboardInterrupt:
        for process in processes:
            process.kill()
            process.wait()
        raise


def table(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row a run, sorted by the overrides: these, the state, the numbers of result.json ("a.b" for nested ones)."""
    results = [_results(run) for run in runs]
    keys = _names(run.overrides for run in runs)
    metrics = [name for name in _names(results) if name not in keys]
    rows = [{key: run.overrides.get(key) for key in keys} | {"state": run.state}
            | {name: numbers.get(name) for name in metrics} | {"run": run.path.name}
            for run, numbers in zip(runs, results)]
    return sorted(rows, key=lambda row: [_sort_key(row[key]) for key in keys])


def _names(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(itertools.chain.from_iterable(mappings)))


def _results(run: Run) -> dict[str, float]:
    stored = run.path / "result.json"
    return dict(_numbers(json.loads(stored.read_text("utf-8")))) if stored.exists() else {}


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)):
            yield prefix + name, value


def _sort_key(value: Any) -> tuple[bool, bool, Any]:
    numeric = isinstance(value, (int, float))
    return value is not None, not numeric, value if numeric else str(value)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table, a dash where a value is missing."""
    lines = [rows[0], ["---"] * len(rows[0]), *(map(_cell, row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    text = "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", r"\|").replace("\n", " ")


def draw(runs: Sequence[Run], metric: str, path: pathlib.Path) -> None:
    """Draws `metric` over the first override that varies, a line for each setting of the others, and the loss curves.

    Raises ImportError, with the remedy, without matplotlib; ValueError where no finished run has the metric.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the plot needs matplotlib, which is not installed: pip install 'glm5-jax[viz]'") from error
    known = _names(map(_results, runs))
    if metric not in known:
        raise ValueError(f"no finished run has the result {metric!r}{job.nearest(metric, known) if known else ''}")
    rows = [row for row in table(runs) if row.get(metric) is not None]
    names = [key for key in _names(run.overrides for run in runs) if len({str(row[key]) for row in rows}) > 1]
    key = names[0] if names else "state"
    numeric = all(isinstance(row[key], (int, float)) for row in rows)
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    points, curves = figure.subplots(1, 2)
    lines: dict[str, list[tuple[Any, float]]] = {}
    for row in rows:
        lines.setdefault(_label(row, names[1:]), []).append((row[key] if numeric else str(row[key]), row[metric]))
        metrics = runs[0].path.parent / row["run"] / "metrics.jsonl"
        if metrics.exists():
            curves.plot(*report.series(report.read_rows(metrics), CURVE), label=_label(row, names), linewidth=1.2)
    for label, line in lines.items():
        points.plot(*zip(*line), marker="o", label=label)
    if numeric and 0 < 4 * min(row[key] for row in rows) <= max(row[key] for row in rows):
        points.set_xscale("log")
    points.set(xlabel=key, title=metric)
    curves.set(xlabel="step", title=CURVE)
    for axes in (points, curves):
        axes.grid(alpha=0.3)
        if 1 < len(axes.lines) <= 16:  # more would hide the plot
            axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def _label(row: Mapping[str, Any], names: Iterable[str]) -> str:
    return ", ".join(f"{name.rpartition('.')[2]}={row[name]}" for name in names)


def write_report(runs: Sequence[Run], workdir: pathlib.Path, metric: str) -> None:
    """Writes table.csv, table.md and plot.png, and prints the table."""
    rows = table(runs)
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / "table.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([rows[0], *(row.values() for row in rows)])
    text = markdown(rows)
    (workdir / "table.md").write_text(text + "\n", encoding="utf-8")
    _say(text)
    try:
        draw(runs, metric, workdir / "plot.png")
    except (ImportError, ValueError) as error:
        _say(f"No plot: {error}")


def main(argv: Sequence[str] | None = None, command: Sequence[str] = COMMAND) -> int:
    """Runs the sweep, or its part; 0 where all of it is finished, 1 where runs failed, 2 for a mistake, 130 stopped."""
    options = _options(argv)
    workdir = pathlib.Path(options.workdir or f"runs/sweeps/{pathlib.Path(options.sweep).stem}")
    try:
        runs = read_sweep(options.sweep, workdir)
        if options.report:
            write_report(runs, workdir, options.metric)
            return 0
        check(runs, options.config)
        chosen = shard(runs, options.shard)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _say(f"{len(runs)} runs, {len(chosen)} in this part, {sum(run.state == 'finished' for run in chosen)} of them "
         f"finished already; in {workdir}")
    if options.dry_run:
        for run in chosen:
            _say(f"{run.state:<10} {shlex.join([*command, *run.arguments(options.config)])}")
        return 0
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup stays nohup
            signal.signal(number, signal.default_int_handler)
    try:
        left = run_all(chosen, options.config, options.workers, command)
    except KeyboardInterrupt:
        _say("Stopped. The same command goes on from there.")
        return 130
    write_report(runs, workdir, options.metric)
    if left:
        _say(f"{len(left)} of {len(chosen)} runs did not finish; the same command tries them again.")
    return 1 if left else 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", help="Python file with a function sweep()")
    parser.add_argument("--config", help="experiment file and argument, such as experiments/glm5.py:tiny")
    parser.add_argument("--workdir", help="directory of the sweep; default runs/sweeps/<name of the sweep file>")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time; default 1")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="take part I (from 0) of N")
    parser.add_argument("--metric", default="stages.pretrain.bits_per_byte.after",
                        help="result to plot; default %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="check and list the runs, start none")
    parser.add_argument("--report", action="store_true", help="table and plot of what is there, start nothing")
    options = parser.parse_args(argv)
    if options.config is None and not options.report:
        parser.error("expected --config, such as --config experiments/glm5.py:tiny")
    if options.workers < 1:
        parser.error(f"--workers: expected at least 1, found {options.workers}")
    return options


if __name__ == "__main__":
    sys.exit(main())
