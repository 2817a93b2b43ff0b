"""Row tiles of a grouped product: how tall they are, and which group each one works for.

N rows, sorted by group; E groups, of consecutive rows; V visits, the work list of a kernel: one visit is one tile of
rows times one group's matrix. What a kernel spends is visits * tile, what is useful is the sum of the group sizes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

WASTE = 0.5  # rows spent on the edges of groups, per row there is


def row_tile(rows: int, groups: int, smallest: int, largest: int) -> int:
    """The tallest power of two within the limits whose edges waste at most WASTE of the rows.

    A group boundary inside a tile costs a second visit of that tile, so groups - 1 boundaries waste at most
    (groups - 1) * tile rows. Where even the smallest tile wastes more, there are fewer than 2 * smallest rows per
    group, and what the kernel waits for is the matrices, not the products.
    """
    tile = smallest
    while 2 * tile <= largest and 2 * tile * (groups - 1) <= WASTE * rows and tile < rows:
        tile *= 2
    return tile


class Bounds(NamedTuple):
    """First row and end of every group, never past the last row."""

    starts_E: jax.Array  # int32
    ends_E: jax.Array    # int32


def bounds(group_sizes_E: jax.Array, rows: int) -> Bounds:
    """Where every group lies among `rows` rows."""
    ends_E = jnp.minimum(jnp.cumsum(group_sizes_E.astype(jnp.int32)), rows)
    return Bounds(jnp.concatenate([jnp.zeros(1, jnp.int32), ends_E[:-1]]), ends_E)


class Visits(NamedTuple):
    """A work list. Visits past the last repeat it, with no rows.

    `row_V` is the first row of the tile; the visit owns the rows from `begin_V` to `end_V` in it. `group_V` is E for
    the rows beyond the groups, which are nobody's.
    """

    row_V: jax.Array    # int32
    group_V: jax.Array  # int32
    begin_V: jax.Array  # int32
    end_V: jax.Array    # int32


def aligned_visits(group_sizes_E: jax.Array, rows: int, tile: int, *, rest: bool) -> Visits:
    """Tiles at multiples of `tile`, each visited once for every group that has rows in it.

    With `rest` the rows beyond the groups are visited as a last group E, and empty groups are not visited: every tile
    is covered, in ascending order. Without, every group is visited, an empty one once, and nothing beyond the groups.
    V = ceil(rows / tile) + E.
    """
    starts, ends = bounds(group_sizes_E, rows)
    if rest:
        starts, ends = _with_rest(starts, ends, rows)
    last_tile = -(-rows // tile) - 1
    first = jnp.minimum(starts // tile, last_tile)
    counts = jnp.maximum(-(-ends // tile) - starts // tile, 0)
    counts = jnp.where(ends > starts, counts, 0 if rest else 1)
    group_V, nth_V, real_V = _unroll(counts, last_tile + 1 + len(group_sizes_E))
    row_V = (first[group_V] + nth_V) * tile
    begin_V = jnp.maximum(starts[group_V], row_V)
    end_V = jnp.minimum(ends[group_V], row_V + tile)
    return Visits(row_V, group_V, begin_V, jnp.where(real_V, jnp.maximum(end_V, begin_V), begin_V))


def grouped_visits(group_sizes_E: jax.Array, rows: int, tile: int) -> Visits:
    """Tiles that start where their group starts, so that no row is computed for two groups; the rest is group E.

    V = floor(rows / tile) + E + 1.
    """
    starts, ends = _with_rest(*bounds(group_sizes_E, rows), rows)
    counts = -(-(ends - starts) // tile)
    group_V, nth_V, real_V = _unroll(counts, rows // tile + len(starts))
    row_V = starts[group_V] + nth_V * tile
    end_V = jnp.where(real_V, jnp.minimum(ends[group_V], row_V + tile), row_V)
    return Visits(row_V, group_V, row_V, end_V)


def _with_rest(starts_E: jax.Array, ends_E: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    return jnp.append(starts_E, ends_E[-1]), jnp.append(ends_E, rows)


def _unroll(counts: jax.Array, visits: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of every visit its group, the how-manieth of the group it is, and whether it is real."""
    upto = jnp.cumsum(counts)
    number_V = jnp.minimum(jnp.arange(visits, dtype=jnp.int32), upto[-1] - 1)
    group_V = jnp.searchsorted(upto, number_V, side="right", method="compare_all").astype(jnp.int32)
    return group_V, number_V - (upto - counts)[group_V], jnp.arange(visits) < upto[-1]
