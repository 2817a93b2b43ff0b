"""Reads what the compilers leave behind: the bundle schedules of libtpu, and what ptxas says of a kernel.

A bundle is what a TPU core issues in one cycle if nothing stalls; each has a fixed number of slots per unit.
"""

import importlib
import os
import re
import subprocess
from pathlib import Path
from typing import Any

SCHEDULE, SLOTS, BUNDLES = "schedule-analysis_final_bundles.txt", "final_hlo-static-per-bundle-utilization.txt", \
    "final_bundles.txt"


def tpu_kernels(folder: Path) -> dict[str, dict[str, Any]]:
    """Every Pallas kernel whose schedule lies in `folder`, by its name: bundles, slots used, loops.

    `slots` maps a unit to the slots used by the whole program, `loops` lists [depth, bundles] of every loop in program
    order, without the loops inside it; the outermost one is the grid.
    """
    found = {}
    for schedule in sorted(folder.glob(f"*-{SCHEDULE}")):
        prefix = re.fullmatch(rf"(.*)-\d+-{SCHEDULE}", schedule.name)[1]
        text = schedule.read_text()
        name = re.sub(r"\.\d+$", "", prefix.split("-", 1)[1])
        if name == "TLP" or "custom_call_target=\"tpu_custom_call\"" not in text:  # TLP: the program around the kernels
            continue
        bundles = int(re.search(r"total scheduled bundles:\s+(\d+)", text)[1])
        slots, = folder.glob(f"{prefix}-*-{SLOTS}")
        program, = (path for path in folder.glob(f"{prefix}-*-{BUNDLES}") if path != schedule)
        while name in found:
            name += "'"
        found[name] = {"bundles": bundles, "slots": _slots(slots.read_text()), "loops": _loops(program)}
    return found | _sparse_core_kernels(folder)


def _sparse_core_kernels(folder: Path) -> dict[str, dict[str, int]]:
    """Every Pallas kernel of the SparseCores: the bundles of a subcore's program, and of its shortest loop up to the
    branch, whose delay slots follow."""
    found = {}
    for path in sorted(folder.glob("*call-start_*_bundles.txt")):
        _, _, text = path.read_text().partition("\ntec\n")
        labels, loops, bundles = {}, [], 0
        for line in text.partition("\n_tile_overlayer")[0].splitlines():
            label, jump = re.match(r"\.(\w+):", line), re.search(r"sbr\.rel .*?\.(LBB\w+)-", line)
            if label:
                labels[label[1]] = bundles
            bundles += line.startswith("0x")
            if jump and jump[1] in labels:
                loops.append(bundles - labels[jump[1]])
        found[path.name.split(".")[0]] = {"subcore_bundles": bundles, "subcore_loop": min(loops, default=bundles)}
    return found


def _slots(text: str) -> dict[str, int]:
    lines = text.splitlines()
    units = [unit.strip() for unit in lines[1].split(",")]
    rows = [line.split() for line in lines[4:]]
    used = {unit: sum(int(row[column]) for row in rows if len(row) == len(units)) for column, unit in enumerate(units)}
    return {unit: count for unit, count in used.items() if count}


def _loops(program: Path) -> list[list[int]]:
    """[depth, bundles] of every loop; a bundle carries one `>` per loop around it."""
    loops, open_loops = [], []
    with program.open() as lines:
        for line in lines:
            bundle = re.match(r"\s*(?:0x)?[0-9a-f]+\s*(\w\w)?\s*: ((?:> ?)*)\s*\{", line)
            if not bundle:
                continue
            depth = bundle[2].count(">")
            del open_loops[depth:]
            if bundle[1] == "LB" and len(open_loops) == depth:
                open_loops.pop()
            if len(open_loops) < depth:
                loop = [depth, 0]
                loops.append(loop)
                open_loops.append(loop)
            if open_loops:
                open_loops[-1][1] += 1
    return loops


def gpu_kernels(folder: Path) -> dict[str, dict[str, int]]:
    """Every kernel of ours in `folder`, by its name: registers of a thread, bytes spilled, bytes of shared memory.

    XLA leaves the PTX and the launches; ptxas is asked again, with the chip that the PTX names. A program of one launch
    leaves no list of launches, and its shared memory stays unknown.
    """
    ours = {name for path in folder.glob("*.before_optimizations.txt")
            for name in re.findall(r"(\w+)/pallas_call\"", path.read_text())}
    launches = {}
    for path in folder.glob("*.thunk_sequence_after_thunk_passes.txt"):
        for name, shared in re.findall(r"\] *(\w+) +grid: .* shared_memory: (\d+) bytes", path.read_text()):
            launches[name] = int(shared)
    found = {}
    for path in sorted(folder.glob("*.ptx")):
        text = path.read_text()
        entry, chip = re.search(r"\.entry (\w+)\(", text), re.search(r"\.target (\w+)", text)
        if not entry or entry[1] not in ours:
            continue
        command = [str(_ptxas()), "-v", "--gpu-name", chip[1], str(path), "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        found[entry[1]] = {"registers": int(re.search(r"Used (\d+) registers", said)[1]),
                           "spilled": sum(map(int, re.findall(r"(\d+) bytes spill", said)))}
        if entry[1] in launches:
            found[entry[1]]["shared"] = launches[entry[1]]
    return found


def _ptxas() -> Path:
    """The one of the wheel nvidia-cuda-nvcc."""
    paths = (Path(place) / "cu13" / "bin" / "ptxas" for place in importlib.import_module("nvidia").__path__)
    return next(path for path in paths if path.exists())
