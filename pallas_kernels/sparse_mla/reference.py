"""Attention over selected latent rows in its simplest form: float32, all rows gathered at once, gradients by autodiff.

B batch, T query positions, S key positions, H heads, R latent rank, K keys selected.
"""

import jax
from jax import lax
import jax.numpy as jnp


def forward(q_BTHR: jax.Array, kv_BSR: jax.Array, indices_BTK: jax.Array, *, scale: float,
            value_dim: int) -> tuple[jax.Array, jax.Array]:
    """See `api.sparse_mla`: the result and the log-sum-exp of the logits, float32 [B, T, H]."""
    chosen_BTK = indices_BTK >= 0
    rows_BTKR = jax.vmap(lambda rows, indices: rows[indices])(kv_BSR.astype(jnp.float32), indices_BTK)
    rows_BTKR = jnp.where(chosen_BTK[..., None], rows_BTKR, 0)
    logits = jnp.einsum("bthr,btkr->bthk", q_BTHR.astype(jnp.float32), rows_BTKR, precision=lax.Precision.HIGHEST)
    logits = jnp.where(chosen_BTK[:, :, None], scale * logits, -jnp.inf)
    some_BT11 = chosen_BTK.any(-1)[:, :, None, None]
    logits = jnp.where(some_BT11, logits, 0)  # a query without keys, whose softmax would be NaN
    p_BTHK = jnp.where(some_BT11, jax.nn.softmax(logits), 0)
    out = jnp.einsum("bthk,btkr->bthr", p_BTHK, rows_BTKR[..., :value_dim], precision=lax.Precision.HIGHEST)
    return out.astype(q_BTHR.dtype), jnp.where(some_BT11[..., 0], jax.nn.logsumexp(logits, -1), -jnp.inf)
