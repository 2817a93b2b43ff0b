"""What is measured on a GPU, G1 to G6 and the tiles: every part gives {what: {program: figures}}.

T query positions, S key positions, I indexer heads, C channels per head, H heads, R latent rank, K keys selected.
"""

import functools
from typing import Any, Callable, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from glm5_jax.model.config import ModelConfig, glm5
import pallas_kernels
from pallas_kernels.lightning_indexer import pallas_gpu as indexer_gpu
from pallas_kernels.sparse_mla import pallas_gpu as mla_gpu

import gpu_layer
import queued
from queued import Pace, Row

Table = dict[str, dict[str, Row]]
FLASH_MLA = 570e12  # operations per second of FlashMLA's sparse prefill on an H200
SHORT = 1 << 24  # scores that are selected from in less time than a call takes to dispatch, or little more
OF_LAYER = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0}


class Sizes(NamedTuple):
    """GLM-5's, and the problems of each part."""

    index: tuple[int, int] = (32, 128)  # heads and channels
    selecting: tuple[int, int] = (1, 16)  # the same where selection alone is measured: scores then cost 1/256
    heads: int = 64
    rank: int = 576
    value_dim: int = 512
    expanded: int = 256  # channels of a head of dense attention
    top_k: int = 2048
    scores: tuple[int, tuple[int, ...]] = (2048, (8192, 32768, 131072))  # queries, and lengths
    rows: tuple[tuple[int, ...], tuple[int, ...]] = ((1, 64, 2048), (16384, 65536, 131072))  # and lengths
    attention: tuple[int, int] = (4096, 32768)  # queries and length
    sequences: tuple[int, ...] = (4096, 8192, 16384, 32768)
    decoding: tuple[tuple[int, ...], tuple[int, ...]] = ((1, 32, 128), (32768, 131072))  # batches, and lengths
    grouped: tuple[int, int, int] = (32, 6144, 2048)  # experts, widths before and after
    per_expert: tuple[int, ...] = (8, 128, 1024)
    layer: ModelConfig = glm5(n_routed_experts=8, **OF_LAYER)
    tokens: int = 8192
    runs: int = 16  # of a short kernel in one program
    tried: int = 9  # tiles of a kernel, at most


class Bench(NamedTuple):
    """How parts measure, and what they measure against."""

    sizes: Sizes
    pace: Pace
    kernels: dict[str, Any]  # which implementation of the operations
    copied: float  # bytes per second, read and written
    multiplied: float  # operations per second of a large product in bfloat16

    def aim(self, row: Row, figure: str, value: float | None, aim: float | None = None) -> None:
        """Keeps a figure, beside its aim where it has one."""
        if value is not None:
            row[figure] = value
            if aim is not None:
                row.setdefault("aims", {})[figure] = aim


def drawn(seed: int, *shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    """Normal numbers, made on the device, one entry of the first axis at a time: a cache has too many for one draw."""
    one = lambda key: jax.random.normal(key, shape[1:], jnp.float32).astype(dtype)
    return jax.jit(lambda key: lax.map(one, jax.random.split(key, shape[0])))(jax.random.key(seed))


def indexed(heads_channels: tuple[int, int], batch: int, queries: int, length: int) -> dict[str, jax.Array]:
    """The queries are the last positions of every sequence."""
    heads, channels = heads_channels
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    ones = jnp.ones((batch, length), jnp.int32)
    return {"q_BTIC": drawn(1, batch, queries, heads, channels), "k_BSC": drawn(2, batch, length, channels),
            "w_BTI": drawn(3, batch, queries, heads, dtype=jnp.float32),
            "q_positions": positions[:, length - queries:], "k_positions": positions,
            "q_segments": ones[:, length - queries:], "k_segments": ones}


def pairs(queries: int, length: int, most: int | None = None) -> int:
    """How many keys the last queries of a sequence see, or select where `most` are selected, in all."""
    return int(np.minimum(np.arange(length - queries, length) + 1, most or length).sum())


def operations(bench: Bench) -> tuple[Callable[..., jax.Array], ...]:
    """The indexer's scores and selection, and sparse attention, with the kernels that are measured."""
    of_index = lambda fn, **options: lambda x: fn(**x, scale=128 ** -0.5, **options, **bench.kernels)
    attend = lambda q, kv, indices, **options: pallas_kernels.sparse_mla(
        q, kv, indices, scale=256 ** -0.5, value_dim=bench.sizes.value_dim, **bench.kernels | options)
    return (of_index(pallas_kernels.index_scores),
            of_index(pallas_kernels.select_topk, top_k=bench.sizes.top_k), attend)


def scores(bench: Bench) -> Table:
    """G1: the scores of the indexer beside XLA's products, head by head."""
    table, (queries, lengths) = {}, bench.sizes.scores
    own = operations(bench)[0]
    for length in lengths:
        x = indexed(bench.sizes.index, 1, queries, length)
        table[f"{queries} x {length}"] = rows = queued.timed({
            "index_scores": (own, x),
            "XLA": (lambda x: pallas_kernels.index_scores(**x, scale=128 ** -0.5, implementation="xla"), x)},
            bench.pace)
        rate = queued.per_second(2 * np.prod(bench.sizes.index) * pairs(queries, length), rows["index_scores"])
        bench.aim(rows["index_scores"], "of_matmul", rate and rate / bench.multiplied, 0.55)
        bench.aim(rows["index_scores"], "faster_than_xla", queued.ratio(rows["XLA"], rows["index_scores"]))
    return table


def selection(bench: Bench) -> Table:
    """G2: selection beside `lax.top_k` of scores that are there already; then scores and selection together."""
    table, (numbers, lengths) = {}, bench.sizes.rows
    score, own, _ = operations(bench)
    sort = lambda scores: lax.top_k(scores, bench.sizes.top_k)
    for length in lengths:
        for number in numbers:
            x = indexed(bench.sizes.selecting, 1, number, length)
            x["q_positions"] = jnp.full_like(x["q_positions"], length)  # every row is whole
            table[f"{number} rows of {length}"] = rows = queued.timed({
                "select_topk": (own, x), "lax.top_k": (sort, drawn(4, number, length, dtype=jnp.float32))},
                bench.pace, times=bench.sizes.runs if number * length < SHORT else 1)
            bench.aim(rows["select_topk"], "faster_than_top_k",
                      queued.ratio(rows["lax.top_k"], rows["select_topk"]), 5)
            read = queued.per_second(4 * number * length, rows["select_topk"])
            bench.aim(rows["select_topk"], "of_copy", read and read / bench.copied)
        x = indexed(bench.sizes.index, 1, numbers[-1], length)
        table[f"{numbers[-1]} x {length} with scores"] = rows = queued.timed({
            "select_topk": (own, x), "index_scores, lax.top_k": (lambda x: sort(score(x)), x)}, bench.pace)
        bench.aim(rows["select_topk"], "faster_than_top_k",
                  queued.ratio(rows["index_scores, lax.top_k"], rows["select_topk"]))
    return table


def attention(bench: Bench) -> Table:
    """G3: sparse attention and its gradients; then, over whole sequences, with its indexer beside dense attention."""
    sizes, (queries, length) = bench.sizes, bench.sizes.attention
    _, select, attend = operations(bench)
    arrays = lambda queries, length: (drawn(5, 1, queries, sizes.heads, sizes.rank), drawn(6, 1, length, sizes.rank))
    q, kv = arrays(queries, length)
    indices = jax.jit(select)(indexed(sizes.index, 1, queries, length))
    with_gradient = lambda q, kv, indices, **options: gpu_layer.with_gradient(
        lambda q, kv: attend(q, kv, indices, **options), q, kv)
    rows = queued.timed({
        "sparse_mla": (attend, q, kv, indices),
        "XLA": (functools.partial(attend, implementation="xla", interpret=False), q, kv, indices),
        "with gradient": (with_gradient, q, kv, indices),
        "with gradient, any order": (functools.partial(with_gradient, deterministic=False), q, kv, indices)},
        bench.pace)
    work = 2 * sizes.heads * (sizes.rank + sizes.value_dim) * pairs(queries, length, sizes.top_k)
    own, rate = rows["sparse_mla"], queued.per_second(work, rows["sparse_mla"])
    bench.aim(own, "of_flash_mla", rate and rate / FLASH_MLA, 0.5)
    bench.aim(own, "of_matmul", rate and rate / bench.multiplied)
    bench.aim(own, "faster_than_xla", queued.ratio(rows["XLA"], own))
    for name in ("with gradient", "with gradient, any order"):
        both = queued.ratio(rows[name], own)
        bench.aim(rows[name], "backward_over_forward", both and both - 1, 3)
    table = {f"{queries} queries of {length}": rows}

    dense = {name: functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation=name)
             for name in ("cudnn", "xla") if name == "xla" or jax.default_backend() == "gpu"}
    for length in sizes.sequences:
        q, kv = arrays(length, length)
        x, qkv = indexed(sizes.index, 1, length, length), [drawn(seed, 1, length, sizes.heads, sizes.expanded)
                                                           for seed in (7, 8, 9)]
        programs = {"sparse": (lambda q, kv, x: attend(q, kv, select(x)), q, kv, x)} | {
            f"dense, {name}": (fn, *qkv) for name, fn in dense.items() if name != "xla" or length <= 8192}
        table[f"sequence of {length}"] = rows = queued.timed(programs, bench.pace)
        for name in programs:
            bench.aim(rows[name], "slower_than_sparse", queued.ratio(rows[name], rows["sparse"]))
    return table


def decoding(bench: Bench) -> Table:
    """G4: one token of every sequence: the indexer over all its keys, and attention over the selected rows."""
    table, sizes, (batches, lengths) = {}, bench.sizes, bench.sizes.decoding
    _, select, _ = operations(bench)
    attend = lambda q, kv, indices: pallas_kernels.sparse_mla_decode(
        q, kv, indices[:, 0], jnp.full(len(kv), kv.shape[1], jnp.int32), scale=256 ** -0.5, value_dim=sizes.value_dim,
        **bench.kernels)
    for length in lengths:
        for batch in batches:
            x = indexed(sizes.index, batch, 1, length)
            q, kv = drawn(5, batch, sizes.heads, sizes.rank), drawn(6, batch, length, sizes.rank)
            table[f"{batch} x {length}"] = rows = queued.timed({
                "both": (lambda q, kv, x: attend(q, kv, select(x)), q, kv, x), "select_topk": (select, x),
                "sparse_mla_decode": (attend, q, kv, jax.jit(select)(x))}, bench.pace, times=sizes.runs)
            keys = 2 * batch * length * sizes.index[1]
            latents = 2 * batch * (sizes.rank * min(sizes.top_k, length) + sizes.heads * (sizes.rank + sizes.value_dim))
            for name, read in (("both", keys + latents), ("select_topk", keys), ("sparse_mla_decode", latents)):
                rate = queued.per_second(read, rows[name])
                aim = 0.6 if name == "both" and batch == batches[-1] else None
                bench.aim(rows[name], "of_copy", rate and rate / bench.copied, aim)
    return table


def experts(bench: Bench) -> Table:
    """G5: grouped products beside `lax.ragged_dot`, and one dense product of as many operations."""
    table, (groups, depth, width) = {}, bench.sizes.grouped
    w, rng = drawn(2, groups, depth, width), np.random.default_rng(0)
    own = lambda x, w, sizes: pallas_kernels.grouped_matmul(x, w, sizes, **bench.kernels)
    dense = lambda x, w, sizes: x @ w[0]
    with_gradient = lambda fn: lambda x, w, sizes: gpu_layer.with_gradient(lambda x, w: fn(x, w, sizes), x, w)
    for each in bench.sizes.per_expert:
        x, last = drawn(1, groups * each, depth), each == bench.sizes.per_expert[-1]
        for load, share in {"even": np.ones(groups), "zipf": 1 / np.arange(1, groups + 1)}.items():
            even = np.full(groups, each)
            sizes = jnp.asarray(even if load == "even" else rng.multinomial(len(x), share / share.sum()), jnp.int32)
            kinds = {"grouped_matmul": own, "lax.ragged_dot": lax.ragged_dot, "dense": dense}
            rows = queued.timed({name: (fn, x, w, sizes) for name, fn in kinds.items()}, bench.pace)
            if load == "even":
                rows |= queued.timed({f"{name} with gradient": (with_gradient(fn), x, w, sizes)
                                      for name, fn in kinds.items()}, bench.pace)
            table[f"{each} rows each, {load}"] = rows
            for end in ("", " with gradient") if load == "even" else ("",):
                ours, theirs, roof = (rows[name + end] for name in kinds)
                bench.aim(ours, "faster_than_ragged_dot", queued.ratio(theirs, ours), None if end else 5)
                bench.aim(ours, "of_dense", queued.ratio(roof, ours), 0.7 if last and not end else None)
    return table


def layer(bench: Bench) -> Table:
    """G6: one whole layer with its gradients, and its parts."""
    config = bench.sizes.layer.replace(kernels=bench.kernels["implementation"],
                                       interpret_kernels=bench.kernels["interpret"])
    given = gpu_layer.inputs(config, bench.sizes.tokens)
    rows = queued.timed(gpu_layer.programs(config, given), bench.pace)
    bench.aim(rows["whole"], "tokens_per_second", queued.per_second(bench.sizes.tokens, rows["whole"]))
    parts = [row.get("seconds") for name, row in rows.items() if name != "whole"]
    if None not in parts:
        bench.aim(rows["whole"], "parts_over_whole", queued.ratio({"seconds": sum(parts)}, rows["whole"]))
    return {f"{bench.sizes.tokens} tokens": rows}


def tiles(bench: Bench) -> Table:
    """A few tiles for every kernel that lets them be chosen: the first is what it takes by itself.

    Whoever puts another one into a kernel has to see its parity, and `make test-aot` for its registers.
    """
    sizes, (queries, length) = bench.sizes, bench.sizes.attention
    in_order = lambda x: [x[name] for name in ("q_BTIC", "k_BSC", "w_BTI", "q_positions", "k_positions", "q_segments",
                                               "k_segments")]
    interpret = bench.kernels["interpret"]
    of_index = {"scale": 128 ** -0.5, "interpret": interpret}
    of_attention = {"scale": 256 ** -0.5, "value_dim": sizes.value_dim, "interpret": interpret}
    x = indexed(sizes.index, 1, queries, length)
    decoded = indexed(sizes.index, sizes.decoding[0][-1], 1, sizes.decoding[1][0])
    q, kv = drawn(5, 1, queries, sizes.heads, sizes.rank), drawn(6, 1, length, sizes.rank)
    select = functools.partial(indexer_gpu.select_topk, **of_index, top_k=sizes.top_k)
    attend = functools.partial(mla_gpu.forward, **of_attention)
    indices = jax.jit(select)(*in_order(x))
    out, lse = jax.jit(attend)(q, kv, indices)
    pull = functools.partial(mla_gpu.backward, **of_attention, deterministic=True)
    kernels: dict[str, tuple[Callable[..., Any], Any, type, tuple[tuple[int, int], ...]]] = {
        "index_scores": (functools.partial(indexer_gpu.index_scores, **of_index), in_order(x), indexer_gpu.Tiles,
                         ((128, 128), (64, 128), (128, 64), (64, 256), (128, 256))),
        "select_topk": (select, in_order(x), indexer_gpu.Tiles, ((128, 128), (64, 128), (128, 64), (64, 256))),
        "select_topk, decoding": (select, in_order(decoded), indexer_gpu.Tiles,
                                  ((128, 128), (16, 128), (16, 256), (32, 128))),
        "sparse_mla": (attend, (q, kv, indices), mla_gpu.Tiles, ((64, 16), (32, 16), (32, 32), (16, 32), (16, 64))),
        "sparse_mla, gradient": (pull, (q, kv, indices, lse, out, lse), mla_gpu.Tiles,
                                 ((32, 32), (32, 16), (16, 32), (16, 16))),
    }
    table: Table = {}
    for kernel, (fn, args, kind, candidates) in kernels.items():
        programs = {f"{a} x {b}": (functools.partial(fn, tiles=kind(a, b)), *args)
                    for a, b in candidates[:sizes.tried]}
        rows = queued.timed(programs, bench.pace)
        # What no compiler takes is a finding here, and no failure.
        table[kernel] = {name: {"refused": row["failed"]} if "failed" in row else row for name, row in rows.items()}
        own = table[kernel][next(iter(programs))]
        for row in table[kernel].values():
            bench.aim(row, "faster_than_own", queued.ratio(own, row))
    return table


class Part(NamedTuple):
    """What measures it, and the kernels whose parity it rests on."""

    measure: Callable[[Bench], Table]
    kernels: tuple[str, ...]


PARTS = {
    "G1": Part(scores, ("index_scores",)),
    "G2": Part(selection, ("index_scores", "select_topk")),
    "G3": Part(attention, ("select_topk", "sparse_mla")),
    "G4": Part(decoding, ("select_topk", "sparse_mla_decode")),
    "G5": Part(experts, ("grouped_matmul",)),
    "G6": Part(layer, ("select_topk", "sparse_mla", "grouped_matmul")),
    "tiles": Part(tiles, ("index_scores", "select_topk", "sparse_mla")),
}
