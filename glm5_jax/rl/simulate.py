"""What a scheduler is worth, before machines are rented: every mode beside sync, on modelled engines and trainer.

    python -m glm5_jax.rl.simulate --out runs/simulate
    python -m glm5_jax.rl.simulate --workloads agent --modes sync "async 2 wait" --machine sync=60 kappa=0.0003

Each mode has as many devices as sync. Prints a row for each as it ends, and writes all as JSON and, where matplotlib
is installed, a picture. A ratio holds for the saturation, tails, tool waits and cost of weights it was made with: give
those of your own machines. All of it: about five minutes on one core; `--steps 30 --seeds 0` is a quick look.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import pathlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from glm5_jax.rl.modelled import Machine, Report, Simulation, Workload
from glm5_jax.rl.schedule import CONSUMPTIONS, Adaptive, April, Async, OneStepOff, Scheduler, Sync

WORKLOADS = {"math": Workload("math", 64, 4000, 0.9), "agent": Workload("agent", 32, 8000, 0.6, turns=12.0)}
SHARES = (1 / 4, 3 / 8, 1 / 2)  # of the devices that generate, where both roles have their own
WARM_UP = 10  # training steps
PILOT_SEED = 2**32
MODES: dict[str, Callable[[int], Scheduler]] = {
    "sync": Sync,
    "april 1.5": lambda groups: April(groups, 1.5),
    "april 2": lambda groups: April(groups, 2.0),
    "one-step": OneStepOff,
    "drain 1": lambda groups: Async(groups, 1, "fifo", drains=True),
    **{f"async {bound} {order}": functools.partial(Async, bound=bound, order=order)
       for bound in (1, 2, 4) for order in CONSUMPTIONS},
    "adaptive": Adaptive,
}


def measure(mode: str, workload: Workload, machine: Machine, *, steps: int = 60, warm_up: int = WARM_UP,
            seeds: Sequence[int] = (0, 1, 2)) -> list[Report]:
    """One report for each seed. Where generation and training have devices of their own, the best of `SHARES` by a
    pilot of `steps` * 2 / 3 steps."""
    scheduler = MODES[mode](workload.groups)
    pilot = lambda share: Simulation(workload, machine, scheduler, share, PILOT_SEED).run(
        max(warm_up + 1, 2 * steps // 3), warm_up).tokens_per_second
    share = 1.0 if scheduler.together else max(SHARES, key=pilot)
    return [Simulation(workload, machine, scheduler, share, seed).run(steps, warm_up) for seed in seeds]


def table(workload: Workload, machine: Machine, modes: Sequence[str], **options: Any) -> Iterator[dict[str, Any]]:
    """A row for each mode: means over seeds, speed over sync."""
    sync = measure("sync", workload, machine, **options)
    base = statistics.mean(one.tokens_per_second for one in sync)
    for mode in modes:
        reports = sync if mode == "sync" else measure(mode, workload, machine, **options)
        row = {field.name: statistics.mean(getattr(one, field.name) for one in reports)
               for field in dataclasses.fields(Report)}
        ratios = [one.tokens_per_second / base for one in reports]
        yield {"workload": workload.name, "mode": mode, "speed": statistics.mean(ratios),
               "speed_deviation": statistics.pstdev(ratios), **row,
               "staleness_max": max(one.staleness_max for one in reports)}


def line(row: dict[str, Any]) -> str:
    """A row of the table for people."""
    return (f"{row['workload']:8} {row['mode']:14} {row['speed']:5.2f}x  engines {row['engine_busy']:4.0%} trainer "
            f"{row['trainer_busy']:4.0%}  stale {row['staleness_mean']:3.1f}, at most {row['staleness_max']}  given up "
            f"{row['wasted']:4.0%}  fed anew {row['again']:4.0%}  length {row['length_mean']:6,.0f}, p99 "
            f"{row['length_p99']:6,.0f}")


def draw(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Speed over staleness, a panel for each workload."""
    from matplotlib.figure import Figure
    names = list(dict.fromkeys(row["workload"] for row in rows))
    figure = Figure(figsize=(6 * len(names), 4.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        for row in (row for row in rows if row["workload"] == name):
            axes.errorbar(row["staleness_mean"], row["speed"], yerr=row["speed_deviation"], marker="o")
            axes.annotate(row["mode"], (row["staleness_mean"], row["speed"]), xytext=(4, 4),
                          textcoords="offset points", fontsize=8)
        axes.set(title=name, xlabel="mean staleness, steps", ylabel="trained tokens per second over sync")
        axes.grid(alpha=0.3)
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m glm5_jax.rl.simulate",
                                     description="Every mode of scheduling beside sync, on modelled machines.")
    parser.add_argument("--workloads", nargs="+", choices=tuple(WORKLOADS), default=tuple(WORKLOADS))
    parser.add_argument("--modes", nargs="+", choices=tuple(MODES), default=tuple(MODES), metavar="MODE")
    parser.add_argument("--machine", nargs="+", default=(), metavar="FIELD=VALUE",
                        help=", ".join(f"{field.name}={field.default}" for field in dataclasses.fields(Machine)))
    parser.add_argument("--steps", type=int, default=60, help="of training, ten of them to warm up")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--out", type=pathlib.Path, help="a folder for simulate.json and simulate.png")
    options = parser.parse_args(arguments)
    if options.steps <= WARM_UP:
        parser.error(f"--steps: expected more than the {WARM_UP} of the warm-up, found {options.steps}")
    try:
        machine = machine_of(options.machine)
    except ValueError as error:
        parser.error(f"--machine: {error}")
    rows = []
    for name in options.workloads:
        for row in table(WORKLOADS[name], machine, options.modes, steps=options.steps, seeds=options.seeds):
            rows.append(row)
            print(line(row), flush=True)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        record = {"machine": dataclasses.asdict(machine), "steps": options.steps, "seeds": list(options.seeds),
                  "rows": rows}
        (options.out / "simulate.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if importlib.util.find_spec("matplotlib"):
            draw(rows, options.out / "simulate.png")
        print(f"Written to {options.out}")


def machine_of(values: Sequence[str]) -> Machine:
    """The machine with some fields given as `name=value`. Raises ValueError naming what is wrong."""
    kinds = {name: type(value) for name, value in dataclasses.asdict(Machine()).items()}
    changes: dict[str, Any] = {}
    for value in values:
        name, equals, number = value.partition("=")
        if name not in kinds or not equals:
            raise ValueError(f"expected one of {', '.join(kinds)}, as in sync=60, found {value!r}")
        try:
            changes[name] = kinds[name](number)
        except ValueError:
            raise ValueError(f"{name}: expected {kinds[name].__name__}, found {number!r}") from None
    machine = dataclasses.replace(Machine(), **changes)
    if machine.devices < 2 or machine.slots < 1:
        raise ValueError(f"expected at least 2 devices and 1 slot, found {machine.devices} and {machine.slots}")
    return machine


if __name__ == "__main__":
    main()
