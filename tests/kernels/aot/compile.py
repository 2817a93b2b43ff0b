"""Compiles the cases of one target in a process of its own, and prints one JSON record a line.

usage: compile.py TARGET DUMPS [PART OF A CASE'S NAME]      (run.py starts it with the environment it needs)
"""

import importlib
import json
import shutil
import sys
import time
from pathlib import Path

import dumps
import jax
import numpy as np
from case import Case
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from targets import TARGETS, Target, gpu_config

HERE = Path(__file__).parent


def describe(target: Target) -> Mesh:
    """A mesh of one absent chip."""
    if target.platform == "tpu":
        topology = topologies.get_topology_desc(platform="tpu", topology_name=target.topology)
    else:
        topology = topologies.get_topology_desc(platform="cuda", target_config=gpu_config(target), topology="1x1x1")
    return Mesh(np.array(topology.devices[:1]), ("one",))


def versions(target: Target) -> dict[str, str]:
    """What the figures depend on."""
    compiler = "libtpu" if target.platform == "tpu" else "nvidia-cuda-nvcc"
    return {"jax": jax.__version__, compiler: importlib.metadata.version(compiler)}


def compile_case(case: Case, target: Target, mesh: Mesh, folder: Path) -> dict:
    """Its figures; a refusal that the case expects is a figure too."""
    sharding = NamedSharding(mesh, PartitionSpec())
    started = time.monotonic()
    with jax.set_mesh(mesh):
        lowered = jax.jit(case.function, in_shardings=sharding, out_shardings=sharding).lower(*case.arguments)
        compiled = lowered.compile()
    memory = compiled.memory_analysis()
    read = dumps.tpu_kernels if target.platform == "tpu" else dumps.gpu_kernels
    return {"seconds": round(time.monotonic() - started, 1), "temporaries": memory.temp_size_in_bytes,
            "kernels": read(folder)}


def main(name: str, folder: Path, part: str) -> None:
    target = TARGETS[name]
    modules = [importlib.import_module(path.stem) for path in sorted(HERE.glob("cases_*.py"))]
    cases = [case for module in modules for case in module.CASES
             if case.platform == target.platform and (not case.only or name in case.only) and part in case.name]
    mesh = describe(target)
    print(json.dumps({"versions": versions(target)}), flush=True)
    for case in cases:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        print(json.dumps({"start": case.name}), flush=True)
        limits = case.limits(target)
        try:
            record = compile_case(case, target, mesh, folder)
        except Exception as error:  # whatever a compiler raises; the record carries it to the report
            text = f"{type(error).__name__}: {error}"
            expected = case.refused.get(name)
            kind = "refused" if expected and expected in text else "error"
            record = {kind: expected if kind == "refused" else text[:2000]}
        else:
            if name in case.refused:
                record = {"error": f"compiled, though {case.refused[name]!r} was expected"}
        print(json.dumps({"case": case.name, "limits": limits, **record}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else "")
