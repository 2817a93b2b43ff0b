"""Sparse beside dense attention over growing lengths: time, temporary memory, and the exponent each grows with.

One layer of `small` without its projections of the residual stream: from queries, latent rows and the indexer's inputs
to the mixed values of every head; batch 1, causal, k = `index_topk` = 256, float32, random inputs. In blocks of
queries, as the model runs them.

- dense: attention over every earlier key, in expanded form; no indexer
- sparse: index scores of every earlier key, exact top-k, absorbed attention over the gathered rows
- selection, gathered attention: the two halves of sparse. The first scores all pairs and stays quadratic, with one
  small product per pair and indexer head; the second is linear

Memory is that of the compiled program's temporaries, beside arguments and results; of the gradient too, which is
compiled and not run. Before timing, sparse is compared with dense where the selection has room for every key.
"""

import functools
from typing import Any, Callable, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from glm5_jax import ModelConfig
from glm5_jax.model import mla
from glm5_jax.model.dsa import IndexInputs
import pallas_kernels
from pallas_kernels.blocks import over_queries

import measure
from measure import Job

LENGTHS = (2048, 4096, 8192, 16384, 32768)


class Inputs(NamedTuple):
    """What attention starts from, and the projections it needs."""

    params: dict[str, jax.Array]
    q_BTHC: jax.Array
    rows_BSR: jax.Array
    index: IndexInputs
    positions_BT: jax.Array


def inputs(config: ModelConfig, length: int) -> Inputs:
    """Random inputs of one sequence."""
    rng = np.random.default_rng(0)
    drawn = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
    specs, heads, channels = mla.specs(config), config.index_n_heads, config.index_head_dim
    params = {name: drawn(*specs[name].shape) * specs[name].scale for name in ("k_b", "v_b")}
    index = IndexInputs(drawn(1, length, heads, channels), drawn(1, length, channels), drawn(1, length, heads))
    return Inputs(params, drawn(1, length, config.num_attention_heads, config.qk_head_dim),
                  drawn(1, length, config.latent_dim), index, jnp.arange(length)[None])


def dense(config: ModelConfig, x: Inputs) -> jax.Array:
    """Attention over every earlier key, [B, T, H, C]."""
    k, v = mla.expand_rows(x.params, config, x.rows_BSR)
    block = lambda q, positions: mla.attend_dense(q, k, v, x.positions_BT[:, None] <= positions[..., None],
                                                  config.qk_head_dim ** -0.5)[0]
    return over_queries(block, config.query_chunk, x.q_BTHC, x.positions_BT)


def selection(config: ModelConfig, x: Inputs) -> jax.Array:
    """The selected keys, int32 [B, T, K]."""
    one_segment = jnp.ones_like(x.positions_BT)
    return pallas_kernels.select_topk(
        x.index.queries_BTIC, x.index.keys_BSC, x.index.weights_BTI, scale=1.0, top_k=config.index_topk,
        q_positions=x.positions_BT, k_positions=x.positions_BT, q_segments=one_segment, k_segments=one_segment)


def gathered(config: ModelConfig, x: Inputs, selected_BTK: jax.Array) -> jax.Array:
    """Attention over the selected keys, [B, T, H, C]."""
    mixed = pallas_kernels.sparse_mla(mla.absorb_queries(x.params, config, x.q_BTHC), x.rows_BSR, selected_BTK,
                                      scale=config.qk_head_dim ** -0.5, value_dim=config.kv_lora_rank)
    return mla.values_from_latent(x.params, mixed)


def sparse(config: ModelConfig, x: Inputs) -> jax.Array:
    return gathered(config, x, selection(config, x))


def compiled(fn: Callable[..., Any], *args: Any) -> jax.stages.Compiled:
    return jax.jit(fn).lower(*args).compile()


def temporaries_mib(program: jax.stages.Compiled) -> float:
    return program.memory_analysis().temp_size_in_bytes / 2**20


def gradient(attend: Callable[[ModelConfig, Inputs], jax.Array], config: ModelConfig, x: Inputs) -> jax.stages.Compiled:
    """The gradient by projections, queries and rows."""
    def total(params: Any, q_BTHC: jax.Array, rows_BSR: jax.Array, x: Inputs) -> jax.Array:
        return attend(config, x._replace(params=params, q_BTHC=q_BTHC, rows_BSR=rows_BSR)).sum()

    return compiled(jax.grad(total, (0, 1, 2)), x.params, x.q_BTHC, x.rows_BSR, x)


def at_length(config: ModelConfig, length: int, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds, ratio to dense and MiB of temporaries of each way."""
    x = inputs(config, length)
    select = compiled(functools.partial(selection, config), x)
    selected = select(x)
    programs = {"dense": (compiled(functools.partial(dense, config), x), x),
                "sparse": (compiled(functools.partial(sparse, config), x), x),
                "selection": (select, x),
                "gathered attention": (compiled(functools.partial(gathered, config), x, selected), x, selected)}
    jobs = {name: Job(program, lambda args=args: args) for name, (program, *args) in programs.items()}
    found: dict[str, dict[str, float]] = measure.speed(measure.taking_turns(jobs, rounds), "dense")
    for name, (program, *_) in programs.items():
        found[name]["temporaries_mib"] = temporaries_mib(program)
    for name, attend in (("dense", dense), ("sparse", sparse)):
        found[name]["gradient_temporaries_mib"] = temporaries_mib(gradient(attend, config, x))
    return found


def difference(config: ModelConfig) -> float:
    """The largest difference of sparse from dense, over dense's deviation, where every key is selected."""
    x = inputs(config, config.index_topk)
    full, chosen = (np.asarray(attend(config, x)) for attend in (dense, sparse))
    return float(np.abs(full - chosen).max() / full.std())


def measured(config: ModelConfig, lengths: Sequence[int], rounds: int) -> dict[str, Any]:
    """Every length and the exponents of growth; prints a table. Raises SystemExit where sparse is not dense at k."""
    apart = difference(config)
    if not apart < 1e-3:
        raise SystemExit(f"sparse attention over all keys: expected dense attention within 1e-3, found {apart:.1e}")
    print(f"Attention, k = {config.index_topk}: seconds, how many times as fast as dense, MiB of temporaries (and of "
          f"its gradient)")
    table = {}
    for length in lengths:
        table[length] = at_length(config, length, rounds)
        for name, row in table[length].items():
            gradient = f" ({row['gradient_temporaries_mib']:,.0f})" if "gradient_temporaries_mib" in row else ""
            print(f"  {length:6} {name:18} {row['seconds']:8.3f} s  {row['ratio']:6.2f}x  "
                  f"{row['temporaries_mib']:8,.0f} MiB{gradient}", flush=True)
    exponents = {}
    for name, first in table[lengths[0]].items():
        columns = [column for column in first if column == "seconds" or column.endswith("mib")]
        exponents[name] = {column: measure.growth(lengths, [table[n][name][column] for n in lengths])
                           for column in columns}
        print(f"  grows as length^p, {name:18} "
              + ", ".join(f"{column}: p = {p:.2f}" for column, p in exponents[name].items()))
    return {"index_topk": config.index_topk, "query_chunk": config.query_chunk, "rounds": rounds,
            "difference_where_all_are_selected": apart, "lengths": table, "exponents": exponents}
