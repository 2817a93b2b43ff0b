"""The gradient of sparse attention: what the backward pass of every implementation is given, and what it gives.

B batch, T query positions, S key positions, H heads, R latent rank, K keys selected.
"""

from typing import Any, Callable

import jax
import jax.numpy as jnp

Pair = tuple[jax.Array, jax.Array]


def differentiable(forward: Callable[..., Pair], backward: Callable[..., Pair]) -> Callable[..., Pair]:
    """`forward(q, kv, indices)`, the result and the log-sum-exp, with a gradient by q and kv through both.

    `backward(q, kv, indices, lse, d_out, delta)` gives the gradients, with p[t,h,k] = exp(logits - lse):
    d_logits = p * (d_out . v - delta), where delta = sum(d_out * out) - d_lse, float32 [B, T, H].
    """
    attend = jax.custom_vjp(forward)

    def keep(q_BTHR: jax.Array, kv_BSR: jax.Array, indices_BTK: jax.Array) -> tuple[Pair, tuple[jax.Array, ...]]:
        out, lse_BTH = forward(q_BTHR, kv_BSR, indices_BTK)
        return (out, lse_BTH), (q_BTHR, kv_BSR, indices_BTK, out, lse_BTH)

    def pull(kept: tuple[jax.Array, ...], cotangents: Pair) -> tuple[Any, ...]:
        q_BTHR, kv_BSR, indices_BTK, out, lse_BTH = kept
        d_out, d_lse_BTH = cotangents
        # What stands in a query without keys, NaN included, must not reach a key by way of a product with zero.
        some = (indices_BTK >= 0).any(-1)[..., None, None]
        q_BTHR, d_out = jnp.where(some, q_BTHR, 0), jnp.where(some, d_out, 0)
        delta_BTH = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1) - d_lse_BTH
        d_q, d_kv = backward(q_BTHR, kv_BSR, indices_BTK, lse_BTH, d_out, delta_BTH)
        return d_q, d_kv.astype(kv_BSR.dtype), None

    attend.defvjp(keep, pull)
    return attend
