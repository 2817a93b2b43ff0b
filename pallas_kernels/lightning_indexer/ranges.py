"""What the kernels of both platforms share: which tiles hold anything visible, and scores as integers.

B batch, T query positions, S key positions.
"""

import jax
from jax import lax
import jax.numpy as jnp

LOWEST, HIGHEST = jnp.iinfo(jnp.int32).min, jnp.iinfo(jnp.int32).max


def visible_tiles(q_positions: jax.Array, k_positions: jax.Array, q_segments: jax.Array, k_segments: jax.Array,
                  queries: int, keys: int) -> jax.Array:
    """The key tiles each block of queries may see, int32 [B, 2, blocks]: the first, and one past the last.

    Tiles between the two may hold nothing visible; tiles outside hold nothing visible for certain.
    """
    def blocks(x_BT: jax.Array, size: int, fill: int) -> jax.Array:
        padding = -x_BT.shape[1] % size
        return jnp.pad(x_BT, ((0, 0), (0, padding)), constant_values=fill).reshape(x_BT.shape[0], -1, size)

    def spread(positions: jax.Array, segments: jax.Array, size: int) -> tuple[jax.Array, ...]:
        segments, positions = blocks(segments, size, 0), blocks(positions, size, 0)
        real = segments != 0
        least = lambda x: jnp.min(jnp.where(real, x, HIGHEST), -1)
        most = lambda x: jnp.max(jnp.where(real, x, LOWEST), -1)
        return least(positions), most(positions), least(segments), most(segments)

    _, q_last, q_low, q_high = (x[:, :, None] for x in spread(q_positions, q_segments, queries))
    k_first, _, k_low, k_high = (x[:, None] for x in spread(k_positions, k_segments, keys))
    seen = (k_first <= q_last) & (k_low <= q_high) & (k_high >= q_low)
    numbers = jnp.arange(seen.shape[-1], dtype=jnp.int32)
    first = jnp.min(jnp.where(seen, numbers, seen.shape[-1]), -1)
    end = jnp.max(jnp.where(seen, numbers + 1, 0), -1)
    return jnp.stack([jnp.minimum(first, end), end], 1)


def finite(scores: jax.Array) -> jax.Array:
    """-inf becomes the lowest finite score, so that a visible key is never taken for an invisible one; NaN stays."""
    lowest = jnp.finfo(jnp.float32).min
    return jnp.where(scores < lowest, lowest, scores)


def ordered(x: jax.Array) -> jax.Array:
    """int32 that orders as the float32 does, with one zero; no float maps to the lowest int32."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, LOWEST - bits, bits)


def float_of(key: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(jnp.where(key < 0, LOWEST - key, key), jnp.float32)
