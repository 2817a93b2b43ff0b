"""Attention over selected latent rows on a TPU with SparseCores: they gather the rows, the TensorCore attends.

Of each selected row two are read and one is written by the SparseCores, and one is read by the TensorCore: four times
the bytes that have to be read at least, however long the sequence is. One query is one step: its rows are in the
memory of the TensorCore at once.

Rows are fetched where they lie if their width is a multiple of 128; else all are copied first. A cache is therefore
best made 640 wide for rows of 576, the rest zeros: a TPU would else store it column by column.

B batch, T query positions, S key positions, H heads, R latent rank, K keys selected, Q queries of one block.
"""

import functools
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels import blocks
from pallas_kernels.sparse_mla.sparse_core import LANES, SparseCores, gather

NT = (((1,), (1,)), ((), ()))  # both operands have the summed axis last
VMEM = 64 << 20


def _attend_kernel(indices_ref: Any, q_ref: Any, rows_ref: Any, out_ref: Any, lse_ref: Any, *, scale: float) -> None:
    rows_KR = pltpu.bitcast(rows_ref[...], q_ref.dtype)
    logits_HK = lax.dot_general(q_ref[...], rows_KR, NT, preferred_element_type=jnp.float32) * scale
    logits_HK = jnp.where(indices_ref[...] >= 0, logits_HK, -jnp.inf)
    top = jnp.max(logits_HK, -1, keepdims=True)
    top = jnp.where(top == -jnp.inf, 0.0, top)
    weights_HK = jnp.exp(logits_HK - top)
    total = jnp.sum(weights_HK, -1, keepdims=True)
    mixed = jnp.dot(weights_HK.astype(rows_KR.dtype), rows_KR[:, :out_ref.shape[1]], preferred_element_type=jnp.float32)
    out_ref[...] = (mixed / jnp.where(total == 0, 1.0, total)).astype(out_ref.dtype)
    lse_ref[...] = jnp.where(total == 0, -jnp.inf, top + jnp.log(total))


def attend(q_QHR: jax.Array, words: jax.Array, indices_QK: jax.Array, *, scale: float, value_dim: int,
           interpret: Any = False) -> tuple[jax.Array, jax.Array]:
    """Attention of each query over its K rows of `gather`'s result: [Q, H, value_dim] and the log-sum-exp [Q, H]."""
    (Q, H, R), K = q_QHR.shape, indices_QK.shape[1]
    of_query = lambda *shape: pl.BlockSpec((None, *shape), lambda i: (i, 0, 0))
    out, lse = pl.pallas_call(
        functools.partial(_attend_kernel, scale=scale), grid=(Q,),
        out_shape=(jax.ShapeDtypeStruct((Q, H, value_dim), q_QHR.dtype), jax.ShapeDtypeStruct((Q, H, 1), jnp.float32)),
        in_specs=[of_query(1, K), of_query(H, R), pl.BlockSpec((K // 2, R), lambda i: (i, 0))],
        out_specs=(of_query(H, value_dim), of_query(H, 1)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=VMEM),
        name="attend_rows", interpret=interpret,
    )(indices_QK[:, None], q_QHR, words)
    return out, lse[..., 0]


def forward(q_BTHR: jax.Array, kv_BSR: jax.Array, indices_BTK: jax.Array, *, scale: float, value_dim: int,
            chip: SparseCores, gathered_bytes: int | None = None,
            interpret: Any = False) -> tuple[jax.Array, jax.Array]:
    """See `api.sparse_mla`: the result and the log-sum-exp of the logits, float32 [B, T, H]; bfloat16 alone."""
    at_once = gathered_bytes or blocks.tuned(blocks.AttentionBlocks, "sparse_mla", "xla", "tpu").gathered_bytes

    def block(kv_SR: jax.Array, q_QHR: jax.Array, indices_QK: jax.Array, first_Q: jax.Array) -> Any:
        rows_QK = jnp.where(indices_QK < 0, -1, indices_QK + first_Q[:, None])
        words = gather(kv_SR, rows_QK.reshape(-1), chip, interpret=interpret)
        return attend(q_QHR, words, indices_QK, scale=scale, value_dim=value_dim, interpret=interpret)

    @jax.custom_batching.custom_vmap
    def batch(q_BTHR: jax.Array, kv_BSR: jax.Array, indices_BTK: jax.Array) -> tuple[jax.Array, jax.Array]:
        (B, S, R), (_, T, H, _), K = kv_BSR.shape, q_BTHR.shape, indices_BTK.shape[2]
        first_Q = jnp.repeat(jnp.arange(B, dtype=jnp.int32) * S, T)
        queries = max(1, at_once // (K * R * kv_BSR.dtype.itemsize))
        queries = 1 << queries.bit_length() - 1  # divides most lengths: to fill up a last block copies all
        out, lse = blocks.over_queries(functools.partial(block, kv_BSR.reshape(B * S, R)), queries,
                                       q_BTHR.reshape(B * T, H, R), indices_BTK.reshape(B * T, K), first_Q, axis=0)
        return out.reshape(B, T, H, value_dim), lse.reshape(B, T, H)

    @batch.def_vmap  # Pallas has no rule for SparseCores, and libtpu aborts where a loop holds their kernel alone
    def _(size: int, batched: list[bool], *arrays: jax.Array) -> Any:
        everywhere = (x if each else jnp.broadcast_to(x, (size, *x.shape)) for x, each in zip(arrays, batched))
        found = batch(*(x.reshape(-1, *x.shape[2:]) for x in everywhere))
        return tuple(x.reshape(size, -1, *x.shape[1:]) for x in found), (True, True)

    return batch(_fill(q_BTHR, 3, LANES), _fill(_fill(kv_BSR, 2, LANES), 1, 16), _fill(indices_BTK, 2, 16, -1))


def _fill(x: jax.Array, axis: int, multiple: int, value: int = 0) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths, constant_values=value)
