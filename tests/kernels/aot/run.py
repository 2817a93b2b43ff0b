"""Compiles every kernel for chips that are not here, and compares what the compilers say with what they said before.

usage: run.py [--target NAME ...] [--case PART] [--record] [--keep FOLDER]

Each target is compiled in a process of its own, because libtpu aborts the process it is unhappy in. Figures are exact
for given versions of jax and of the compiler: `benchmarks/results/aot.json` holds them by (jax, compiler, target). A
figure of a known key may grow by 3 %; those of an unknown key are reported, and written with --record.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from targets import TARGETS, environment

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parents[2] / "benchmarks" / "results" / "aot.json"
ALLOWED_GROWTH = 1.03
TIMEOUT_S = 1200
AT_ONCE = 2  # processes: a compiler takes one core, and a gigabyte or two


def compile_target(name: str, part: str, keep: Path | None) -> tuple[str, dict[str, dict]]:
    """(key, {case: record}) of one target; a process that dies leaves an error with the case it was at."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = (keep or Path(temporary)) / name
        command = [sys.executable, str(HERE / "compile.py"), name, str(folder), part]
        log = Path(temporary) / "log"
        try:
            with log.open("w") as errors:
                done = subprocess.run(command, env=environment(TARGETS[name], folder), stdout=subprocess.PIPE,
                                      stderr=errors, text=True, timeout=TIMEOUT_S)
            printed, ended = done.stdout, f"exit code {done.returncode}"
        except subprocess.TimeoutExpired as error:
            printed, ended = (error.stdout or b"").decode(), f"no end after {TIMEOUT_S} s"
        lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
        tail = log.read_text(errors="replace")[-2000:]
    versions = next((line["versions"] for line in lines if "versions" in line), {})
    records = {line["case"]: line for line in lines if "case" in line}
    for line in lines:
        if "start" in line:
            records.setdefault(line["start"], {"error": f"the process ended: {ended}\n{tail}"})
    if not records and ended != "exit code 0":
        records["(none reached)"] = {"error": f"the process ended: {ended}\n{tail}"}
    return ", ".join([*(f"{what} {version}" for what, version in versions.items()), name]), records


def figures(record: dict) -> dict[str, float]:
    """{kernel/figure: value} of a compiled case; these are what is kept and compared."""
    found = {}
    if "temporaries" in record:
        found["temporaries"] = record["temporaries"]
    for kernel, measured in record.get("kernels", {}).items():
        if "bundles" in measured:
            found[f"{kernel}/bundles"] = measured["bundles"]
            found[f"{kernel}/largest_loop"] = max((size for _, size in measured["loops"]), default=measured["bundles"])
            found[f"{kernel}/matrix_slots"] = measured["slots"].get("MXU", 0)
            found[f"{kernel}/spill_slots"] = measured["slots"].get("VSTORE:SPILL", 0)
        else:
            found |= {f"{kernel}/{figure}": value for figure, value in measured.items()}
    return found


def complaints(case: str, record: dict, known: dict[str, float] | None) -> Iterator[str]:
    """What is wrong with a record, given the figures kept for its key."""
    if "error" in record:
        yield f"{case}: {record['error']}"
    found = figures(record)
    for figure, limit in record.get("limits", {}).items():
        if figure not in found and "refused" not in record and "error" not in record:
            yield f"{case}: no figure {figure}; found {', '.join(found)}"
        elif found.get(figure, 0) > limit:
            yield f"{case}: {figure} is {found[figure]:,}, over the limit of {limit:,.0f}"
    for figure, before in (known or {}).items():
        if figure in found and found[figure] > max(before * ALLOWED_GROWTH, before):
            yield f"{case}: {figure} was {before:,}, is {found[figure]:,}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="*", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--case", default="", help="only cases with this in their name")
    parser.add_argument("--record", action="store_true", help="keep the figures as those of their key")
    parser.add_argument("--keep", type=Path, help="leave the compilers' dumps in this folder")
    options = parser.parse_args()

    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    wrong = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        compiled = pool.map(lambda name: compile_target(name, options.case, options.keep), options.target)
        for name, (key, records) in zip(options.target, compiled):
            known = results.get(key, {})
            print(f"== {key}{'' if known else ' (unknown: measured, not compared)'}")
            for case, record in records.items():
                found = [f"{figure} {value:,}" for figure, value in figures(record).items()]
                said = record.get("refused") or "; ".join(found)
                print(f"{case}: {said} [{record.get('seconds', '-')} s]", flush=True)
                wrong += [f"{name}: {text}" for text in complaints(case, record, known.get(case))]
            if options.record:
                kept = {case: figures(record) for case, record in records.items() if "kernels" in record}
                results[key] = dict(sorted({**known, **kept}.items()))
                RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
    for text in wrong:
        print(f"WRONG {text}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
