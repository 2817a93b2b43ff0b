"""Grouped products from plain XLA: a loop over the groups that have rows, in it one over the tiles of their rows.

N rows, K and M their widths before and after, E groups. `lax.ragged_dot` multiplies every row with every matrix on CPU
and on Hopper GPUs; here a row meets one matrix, each matrix is read once, and a group without rows costs nothing.
"""

import functools
from typing import Callable, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels.blocks import tuned
from pallas_kernels.moe_dispatch.shards import zeros
from pallas_kernels.moe_dispatch.tiles import bounds, row_tile

Heights = tuple[int, ...]


class RowTiles(NamedTuple):
    """Heights of tiles of rows: one between the limits, or several, in quarters of the mean group, descending."""

    smallest: int
    largest: int
    quarters: tuple[int, ...]


def product(x_NK: jax.Array, w_EKM: jax.Array, group_sizes_E: jax.Array, *,
            heights: Heights | None = None) -> jax.Array:
    """out[n] = x[n] @ w[group of n], [N, M]; zero beyond the groups."""
    return _on_platform(functools.partial(_product, contract=0), x_NK, w_EKM, group_sizes_E, heights)


def product_transposed(y_NM: jax.Array, w_EKM: jax.Array, group_sizes_E: jax.Array, *,
                       heights: Heights | None = None) -> jax.Array:
    """out[n] = y[n] @ w[group of n]^T, [N, K]; zero beyond the groups."""
    return _on_platform(functools.partial(_product, contract=1), y_NM, w_EKM, group_sizes_E, heights)


def outer(x_NK: jax.Array, y_NM: jax.Array, group_sizes_E: jax.Array, *, heights: Heights | None = None) -> jax.Array:
    """out[e] = sum over the rows n of group e of x[n]^T y[n], [E, K, M], added up in float32."""
    return _on_platform(_outer, x_NK, y_NM, group_sizes_E, heights)


def heights_of(rows: int, groups: int, tiles: RowTiles) -> Heights:
    """Heights of tiles for so many rows and groups, descending: one if groups are small or `tiles` has no quarters."""
    mean = min(rows // groups, tiles.largest) // 32 * 32
    if tiles.quarters and mean:
        return tuple(mean * part // 4 for part in tiles.quarters)
    return (row_tile(rows, groups, tiles.smallest, tiles.largest),)


def _on_platform(fn: Callable[..., jax.Array], x: jax.Array, other: jax.Array, group_sizes_E: jax.Array,
                 heights: Heights | None) -> jax.Array:
    """`fn` with the given heights of tiles, or those of the platform that is compiled for.

    A CPU packs the matrix for every tile anew, and spends least on one tile hardly taller than its group. On an
    accelerator each height would be one more loop whose end the host has to wait for.
    """
    if heights is not None:
        return fn(x, other, group_sizes_E, heights)
    on = lambda platform: functools.partial(fn, heights=heights_of(
        len(x), len(group_sizes_E), tuned(RowTiles, "grouped_matmul", "xla", platform)))
    return lax.platform_dependent(x, other, group_sizes_E, cpu=on("cpu"), default=on("elsewhere"))


def _product(x: jax.Array, w_EKM: jax.Array, group_sizes_E: jax.Array, heights: Heights, *,
             contract: int) -> jax.Array:
    """Tiles ascend and start where their group starts: what a tile writes past its group, the next one overwrites."""
    rows, width = x.shape[0], w_EKM.shape[2 - contract]
    starts, ends = bounds(group_sizes_E, rows)
    padded = jnp.pad(x, ((0, heights[0]), (0, 0)))

    def group(number: jax.Array, out: jax.Array) -> jax.Array:
        e = order[number]
        w = _entry(w_EKM, e)

        def visit(start: jax.Array, height: int, out: jax.Array) -> jax.Array:
            y = lax.dot_general(lax.dynamic_slice_in_dim(padded, start, height), w, (((1,), (contract,)), ((), ())),
                                preferred_element_type=jnp.float32)
            return lax.dynamic_update_slice_in_dim(out, y.astype(out.dtype), start, 0)

        return _over_tiles(visit, starts[e], ends[e], heights, out)

    order, filled = _filled(starts, ends)
    out = lax.fori_loop(0, filled, group, zeros((rows + heights[0], width), x.dtype, x))
    return jnp.where(jnp.arange(rows)[:, None] < ends[-1], out[:rows], 0)


def _outer(x_NK: jax.Array, y_NM: jax.Array, group_sizes_E: jax.Array, heights: Heights) -> jax.Array:
    rows, groups = x_NK.shape[0], group_sizes_E.shape[0]
    starts, ends = bounds(group_sizes_E, rows)
    padded = [jnp.pad(array, ((0, heights[0]), (0, 0))) for array in (x_NK, y_NM)]
    shape = (x_NK.shape[1], y_NM.shape[1])

    def group(number: jax.Array, out: jax.Array) -> jax.Array:
        e = order[number]

        def visit(start: jax.Array, height: int, total: jax.Array) -> jax.Array:
            own = (start + jnp.arange(height) < ends[e])[:, None]
            x, y = (jnp.where(own, lax.dynamic_slice_in_dim(array, start, height), 0) for array in padded)
            return total + lax.dot_general(x, y, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

        total = _over_tiles(visit, starts[e], ends[e], heights, zeros(shape, jnp.float32, x_NK))
        return lax.dynamic_update_index_in_dim(out, total.astype(out.dtype), e, 0)

    order, filled = _filled(starts, ends)
    return lax.fori_loop(0, filled, group, zeros((groups, *shape), x_NK.dtype, x_NK))


def _over_tiles(visit: Callable[[jax.Array, int, jax.Array], jax.Array], start: jax.Array, end: jax.Array,
                heights: Heights, state: jax.Array) -> jax.Array:
    """`visit(first row, height, state)` over the rows from `start` to `end`, of each height until a lower will do."""
    for height, lower in zip(heights, (*heights[1:], 0)):
        count = jnp.maximum(-(-(end - start - lower) // height), 0)
        state = lax.fori_loop(0, count, lambda nth, state: visit(start + nth * height, height, state), state)
        start += count * height
    return state


def _entry(w_EKM: jax.Array, e: jax.Array) -> jax.Array:
    """w[e]. On a CPU XLA widens all of a bfloat16 array before it slices it; of its bits it does not."""
    if w_EKM.dtype != jnp.bfloat16:
        return lax.dynamic_index_in_dim(w_EKM, e, keepdims=False)
    w_EKM, e = lax.optimization_barrier((w_EKM, e))  # or the bits of all matrices are made ahead of the loop
    bits_KM = lax.dynamic_index_in_dim(lax.bitcast_convert_type(w_EKM, jnp.uint16), e, keepdims=False)
    return lax.bitcast_convert_type(bits_KM, w_EKM.dtype)


def _filled(starts_E: jax.Array, ends_E: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The groups that have rows, ascending, ahead of the others; and how many they are."""
    empty_E = starts_E == ends_E
    return jnp.argsort(empty_E, stable=True), jnp.sum(~empty_E)
