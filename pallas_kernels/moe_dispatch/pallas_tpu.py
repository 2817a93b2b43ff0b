"""Grouped products on TPU: a work list of visits, a tile of rows for a group each, steers what the pipeline fetches.

N rows, K and M their widths before and after, E groups, V visits.

The width that is summed over lies whole in VMEM, and visits of one group follow each other: each block of a matrix is
fetched once, and only the rows are read again for every block of columns. Tiles lie at multiples of their height; where
a group ends inside one, the tile is visited again for the next group, and keeps what lies above that group's rows.
"""

import functools
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.moe_dispatch.shards import result
from pallas_kernels.moe_dispatch.tiles import aligned_visits, row_tile

LARGEST = 256
LANES = 128
# Of every block there are two, beside sums in float32; the smallest VMEM of the targets is 64 MiB.
BLOCK_BYTES = 8 << 20
VMEM_BYTES = 56 << 20


def row_tile_of(rows: int, groups: int, depth: int, itemsize: int) -> int:
    """Rows of a tile of `depth` columns; the fewest are those of one packed register."""
    smallest = 8 * 4 // itemsize
    return row_tile(rows, groups, smallest, max(smallest, min(LARGEST, BLOCK_BYTES // (depth * itemsize))))


def block_of(width: int, most: int) -> int:
    """The width cut into the fewest blocks of at most `most`, alike and of whole lanes."""
    if width <= LANES:
        return width
    blocks = -(-width // max(most // LANES * LANES, LANES))
    return min(-(-width // (blocks * LANES)) * LANES, width)


def product(x_NK: jax.Array, w_EKM: jax.Array, group_sizes_E: jax.Array, *, interpret: Any = False) -> jax.Array:
    """out[n] = x[n] @ w[group of n], [N, M]; zero beyond the groups."""
    return _product(x_NK, w_EKM, group_sizes_E, contract=0, interpret=interpret)


def product_transposed(y_NM: jax.Array, w_EKM: jax.Array, group_sizes_E: jax.Array, *,
                       interpret: Any = False) -> jax.Array:
    """out[n] = y[n] @ w[group of n]^T, [N, K]; zero beyond the groups. The matrices are not transposed in memory."""
    return _product(y_NM, w_EKM, group_sizes_E, contract=1, interpret=interpret)


def _product(x: jax.Array, w_EKM: jax.Array, group_sizes_E: jax.Array, *, contract: int, interpret: Any) -> jax.Array:
    (rows, depth), groups, width = x.shape, w_EKM.shape[0], w_EKM.shape[2 - contract]
    itemsize = x.dtype.itemsize
    tile = row_tile_of(rows, groups, depth, itemsize)
    columns = block_of(width, BLOCK_BYTES // (depth * itemsize))
    visits = aligned_visits(group_sizes_E, rows, tile, rest=True)
    # What the rest would multiply is not fetched: its blocks are those of the visit before.
    fetched = lambda array_V: lax.cummax(jnp.where(visits.group_V < groups, array_V, 0))
    lists = (visits.row_V // tile, visits.begin_V, visits.end_V, visits.group_V,
             fetched(visits.row_V // tile), fetched(visits.group_V))
    w_block, w_index = (((1, depth, columns), lambda c, v, *lists: (lists[5][v], 0, c)) if contract == 0 else
                        ((1, columns, depth), lambda c, v, *lists: (lists[5][v], c, 0)))
    return pl.pallas_call(
        functools.partial(_product_kernel, groups=groups, contract=contract),
        out_shape=result((rows, width), x.dtype, x),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(lists), grid=(pl.cdiv(width, columns), len(visits.row_V)),
            in_specs=[pl.BlockSpec((tile, depth), lambda c, v, *lists: (lists[4][v], 0)),
                      pl.BlockSpec(w_block, w_index)],
            out_specs=pl.BlockSpec((tile, columns), lambda c, v, *lists: (lists[0][v], c))),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"),
                                             vmem_limit_bytes=VMEM_BYTES),
        cost_estimate=_cost(rows, depth, width, x, w_EKM),
        interpret=interpret, name="grouped_matmul_backward" if contract else "grouped_matmul")(*lists, x, w_EKM)


def _product_kernel(tile_ref, begin_ref, end_ref, group_ref, _, __, x_ref, w_ref, out_ref, *, groups, contract):
    v = pl.program_id(1)
    begin, group = begin_ref[v], group_ref[v]
    real = end_ref[v] > begin
    row = tile_ref[v] * out_ref.shape[0] + lax.broadcasted_iota(jnp.int32, out_ref.shape, 0)

    @pl.when(real & (group < groups))
    def multiply() -> None:
        y = lax.dot_general(x_ref[...], w_ref[0], (((1,), (contract,)), ((), ())),
                            precision=_precision(x_ref.dtype), preferred_element_type=jnp.float32)
        # Rows below the group's are written too: the tile's next visit overwrites them.
        out_ref[...] = jnp.where(row >= begin, y.astype(out_ref.dtype), out_ref[...])

    @pl.when(real & (group == groups))
    def clear() -> None:
        out_ref[...] = jnp.where(row >= begin, 0, out_ref[...])


def outer(x_NK: jax.Array, y_NM: jax.Array, group_sizes_E: jax.Array, *, interpret: Any = False) -> jax.Array:
    """out[e] = sum over the rows n of group e of x[n]^T y[n], [E, K, M], added up in float32."""
    (rows, depth), width, groups = x_NK.shape, y_NM.shape[1], group_sizes_E.shape[0]
    itemsize = x_NK.dtype.itemsize
    block = (block_of(depth, 4096 // itemsize), block_of(width, 1024))
    tile = row_tile_of(rows, groups, max(block), itemsize)
    visits = aligned_visits(group_sizes_E, rows, tile, rest=False)
    lists = (visits.row_V // tile, visits.begin_V, visits.end_V, visits.group_V)
    return pl.pallas_call(
        _outer_kernel,
        out_shape=result((groups, depth, width), x_NK.dtype, x_NK),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(lists),
            grid=(pl.cdiv(depth, block[0]), pl.cdiv(width, block[1]), len(visits.row_V)),
            in_specs=[pl.BlockSpec((tile, block[0]), lambda k, m, v, *lists: (lists[0][v], k)),
                      pl.BlockSpec((tile, block[1]), lambda k, m, v, *lists: (lists[0][v], m))],
            out_specs=pl.BlockSpec((1, *block), lambda k, m, v, *lists: (lists[3][v], k, m)),
            scratch_shapes=[pltpu.VMEM(block, jnp.float32)]),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"),
                                             vmem_limit_bytes=VMEM_BYTES),
        cost_estimate=_cost(rows, depth, width, x_NK, y_NM),
        interpret=interpret, name="grouped_outer")(*lists, x_NK, y_NM)


def _outer_kernel(tile_ref, begin_ref, end_ref, group_ref, x_ref, y_ref, out_ref, total_ref):
    v, last = pl.program_id(2), pl.num_programs(2) - 1
    begin, end, group, tile = begin_ref[v], end_ref[v], group_ref[v], x_ref.shape[0]

    @pl.when((v == 0) | (group_ref[jnp.maximum(v - 1, 0)] != group))
    def begin_group() -> None:
        total_ref[...] = jnp.zeros_like(total_ref)

    def add(x: jax.Array, y: jax.Array) -> None:
        total_ref[...] += lax.dot_general(x, y, (((0,), (0,)), ((), ())), precision=_precision(x.dtype),
                                          preferred_element_type=jnp.float32)

    @pl.when(end - begin == tile)
    def add_all() -> None:
        add(x_ref[...], y_ref[...])

    # Both are masked: a row of another group, or of none, may hold NaN.
    @pl.when((end > begin) & (end - begin < tile))
    def add_own() -> None:
        def own(ref: Any) -> jax.Array:
            row = tile_ref[v] * tile + lax.broadcasted_iota(jnp.int32, ref.shape, 0)
            return jnp.where((begin <= row) & (row < end), ref[...], 0)
        add(own(x_ref), own(y_ref))

    @pl.when((v == last) | (group_ref[jnp.minimum(v + 1, last)] != group))
    def end_group() -> None:
        out_ref[0] = total_ref[...].astype(out_ref.dtype)


def _precision(dtype: Any) -> lax.Precision | None:
    """float32 is multiplied as such, not rounded to bfloat16."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _cost(rows: int, depth: int, width: int, *read: jax.Array) -> pl.CostEstimate:
    """Each operand once, as the compiler is to see it."""
    written = rows * width if read[1].ndim == 3 else depth * width
    return pl.CostEstimate(flops=2 * rows * depth * width, transcendentals=0,
                           bytes_accessed=sum(x.size * x.dtype.itemsize for x in read) +
                           written * read[0].dtype.itemsize)
