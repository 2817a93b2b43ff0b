"""Attention over selected latent rows in XLA's operations, forward and backward, one block of queries at a time.

The selected rows of a block are gathered, or, where nearly all are selected, used in place under a mask.

B batch, T query positions, S key positions, H heads, R latent rank, K keys selected, N rows at hand: the K gathered or
all S, X heads twice.
"""

from typing import Any, Callable, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels import blocks
from pallas_kernels.blocks import AttentionBlocks


class Keys(NamedTuple):
    """The rows at hand for a query and which of them it selected."""

    rows_NR: jax.Array
    present_N: jax.Array
    offset_N: jax.Array  # added to the logits: NaN for a row that is not finite, else 0


def forward(q_BTHR: jax.Array, kv_BSR: jax.Array, indices_BTK: jax.Array, *, scale: float,
            value_dim: int, sizes: AttentionBlocks | None = None) -> tuple[jax.Array, jax.Array]:
    """See `api.sparse_mla`: the result and the log-sum-exp of the logits, float32 [B, T, H]."""
    def sequence(sizes: AttentionBlocks, q_THR: jax.Array, kv_SR: jax.Array, indices_TK: jax.Array) -> Any:
        queries, keys_of = _plan(sizes, q_THR, kv_SR, indices_TK)
        query = lambda q_HR, indices_K: _attend(q_HR, keys_of(indices_K), scale)
        return blocks.over_queries(jax.vmap(query), queries, q_THR, indices_TK, axis=0)

    out_BTHR, lse_BTH = _each_sequence(sequence, sizes, q_BTHR, kv_BSR, indices_BTK)
    return out_BTHR[..., :value_dim].astype(q_BTHR.dtype), lse_BTH


def backward(q_BTHR: jax.Array, kv_BSR: jax.Array, indices_BTK: jax.Array, lse_BTH: jax.Array, d_out: jax.Array,
             delta_BTH: jax.Array, *, scale: float, value_dim: int, deterministic: bool,
             sizes: AttentionBlocks | None = None) -> tuple[jax.Array, jax.Array]:
    """The gradients of q, in its dtype, and of kv, float32; `delta` is sum(d_out * out) less the gradient of lse."""
    def sequence(sizes: AttentionBlocks, q_THR: jax.Array, kv_SR: jax.Array, *others: jax.Array) -> Any:
        indices_TK = others[0]
        queries, keys_of = _plan(sizes, q_THR, kv_SR, indices_TK)
        one_by_one = deterministic and not sizes.ordered_scatter
        add = _add_dense if _dense(sizes, kv_SR, indices_TK) else _add_one_by_one if one_by_one else _add_gathered

        def step(d_kv_SR: jax.Array, block: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
            q, indices, *rest = block
            query = lambda q_HR, indices_K, *rest: _pull(q_HR, keys_of(indices_K), scale, *rest)
            d_q, weights_TXN, vectors_TXR = jax.vmap(query)(q, indices, *rest)
            return add(d_kv_SR, indices, weights_TXN, vectors_TXR), d_q.astype(q.dtype)

        zeros = jnp.zeros(kv_SR.shape, jnp.float32)
        d_kv_SR, d_q = lax.scan(step, zeros, blocks.split((q_THR, *others), queries))
        return blocks.merge(d_q, len(q_THR)), d_kv_SR

    d_out = jnp.pad(d_out, [(0, 0)] * 3 + [(0, q_BTHR.shape[-1] - value_dim)])
    return _each_sequence(sequence, sizes, q_BTHR, kv_BSR, indices_BTK, lse_BTH, d_out, delta_BTH)


def _each_sequence(fn: Callable[..., Any], sizes: AttentionBlocks | None, *args: jax.Array) -> Any:
    """`fn(sizes, *args)` of every sequence, with the given sizes or those of the platform that is compiled for."""
    def on(sizes: AttentionBlocks) -> Callable[..., Any]:
        if sizes.whole_batch or args[0].shape[1] == 1:  # decoding: the sequences are the only block there is
            return lambda *args: jax.vmap(lambda *each: fn(sizes, *each))(*args)
        return lambda *args: lax.map(lambda each: fn(sizes, *each), args)

    if sizes is not None:
        return on(sizes)(*args)
    cpu, tpu, cuda = (on(blocks.tuned(AttentionBlocks, "sparse_mla", "xla", name)) for name in ("cpu", "tpu", "cuda"))
    return lax.platform_dependent(*args, cpu=cpu, tpu=tpu, default=cuda)


def _dense(sizes: AttentionBlocks, kv_SR: jax.Array, indices_TK: jax.Array) -> bool:
    return len(kv_SR) <= sizes.dense_up_to * indices_TK.shape[-1]


def _plan(sizes: AttentionBlocks, q_THR: jax.Array, kv_SR: jax.Array,
          indices_TK: jax.Array) -> tuple[int, Callable[[jax.Array], Keys]]:
    """Queries per block, and what makes the keys of one query from its indices."""
    if not _dense(sizes, kv_SR, indices_TK):
        row_bytes = kv_SR.shape[-1] * kv_SR.dtype.itemsize
        return max(1, sizes.gathered_bytes // (indices_TK.shape[-1] * row_bytes)), lambda i: _gather(sizes, kv_SR, i)
    # A row that is not finite must reach those that selected it, and no other by way of a product with zero.
    finite_S = jnp.isfinite(kv_SR).all(-1)
    rows_SR, offset_S = jnp.where(finite_S[:, None], kv_SR, 0), jnp.where(finite_S, 0.0, jnp.nan)
    rows_SR = rows_SR.astype(jnp.float32) if sizes.float32_dense else rows_SR

    def mark(indices_K: jax.Array) -> Keys:
        targets = jnp.where(indices_K < 0, len(kv_SR), indices_K)
        present_S = jnp.zeros(len(kv_SR), bool).at[targets].set(True, mode="drop")
        return Keys(rows_SR, present_S, offset_S)

    return max(1, sizes.logits_bytes // (4 * q_THR.shape[1] * len(kv_SR))), mark


def _gather(sizes: AttentionBlocks, kv_SR: jax.Array, indices_K: jax.Array) -> Keys:
    dtype = kv_SR.dtype
    if sizes.gathered_as_bits and dtype.itemsize == 2:
        # The barrier leaves this to each step: XLA would else make the bits of all rows before the first.
        kv_SR, indices_K = lax.optimization_barrier((kv_SR, indices_K))
        kv_SR = lax.bitcast_convert_type(kv_SR, jnp.uint16)
    present_K = indices_K >= 0
    rows_KR = kv_SR.at[jnp.maximum(indices_K, 0)].get(mode="promise_in_bounds")
    rows_KR = jnp.where(present_K[:, None], rows_KR, 0)  # whatever row 0 holds
    rows_KR = rows_KR if rows_KR.dtype == dtype else lax.bitcast_convert_type(rows_KR, dtype)
    return Keys(rows_KR, present_K, jnp.zeros(indices_K.shape, jnp.float32))


def _logits(q_HR: jax.Array, keys: Keys, scale: float) -> jax.Array:
    products = jnp.einsum("hr,nr->hn", q_HR.astype(keys.rows_NR.dtype), keys.rows_NR,
                          preferred_element_type=jnp.float32)
    return jnp.where(keys.present_N, products * scale + keys.offset_N, -jnp.inf)


def _attend(q_HR: jax.Array, keys: Keys, scale: float) -> tuple[jax.Array, jax.Array]:
    """The mixed rows of one query, float32 [H, R], and the log-sum-exp of its logits, float32 [H]."""
    logits_HN = _logits(q_HR, keys, scale)
    top_H = jnp.max(logits_HN, -1)
    top_H = jnp.where(top_H == -jnp.inf, 0, top_H)
    weights_HN = jnp.exp(logits_HN - top_H[:, None])
    total_H = jnp.sum(weights_HN, -1)
    mixed_HR = jnp.einsum("hn,nr->hr", weights_HN.astype(keys.rows_NR.dtype), keys.rows_NR,
                          preferred_element_type=jnp.float32)
    return mixed_HR / jnp.where(total_H == 0, 1, total_H)[:, None], top_H + jnp.log(total_H)


def _pull(q_HR: jax.Array, keys: Keys, scale: float, lse_H: jax.Array, d_out_HR: jax.Array,
          delta_H: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradient of q, float32 [H, R], and of the rows as a product: weights [X, N] times vectors [X, R], float32."""
    p_HN = jnp.exp(_logits(q_HR, keys, scale) - lse_H[:, None])
    dtype = keys.rows_NR.dtype
    d_p_HN = jnp.einsum("hr,nr->hn", d_out_HR.astype(dtype), keys.rows_NR, preferred_element_type=jnp.float32)
    d_logits_HN = jnp.where(keys.present_N, p_HN * (d_p_HN - delta_H[:, None]) * scale, 0)
    d_q_HR = jnp.einsum("hn,nr->hr", d_logits_HN.astype(dtype), keys.rows_NR, preferred_element_type=jnp.float32)
    weights_XN = jnp.concatenate([d_logits_HN, jnp.where(keys.present_N, p_HN, 0)])
    vectors_XR = jnp.concatenate([q_HR, d_out_HR]).astype(jnp.float32)
    return d_q_HR, weights_XN, vectors_XR


def _add_dense(d_kv_SR: jax.Array, _: jax.Array, weights_TXS: jax.Array, vectors_TXR: jax.Array) -> jax.Array:
    return d_kv_SR + jnp.einsum("txs,txr->sr", weights_TXS, vectors_TXR)


def _add_gathered(d_kv_SR: jax.Array, indices_TK: jax.Array, weights_TXK: jax.Array,
                  vectors_TXR: jax.Array) -> jax.Array:
    """Adds the gradients of all gathered rows at once."""
    d_rows_TKR = jnp.einsum("txk,txr->tkr", weights_TXK, vectors_TXR)
    return d_kv_SR.at[jnp.where(indices_TK < 0, len(d_kv_SR), indices_TK)].add(d_rows_TKR, mode="drop")


def _add_one_by_one(d_kv_SR: jax.Array, indices_TK: jax.Array, weights_TXK: jax.Array,
                    vectors_TXR: jax.Array) -> jax.Array:
    """Adds the gradients of one query after the other: the keys of one are distinct, so nothing is added by chance."""
    d_rows_TKR = jnp.einsum("txk,txr->tkr", weights_TXK, vectors_TXR)
    nowhere_K = len(d_kv_SR) + jnp.arange(indices_TK.shape[-1], dtype=jnp.int32)

    def add(d_kv_SR: jax.Array, query: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        indices_K, d_rows_KR = query
        targets = jnp.where(indices_K < 0, nowhere_K, indices_K)
        return d_kv_SR.at[targets].add(d_rows_KR, mode="drop", unique_indices=True), None

    return lax.scan(add, d_kv_SR, (indices_TK, d_rows_TKR))[0]
