"""The indexer in its simplest form, float32 and dense: what every other implementation has to equal.

B batch, T query positions, S key positions, I indexer heads, C channels per head, K keys selected.
"""

import jax
from jax import lax
import jax.numpy as jnp

LOWEST = jnp.finfo(jnp.float32).min


def visible(q_positions: jax.Array, k_positions: jax.Array, q_segments: jax.Array, k_segments: jax.Array) -> jax.Array:
    """Which keys a query may see: of its own non-zero segment, and not after it; bool [B, T, S]."""
    same = (q_segments[:, :, None] == k_segments[:, None]) & (k_segments != 0)[:, None]
    return same & (k_positions[:, None] <= q_positions[:, :, None])


def index_scores(q_BTIC: jax.Array, k_BSC: jax.Array, w_BTI: jax.Array, q_positions: jax.Array,
                 k_positions: jax.Array, q_segments: jax.Array, k_segments: jax.Array, *, scale: float) -> jax.Array:
    """See `api.index_scores`."""
    q, k, w = (x.astype(jnp.float32) for x in (q_BTIC, k_BSC, w_BTI))
    products = jax.nn.relu(jnp.einsum("btic,bsc->btis", q, k, precision=lax.Precision.HIGHEST))
    scores = scale * jnp.einsum("bti,btis->bts", w, products, precision=lax.Precision.HIGHEST)
    return jnp.where(visible(q_positions, k_positions, q_segments, k_segments), jnp.maximum(scores, LOWEST), -jnp.inf)


def select_topk(q_BTIC: jax.Array, k_BSC: jax.Array, w_BTI: jax.Array, q_positions: jax.Array, k_positions: jax.Array,
                q_segments: jax.Array, k_segments: jax.Array, *, scale: float, top_k: int) -> jax.Array:
    """See `api.select_topk`."""
    scores = index_scores(q_BTIC, k_BSC, w_BTI, q_positions, k_positions, q_segments, k_segments, scale=scale)
    return best(scores, top_k)


def best(scores_BTS: jax.Array, top_k: int) -> jax.Array:
    """The selection contract on masked scores, by a stable sort: int32 [..., top_k]."""
    length = scores_BTS.shape[-1]
    chosen = jnp.argsort(-scores_BTS, axis=-1, stable=True)[..., :top_k]  # NaN comes last, and -0.0 equals +0.0
    real = jnp.take_along_axis(scores_BTS, chosen, -1) > -jnp.inf
    chosen = jnp.sort(jnp.where(real, chosen, length), -1)
    chosen = jnp.where(chosen == length, -1, chosen).astype(jnp.int32)
    padding = [(0, 0)] * (chosen.ndim - 1) + [(0, top_k - chosen.shape[-1])]
    return jnp.pad(chosen, padding, constant_values=-1)
