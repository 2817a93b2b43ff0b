"""What a sandbox costs to start, beside a plain subprocess and a bare bubblewrap in the same run.

    python benchmarks/sandbox.py

Medians over `--rounds` of running /bin/true: one at a time, and sixteen at once by sixteen threads. The bare bubblewrap
makes the same namespaces around the host's whole file system: what it takes is not ours to save. A laptop CPU is
enough, bubblewrap must be installed; it takes half a minute. Expected on an idle machine: under 30 ms more than a plain
subprocess, each. Writes benchmarks/results/sandbox_<date>.json, or to `--out`; the load average in it says how idle the
machine was.
"""

import argparse
import concurrent.futures
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from glm5_jax.envs.sandbox import Sandbox

RESULTS = Path(__file__).parent / "results"
COMMAND = ["/bin/true"]
PARALLEL = 16


def plain() -> None:
    subprocess.run(COMMAND, check=True, capture_output=True)


def bare() -> None:
    subprocess.run(["bwrap", "--unshare-all", "--ro-bind", "/", "/", "--", *COMMAND], check=True, capture_output=True)


def sandboxed() -> None:
    result = Sandbox().run(COMMAND)
    assert result.returncode == 0, result


def milliseconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - start)


def compare(rounds: int, pool: concurrent.futures.Executor) -> dict[str, dict[str, float]]:
    """{how many at once: medians in ms of the whole, and what a sandbox adds to one command}; the kinds take turns."""
    def together(work: Callable[[], object]) -> None:
        for future in [pool.submit(work) for _ in range(PARALLEL)]:
            future.result()

    found = {}
    for name, count, run in (("one", 1, lambda work: work()), (f"parallel_{PARALLEL}", PARALLEL, together)):
        kinds = {"plain": plain, "bare_bubblewrap": bare, "sandbox": sandboxed}
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(rounds):
            for kind, work in kinds.items():
                times[kind].append(milliseconds(lambda: run(work)))
        medians = {kind: statistics.median(values) for kind, values in times.items()}
        found[name] = {f"{kind}_ms": round(median, 2) for kind, median in medians.items()} | {
            "sandbox_to_plain": round(medians["sandbox"] / medians["plain"], 2),
            "sandbox_to_bare_bubblewrap": round(medians["sandbox"] / medians["bare_bubblewrap"], 2),
            "added_ms_per_command": round((medians["sandbox"] - medians["plain"]) / count, 2)}
    return found


def device() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return f"{os.cpu_count()} x {names[0] if names else platform.machine()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    today = datetime.date.today().isoformat()
    bwrap = subprocess.run([shutil.which("bwrap") or "bwrap", "--version"], capture_output=True, text=True, check=True)
    with concurrent.futures.ThreadPoolExecutor(PARALLEL) as pool:
        compare(2, pool)
        record = {"date": today, "device": device(), "python": platform.python_version(), "kernel": platform.release(),
                  "bubblewrap": bwrap.stdout.strip(), "user": "root" if os.geteuid() == 0 else "unprivileged",
                  "memory_by": Sandbox().run(COMMAND).memory_by, "rounds": options.rounds,
                  "load_average": os.getloadavg()[0], "results": compare(options.rounds, pool)}
    path = options.out or RESULTS / f"sandbox_{today}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
