"""Output projection and cross-entropy in blocks of positions beside all at once: memory, time, and equality.

    python benchmarks/chunked_loss.py

Two CPU cores: about three minutes. Memory is that of the compiled gradient's temporaries, beside arguments and
results, at the released width and vocabulary; nothing of it is run. Its floor is one gradient of the head, which a CPU
keeps beside the sum of all. Time is the ratio to the loss in one piece at a smaller width, run in turn; by the products
alone, four instead of three, it would be 1.33. Seen: 5.5 to 4.4 GiB instead of 18.9, in 0.71 to 0.77 of the time,
because blocks of logits stay nearer the cache. Writes benchmarks/results/chunked_loss-<date>-<device>.json.
"""

import argparse
import functools
import pathlib
import time
from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np

from glm5_jax.losses import token

import measure

VOCABULARY = 154_880
ROW, WIDTH = 16_384, 6144  # for memory
TIMED_ROW, TIMED_WIDTH = 1024, 256  # for time
CHUNKS = (None, 2048, 1024, 512, 256, 128)
TIMED_CHUNKS = (None, 512, 256, 128)
MIB = 2**20


def gradient(chunk: int | None) -> Callable[..., Any]:
    """The jitted gradient of the mean loss by hidden states and head."""
    def loss(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
        return token.projected_cross_entropy(hidden, head, targets, chunk=chunk)[0].mean()

    return jax.jit(jax.value_and_grad(loss, (0, 1)))


def temporaries(chunk: int | None, row: int, width: int) -> int:
    """Bytes of the compiled gradient's temporaries."""
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (
        ((1, row, width), jnp.float32), ((width, VOCABULARY), jnp.float32), ((1, row), jnp.int32))]
    return gradient(chunk).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def timed(rounds: int) -> list[dict[str, Any]]:
    """The median time of each chunk over that of one piece, and how far its gradients are from that one's."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(1, TIMED_ROW, TIMED_WIDTH)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(TIMED_WIDTH, VOCABULARY)) * 0.02, jnp.float32)
    targets = jnp.asarray(rng.integers(0, VOCABULARY, (1, TIMED_ROW)), jnp.int32)
    steps = {chunk: functools.partial(gradient(chunk), hidden, head, targets) for chunk in TIMED_CHUNKS}
    results = {chunk: jax.block_until_ready(step()) for chunk, step in steps.items()}
    seconds: dict[int | None, list[float]] = {chunk: [] for chunk in steps}
    for _ in range(rounds):
        for chunk, step in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step())
            seconds[chunk].append(time.perf_counter() - start)
    value, whole = results[None]
    far = lambda grads: max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in zip(grads, whole))
    return [{"chunk": chunk, "seconds": float(np.median(seconds[chunk])),
             "ratio": float(np.median(np.divide(seconds[chunk], seconds[None]))),
             "loss_difference": abs(float(results[chunk][0] - value)), "gradient_difference": far(results[chunk][1])}
            for chunk in TIMED_CHUNKS]


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and time of the chunked loss.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    options = parser.parse_args()
    name = lambda chunk: "one piece" if chunk is None else str(chunk)

    logits, head = ROW * VOCABULARY * 4 / MIB, WIDTH * VOCABULARY * 4 / MIB
    print(f"Temporaries at [{ROW}, {WIDTH}] x [{WIDTH}, {VOCABULARY}], float32; the logits are {logits:,.0f} MiB, the "
          f"head is {head:,.0f} MiB")
    memory = []
    for chunk in CHUNKS:
        memory.append({"chunk": chunk, "temporaries_mib": temporaries(chunk, ROW, WIDTH) / MIB})
        print(f"  {name(chunk):>9}  {memory[-1]['temporaries_mib']:10,.0f} MiB", flush=True)
    print(f"Time at [{TIMED_ROW}, {TIMED_WIDTH}] x [{TIMED_WIDTH}, {VOCABULARY}]")
    times = timed(options.rounds)
    for row in times:
        print(f"  {name(row['chunk']):>9}  {row['seconds']:6.2f} s  {row['ratio']:5.2f} x  largest difference of a "
              f"gradient {row['gradient_difference']:.1e} of its largest entry")
    path = measure.write(options.out, "chunked_loss", measure.surroundings() | {
        "vocabulary": VOCABULARY,
        "memory": {"positions": ROW, "width": WIDTH, "logits_mib": logits, "head_mib": head, "rows": memory},
        "time": {"positions": TIMED_ROW, "width": TIMED_WIDTH, "rounds": options.rounds, "rows": times}})
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
