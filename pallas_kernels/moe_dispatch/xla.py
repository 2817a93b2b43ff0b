"""Grouped products from plain XLA: a loop over the groups that have rows, in it one over the tiles of their rows.

N rows, K and M their widths before and after, E groups. `lax.ragged_dot` multiplies every row with every matrix on CPU
and on Hopper GPUs; here a row meets one matrix, each matrix is read once, and a group without rows costs nothing.
"""

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels.moe_dispatch.shards import zeros
from pallas_kernels.moe_dispatch.tiles import bounds, row_tile

SMALLEST, LARGEST = 8, 128


def product(x_NK: jax.Array, w_EKM: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """out[n] = x[n] @ w[group of n], [N, M]; zero beyond the groups."""
    return _product(x_NK, w_EKM, group_sizes_E, contract=0)


def product_transposed(y_NM: jax.Array, w_EKM: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """out[n] = y[n] @ w[group of n]^T, [N, K]; zero beyond the groups."""
    return _product(y_NM, w_EKM, group_sizes_E, contract=1)


def _product(x: jax.Array, w_EKM: jax.Array, group_sizes_E: jax.Array, contract: int) -> jax.Array:
    """Tiles ascend and start where their group starts: what a tile writes past its group, the next one overwrites."""
    rows, width = x.shape[0], w_EKM.shape[2 - contract]
    tile = row_tile(rows, w_EKM.shape[0], SMALLEST, LARGEST)
    starts, ends = bounds(group_sizes_E, rows)
    padded = jnp.pad(x, ((0, tile), (0, 0)))

    def group(number: jax.Array, out: jax.Array) -> jax.Array:
        e = order[number]
        # Widened once for all tiles: a CPU multiplies in float32, and products of bfloat16 are exact in it.
        w = _entry(w_EKM, e).astype(jnp.float32)

        def visit(nth: jax.Array, out: jax.Array) -> jax.Array:
            start = starts[e] + nth * tile
            rows = lax.dynamic_slice_in_dim(padded, start, tile).astype(jnp.float32)
            y = lax.dot_general(rows, w, (((1,), (contract,)), ((), ())))
            return lax.dynamic_update_slice_in_dim(out, y.astype(out.dtype), start, 0)

        return lax.fori_loop(0, _tiles(starts[e], ends[e], tile), visit, out)

    order, filled = _filled(starts, ends)
    out = lax.fori_loop(0, filled, group, zeros((rows + tile, width), x.dtype, x))
    return jnp.where(jnp.arange(rows)[:, None] < ends[-1], out[:rows], 0)


def outer(x_NK: jax.Array, y_NM: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """out[e] = sum over the rows n of group e of x[n]^T y[n], [E, K, M], added up in float32."""
    rows, groups = x_NK.shape[0], group_sizes_E.shape[0]
    tile = row_tile(rows, groups, SMALLEST, LARGEST)
    starts, ends = bounds(group_sizes_E, rows)
    padded = [jnp.pad(array, ((0, tile), (0, 0))) for array in (x_NK, y_NM)]
    shape = (x_NK.shape[1], y_NM.shape[1])

    def group(number: jax.Array, out: jax.Array) -> jax.Array:
        e = order[number]

        def visit(nth: jax.Array, total: jax.Array) -> jax.Array:
            start = starts[e] + nth * tile
            own = (start + jnp.arange(tile) < ends[e])[:, None]
            x, y = (jnp.where(own, lax.dynamic_slice_in_dim(array, start, tile), 0).astype(jnp.float32)
                    for array in padded)
            return total + lax.dot_general(x, y, (((0,), (0,)), ((), ())))

        total = lax.fori_loop(0, _tiles(starts[e], ends[e], tile), visit, zeros(shape, jnp.float32, x_NK))
        return lax.dynamic_update_index_in_dim(out, total.astype(out.dtype), e, 0)

    order, filled = _filled(starts, ends)
    return lax.fori_loop(0, filled, group, zeros((groups, *shape), x_NK.dtype, x_NK))


def _entry(w_EKM: jax.Array, e: jax.Array) -> jax.Array:
    """w[e]. On a CPU XLA widens all of a bfloat16 array before it slices it; of its bits it does not."""
    bits_EKM = lax.bitcast_convert_type(w_EKM, jnp.uint16) if w_EKM.dtype == jnp.bfloat16 else w_EKM
    return lax.bitcast_convert_type(lax.dynamic_index_in_dim(bits_EKM, e, keepdims=False), w_EKM.dtype)


def _filled(starts_E: jax.Array, ends_E: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The groups that have rows, ascending, ahead of the others; and how many they are."""
    empty_E = starts_E == ends_E
    return jnp.argsort(empty_E, stable=True), jnp.sum(~empty_E)


def _tiles(start: jax.Array, end: jax.Array, tile: int) -> jax.Array:
    return -(-(end - start) // tile)
