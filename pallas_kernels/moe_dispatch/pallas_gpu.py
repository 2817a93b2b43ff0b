"""Grouped products on Hopper GPUs, through Pallas' Triton.

N rows, K and M their widths before and after, E groups, V visits.

A tile of rows starts where its group starts, so that no two programs share a row and no row is computed twice; stores
are masked to the rows of the group. Every program loops over the width that is summed over, in blocks.
"""

import functools
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from pallas_kernels.blocks import tuned
from pallas_kernels.moe_dispatch.shards import result
from pallas_kernels.moe_dispatch.tiles import bounds, grouped_visits, row_tile

SMALLEST, LARGEST = 16, 128  # rows of a tile; the tensor cores take 16 at least
LARGEST_SUMMED = 64  # where rows are what is summed over: those of one step


class Blocks(NamedTuple):
    """Columns of a program, the depth of one step of its loop, its warps and the steps in flight."""

    columns: int
    depth: int
    warps: int
    stages: int


def blocks_of(tile: int, itemsize: int) -> Blocks:
    """Blocks for a tile height: sums stay in registers, steps in flight in shared memory, and nothing spills."""
    shapes = "32 bits" if itemsize > 2 else "16 bits, full tiles" if tile == LARGEST else "16 bits"
    return tuned(Blocks, "grouped_matmul", "pallas_gpu", shapes)


def product(x_NK: jax.Array, w_EKM: jax.Array, group_sizes_E: jax.Array, *, interpret: Any = False) -> jax.Array:
    """out[n] = x[n] @ w[group of n], [N, M]; zero beyond the groups."""
    return _product(x_NK, w_EKM, group_sizes_E, contract=0, interpret=interpret)


def product_transposed(y_NM: jax.Array, w_EKM: jax.Array, group_sizes_E: jax.Array, *,
                       interpret: Any = False) -> jax.Array:
    """out[n] = y[n] @ w[group of n]^T, [N, K]; zero beyond the groups. The matrices are not transposed in memory."""
    return _product(y_NM, w_EKM, group_sizes_E, contract=1, interpret=interpret)


def _product(x: jax.Array, w_EKM: jax.Array, group_sizes_E: jax.Array, *, contract: int, interpret: Any) -> jax.Array:
    rows, groups, width = x.shape[0], w_EKM.shape[0], w_EKM.shape[2 - contract]
    tile = row_tile(rows, groups, SMALLEST, LARGEST)
    blocks = blocks_of(tile, x.dtype.itemsize)
    visits = grouped_visits(group_sizes_E, rows, tile)
    return pl.pallas_call(
        functools.partial(_product_kernel, tile=tile, blocks=blocks, contract=contract),
        out_shape=result((rows, width), x.dtype, x),
        grid=(len(visits.row_V), pl.cdiv(width, blocks.columns)),
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret, name="grouped_matmul_backward" if contract else "grouped_matmul",
    )(visits.row_V, visits.end_V, visits.group_V, x, w_EKM)


def _product_kernel(row_ref, end_ref, group_ref, x_ref, w_ref, out_ref, *, tile, blocks, contract):
    v, c = pl.program_id(0), pl.program_id(1)
    row, end, group = row_ref[v], end_ref[v], group_ref[v]
    groups, depth, width = w_ref.shape[0], x_ref.shape[1], out_ref.shape[1]
    at_rows, at_columns = pl.ds(row, tile), pl.ds(c * blocks.columns, blocks.columns)
    own = (row + jnp.arange(tile) < end)[:, None]
    inside = c * blocks.columns + jnp.arange(blocks.columns) < width

    def step(number: jax.Array, total: jax.Array) -> jax.Array:
        at_depth = pl.ds(number * blocks.depth, blocks.depth)
        deep = number * blocks.depth + jnp.arange(blocks.depth) < depth
        x = plgpu.load(x_ref.at[at_rows, at_depth], mask=own & deep[None], other=0)
        if contract == 0:
            w = plgpu.load(w_ref.at[group, at_depth, at_columns], mask=deep[:, None] & inside[None], other=0)
        else:
            w = plgpu.load(w_ref.at[group, at_columns, at_depth], mask=inside[:, None] & deep[None], other=0).T
        return total + _dot(x, w)

    # Rows of no group, and visits past the last, take no step.
    steps = jnp.int32(pl.cdiv(depth, blocks.depth)) * ((group < groups) & (row < end)).astype(jnp.int32)
    total = lax.fori_loop(0, steps, step, jnp.zeros((tile, blocks.columns), jnp.float32))
    plgpu.store(out_ref.at[at_rows, at_columns], total.astype(out_ref.dtype), mask=own & inside[None])


def outer(x_NK: jax.Array, y_NM: jax.Array, group_sizes_E: jax.Array, *, interpret: Any = False) -> jax.Array:
    """out[e] = sum over the rows n of group e of x[n]^T y[n], [E, K, M], added up in float32."""
    (rows, depth), width, groups = x_NK.shape, y_NM.shape[1], group_sizes_E.shape[0]
    tile = row_tile(rows, groups, SMALLEST, LARGEST_SUMMED)
    block = (128, 128) if x_NK.dtype.itemsize == 2 else (64, 64)
    return pl.pallas_call(
        functools.partial(_outer_kernel, tile=tile, block=block),
        out_shape=result((groups, depth, width), x_NK.dtype, x_NK),
        grid=(groups, pl.cdiv(depth, block[0]), pl.cdiv(width, block[1])),
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=3),
        interpret=interpret, name="grouped_outer")(*bounds(group_sizes_E, rows), x_NK, y_NM)


def _outer_kernel(start_ref, end_ref, x_ref, y_ref, out_ref, *, tile, block):
    e, k, m = (pl.program_id(axis) for axis in range(3))
    start, end = start_ref[e], end_ref[e]
    depth, width = out_ref.shape[1:]
    at_depth, at_width = pl.ds(k * block[0], block[0]), pl.ds(m * block[1], block[1])
    deep = k * block[0] + jnp.arange(block[0]) < depth
    wide = m * block[1] + jnp.arange(block[1]) < width

    def step(number: jax.Array, total: jax.Array) -> jax.Array:
        row = start + number * tile
        own = (row + jnp.arange(tile) < end)[:, None]
        x = plgpu.load(x_ref.at[pl.ds(row, tile), at_depth], mask=own & deep[None], other=0)
        y = plgpu.load(y_ref.at[pl.ds(row, tile), at_width], mask=own & wide[None], other=0)
        return total + _dot(x.T, y)

    total = lax.fori_loop(0, pl.cdiv(end - start, tile), step, jnp.zeros(block, jnp.float32))
    plgpu.store(out_ref.at[e, at_depth, at_width], total.astype(out_ref.dtype), mask=deep[:, None] & wide[None])


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """float32 is multiplied as such, not rounded to TF32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)
