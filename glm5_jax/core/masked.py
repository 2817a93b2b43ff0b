"""Sums, means and softmax over the part of an array that counts.

What is masked out is replaced before it is used, so that neither the value nor the gradient with respect to the
arguments ever sees it, NaN and infinity included. Everything is accumulated in float32 or wider.
"""

import jax
import jax.numpy as jnp

# Log-probability of a masked entry: exp gives exactly 0, and unlike -inf a product with 0 stays 0, also in a gradient.
LOG_ZERO = -1e30

Axis = int | tuple[int, ...] | None


def masked_sum(x: jax.Array, mask: jax.Array, axis: Axis = None) -> jax.Array:
    """The sum of `x` weighted by `mask`, which is boolean or holds non-negative weights and broadcasts to `x`.

    Returns float32 (or the wider dtype of `x`); 0 where nothing counts.
    """
    x, weights = _weigh(x, mask)
    return jnp.sum(x * weights, axis=axis)


def masked_mean(x: jax.Array, mask: jax.Array, axis: Axis = None) -> jax.Array:
    """The mean of `x` weighted by `mask`, as in `masked_sum`; 0 where nothing counts.

    This is the mean over what it is given: a loss that is split over devices or micro-batches divides `masked_sum` by
    the count of the whole instead.
    """
    x, weights = _weigh(x, mask)
    count = jnp.sum(weights, axis=axis)
    return jnp.sum(x * weights, axis=axis) / jnp.where(count > 0, count, 1)


def masked_softmax(logits: jax.Array, mask: jax.Array, axis: int = -1) -> jax.Array:
    """Softmax over the entries where `mask` (boolean, broadcasts to `logits`) holds.

    Returns float32 (or wider); 0 where masked, and a whole row of 0, with gradient 0, where nothing is left.
    """
    shifted, mask = _shift(logits, mask, axis)
    weights = jnp.where(mask, jnp.exp(shifted), 0)
    total = jnp.sum(weights, axis=axis, keepdims=True)
    return weights / jnp.where(total > 0, total, 1)


def masked_log_softmax(logits: jax.Array, mask: jax.Array, axis: int = -1) -> jax.Array:
    """Log-softmax over the entries where `mask` (boolean, broadcasts to `logits`) holds.

    Returns float32 (or wider); `LOG_ZERO`, with gradient 0, where masked.
    """
    shifted, mask = _shift(logits, mask, axis)
    total = jnp.sum(jnp.where(mask, jnp.exp(shifted), 0), axis=axis, keepdims=True)
    return jnp.where(mask, shifted - jnp.log(jnp.where(total > 0, total, 1)), LOG_ZERO)


def _weigh(x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = _widen(x)
    mask = jnp.broadcast_to(mask, x.shape)
    return jnp.where(mask != 0, x, 0), mask.astype(x.dtype)


def _shift(logits: jax.Array, mask: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """The logits less the maximum of their row, 0 where masked, so that `exp` cannot overflow."""
    if mask.dtype != jnp.bool_:
        raise ValueError(f"mask: expected dtype bool, found {mask.dtype}; compare it first, as in `segment_ids != 0`")
    logits = _widen(logits)
    mask = jnp.broadcast_to(mask, logits.shape)
    top = jnp.max(jnp.where(mask, logits, -jnp.inf), axis=axis, keepdims=True)
    top = jax.lax.stop_gradient(jnp.where(top == -jnp.inf, 0, top))
    return jnp.where(mask, logits - top, 0), mask


def _widen(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
