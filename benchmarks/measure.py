"""Timing of jobs that take turns, what they ran on, and dated results that replace nothing."""

import datetime
from importlib import metadata
import json
import math
import os
import pathlib
import platform
import statistics
import time
from typing import Any, Callable, Iterable, Mapping, NamedTuple, Sequence

import jax

PAUSE = 0.05  # seconds before each turn, for the threads of the one before to go to sleep


class Job(NamedTuple):
    """What is timed, and what makes its arguments anew before each turn, untimed."""

    run: Callable[..., Any]
    prepare: Callable[[], Sequence[Any]] = tuple


def taking_turns(jobs: Mapping[str, Job], rounds: int) -> dict[str, list[float]]:
    """Seconds of each job in each round. Every job runs twice before the first round, to compile and to settle."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(-2, rounds):
        for name, job in jobs.items():
            arguments = jax.block_until_ready(job.prepare())
            time.sleep(PAUSE)
            start = time.perf_counter()
            jax.block_until_ready(job.run(*arguments))
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def speed(seconds: Mapping[str, list[float]], baseline: str) -> dict[str, dict[str, Any]]:
    """Of each job its median seconds, how many times as fast as the baseline it is (the median over rounds), and the
    lowest and highest round."""
    found = {}
    for name, own in seconds.items():
        ratios = [theirs / ours for theirs, ours in zip(seconds[baseline], own)]
        found[name] = {"seconds": statistics.median(own), "ratio": statistics.median(ratios),
                       "ratio_lowest": min(ratios), "ratio_highest": max(ratios)}
    return found


def growth(sizes: Iterable[float], values: Iterable[float]) -> float:
    """The exponent p of value = c * size^p, by least squares on the logarithms."""
    return statistics.linear_regression([math.log(x) for x in sizes], [math.log(x) for x in values]).slope


def threads() -> int:
    """The cores this process may use: as many threads as XLA takes."""
    return len(os.sched_getaffinity(0))


def surroundings(*packages: str) -> dict[str, Any]:
    """Date, device, processor, cores, and the versions of Python, jax, jaxlib and further packages."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return {"date": datetime.date.today().isoformat(), "device": jax.devices()[0].device_kind,
            "processor": names[0] if names else platform.machine(), "cores": threads(),
            "versions": {"python": platform.python_version()} | {
                name: metadata.version(name) for name in ("jax", "jaxlib", *packages)}}


def write(folder: pathlib.Path, name: str, record: Mapping[str, Any]) -> pathlib.Path:
    """Writes `<name>-<date>-<device>.json`, numbered from -2 on where that is taken, and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name}-{record['date']}-{record['device'].lower().replace(' ', '-')}"
    path, number = folder / f"{stem}.json", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path
