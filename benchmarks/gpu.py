"""The Pallas kernels on a GPU: first what they compute, then how fast, G1 to G6, in one call of under eight minutes.

    PYTHONPATH=. python benchmarks/gpu.py            (`--only G1,G3`; `--toy`: all of it on a CPU, in minutes)

It needs jax for the GPU, numpy, flax and this repository. Every kernel is compared with its exact reference, at small
sizes and at the model's, forward and backward; a part whose kernel is wrong is left out, the others go on, and the exit
code is 1. Then a large copy and a large product in bfloat16 are timed, and the parts are fractions of these:

- **G1** scores of the indexer: at least 55 % of the product's rate
- **G2** selection of 2,048: at least 5 times as fast as `lax.top_k`
- **G3** sparse attention: at least 50 % of 570 TFLOP/s, what FlashMLA reaches on an H200; backward at most 3 times as
  long as forward; and from which length on it is faster than dense attention
- **G4** decoding: at least 60 % of the copy's rate at batch 128
- **G5** products of 32 experts: at least 5 times as fast as `lax.ragged_dot`, and 70 % of a dense product at 1,024 rows
- **G6** one layer, forward and backward: tokens per second, and the sum of its parts over the whole
- **tiles** a few tile sizes for every kernel that lets them be chosen

Inputs are random normal. Calls are queued, so that dispatching them does not count; medians over rounds in which the
programs take turns. Writes benchmarks/results/gpu-<date>-<device>.json after every part.
"""

import argparse
import json
import os
import pathlib
import time
from typing import Any, Iterator

import jax
import jax.numpy as jnp

from glm5_jax.model.config import tiny

import gpu_parity
import gpu_parts
import measure
import queued
from gpu_parts import PARTS, Bench, Sizes
from queued import Pace

COPIED, MULTIPLIED = 1 << 31, 8192  # bytes read, and the side of the matrices
AT_MOST = ("backward_over_forward",)  # aims that are an upper bound
TOY = Sizes(index=(2, 16), heads=2, rank=20, value_dim=16, expanded=8, top_k=8, scores=(8, (24,)), rows=((2,), (24,)),
            attention=(4, 24), sequences=(16,), decoding=((2,), (24,)), grouped=(3, 16, 24), per_expert=(4,),
            layer=tiny(hidden_size=16, n_routed_experts=4, moe_intermediate_size=8, num_attention_heads=2,
                       q_lora_rank=8, kv_lora_rank=16, index_n_heads=2, index_topk=8, dense_attention_max_len=8,
                       **gpu_parts.OF_LAYER), tokens=16, runs=2, tried=2)


def ceilings(pace: Pace, copied: int, multiplied: int) -> dict[str, dict[str, Any]]:
    """Bytes per second of a copy, read and written, and operations per second of a product in bfloat16.

    `copied`: bytes read; `multiplied`: the side of the matrices.
    """
    x = gpu_parts.drawn(1, 8, copied // 32, dtype=jnp.float32)
    a, b = (gpu_parts.drawn(seed, multiplied, multiplied) for seed in (2, 3))
    rows = queued.timed({"copy": (jnp.negative, x), "product": (jnp.matmul, a, b)}, Pace(pace.rounds))
    for name, amount in (("copy", 2 * x.nbytes), ("product", 2 * multiplied ** 3)):
        rows[name]["per_second"] = amount / rows[name]["seconds"]
    return rows


def failures(record: Any, place: str = "") -> Iterator[str]:
    """Everything that failed or was left out, by where it stands in the record."""
    if isinstance(record, dict):
        for name, value in record.items():
            if name == "failed":
                yield f"{place}: {value}"
            else:
                yield from failures(value, f"{place}, {name}" if place else name)


def show(part: str, table: gpu_parts.Table) -> None:
    for what, rows in table.items():
        for name, row in rows.items():
            aims = row.get("aims", {})
            told = [f"{figure} {value:.3g}" + ("" if figure not in aims else
                    f" (aim: at {'most' if figure in AT_MOST else 'least'} {aims[figure]:g})")
                    for figure, value in row.items() if figure not in ("seconds", "lowest", "highest", "aims", "failed",
                                                                       "refused")]
            took = f"{1000 * row['seconds']:9.3f} ms" if "seconds" in row else row.get("failed", row.get("refused"))
            print(f"  {part:5} {what:28} {name:28} {took}  {', '.join(told)}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Pallas kernels on a GPU: parity, then fractions of its ceilings.")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PARTS), metavar="G1,G3",
                        help=f"of {', '.join(PARTS)}")
    parser.add_argument("--toy", action="store_true", help="on any device, interpreted, at sizes that mean nothing")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=450, help="after so many nothing more is begun")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.only if name not in PARTS]:
        parser.error(f"--only: expected some of {', '.join(PARTS)}, found {', '.join(unknown)}")
    if options.toy:  # compiling is nearly all of it
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    if not options.toy and jax.default_backend() != "gpu":
        parser.error(f"expected a GPU, found {jax.devices()[0].device_kind}; `--toy` runs on any device")

    pace = Pace(options.rounds, deadline=time.monotonic() + options.seconds)
    kernels = {"implementation": "pallas_gpu", "interpret": options.toy}
    record: dict[str, Any] = measure.surroundings() | {"rounds": options.rounds, "toy": options.toy}
    print(f"{record['device']}, {', '.join(f'{name} {version}' for name, version in record['versions'].items())}")
    path = measure.write(options.out, "gpu", record)

    def keep(name: str, found: Any) -> Any:
        record[name] = found
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        return found

    print("parity: relative errors")
    needed = [kernel for kernel in gpu_parity.KERNELS if any(kernel in PARTS[name].kernels for name in options.only)]
    shapes = gpu_parity.SMALL[:1] if options.toy else (*gpu_parity.SMALL, gpu_parity.REAL)
    parity = keep("parity", gpu_parity.check(needed, shapes, kernels))
    broken = {kernel for kernel, found in parity.items() if any(failures(found))}
    rates = keep("ceilings", ceilings(pace, *((1 << 16, 64) if options.toy else (COPIED, MULTIPLIED))))
    bench = Bench(TOY if options.toy else Sizes(), pace, kernels, *(row["per_second"] for row in rates.values()))
    print(f"ceilings: copy {bench.copied / 1e9:,.0f} GB/s, product {bench.multiplied / 1e12:,.0f} TFLOP/s")
    for name in options.only:
        if wrong := broken.intersection(PARTS[name].kernels):
            keep(name, {"failed": f"left out: wrong results of {', '.join(sorted(wrong))}"})
        elif time.monotonic() > pace.deadline:
            keep(name, {"failed": "left out: the time is up"})
        else:
            try:
                show(name, keep(name, PARTS[name].measure(bench)))
            except Exception as error:  # such as no memory for its inputs: the other parts are still of use
                keep(name, {"failed": f"{type(error).__name__}: {error}"[:400]})
    for text in (wrong := list(failures(record))):
        print(f"WRONG {text}")
    print(f"Written to {path}, after {time.monotonic() - pace.deadline + options.seconds:.0f} s")
    return bool(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
