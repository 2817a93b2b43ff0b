"""The lightning indexer on Hopper GPUs, through Pallas' Triton: scores, and a selection in two stages.

A row of scores does not fit on one multiprocessor. `select_topk` therefore takes a block of queries at a time: one
kernel writes their scores once, as int32 keys that order as the scores do, another finds each row's threshold by
narrowing a range of keys and writes the positions of the selected keys. The block is small enough to stay in the
second-level cache; nothing is sorted.

B batch, T query positions, S key positions, I indexer heads, C channels per head, K keys selected.
"""

import functools
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from pallas_kernels.blocks import Tiles, tuned
from pallas_kernels.lightning_indexer.ranges import HIGHEST, LOWEST, finite, float_of, ordered, visible_tiles

KEY_BUFFER = 32 << 20  # bytes of the keys of a block of queries: what the second-level cache holds beside other things
CHUNK = 4096  # keys that one program of the selection holds at a time


def _scores_kernel(range_ref, q_positions_ref, q_segments_ref, k_positions_ref, k_segments_ref, w_ref, q_ref, k_ref,
                   out_ref, *, tiles: Tiles, as_keys: bool):
    b, i, j = (pl.program_id(axis) for axis in range(3))
    rows, columns = pl.ds(i * tiles.queries, tiles.queries), pl.ds(j * tiles.keys, tiles.keys)
    seen = (range_ref[b, 0, i] <= j) & (j < range_ref[b, 1, i])

    @pl.when(seen)
    def _():
        k_SC = k_ref[b, columns, :]
        precision = lax.Precision.HIGHEST if k_SC.dtype == jnp.float32 else None

        def add_head(head: jax.Array, total_TS: jax.Array) -> jax.Array:
            products = lax.dot_general(q_ref[b, head, rows, :], k_SC, (((1,), (1,)), ((), ())), precision=precision,
                                       preferred_element_type=jnp.float32)
            return total_TS + jnp.maximum(products, 0.0) * w_ref[b, head, rows][:, None]

        total_TS = lax.fori_loop(0, q_ref.shape[1], add_head, jnp.zeros(tiles, jnp.float32))
        k_segments = k_segments_ref[b, columns][None]
        shown = (k_segments == q_segments_ref[b, rows][:, None]) & (k_segments != 0)
        shown &= k_positions_ref[b, columns][None] <= q_positions_ref[b, rows][:, None]
        scores_TS = finite(total_TS)
        if as_keys:
            out_ref[b, rows, columns] = jnp.where(shown & (scores_TS == scores_TS), ordered(scores_TS), LOWEST)
        else:
            out_ref[b, rows, columns] = jnp.where(shown, scores_TS, -jnp.inf)

    if not as_keys:  # the selection never reads a tile that nobody sees
        @pl.when(jnp.logical_not(seen))
        def _():
            out_ref[b, rows, columns] = jnp.full(tiles, -jnp.inf, jnp.float32)


def _padded(x: jax.Array, size: int, axis: int = 1) -> jax.Array:
    """Filled up with zeros to a multiple of `size`: Triton masks no edge by itself, and segment 0 is not visible."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % size)
    return jnp.pad(x, widths)


def _scores(q_BITC: jax.Array, k_BSC: jax.Array, w_BIT: jax.Array, ranges: jax.Array,
            *positions_and_segments: jax.Array, tiles: Tiles, as_keys: bool, interpret: Any) -> jax.Array:
    B, _, T, _ = q_BITC.shape
    S = k_BSC.shape[1]
    return pl.pallas_call(
        functools.partial(_scores_kernel, tiles=tiles, as_keys=as_keys),
        out_shape=jax.ShapeDtypeStruct((B, T, S), jnp.int32 if as_keys else jnp.float32),
        grid=(B, T // tiles.queries, S // tiles.keys),
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=2),
        name="index_keys" if as_keys else "index_scores", interpret=interpret,
    )(ranges, *positions_and_segments, w_BIT, q_BITC, k_BSC)


def _arranged(q_BTIC: jax.Array, k_BSC: jax.Array, w_BTI: jax.Array, scale: float,
              tiles: Tiles) -> tuple[jax.Array, ...]:
    """Heads first, edges filled up; relu(x * scale) = scale * relu(x), so the weights take the scale."""
    q_BITC = jnp.swapaxes(_padded(q_BTIC, tiles.queries), 1, 2)
    w_BIT = jnp.swapaxes(_padded(w_BTI.astype(jnp.float32) * scale, tiles.queries), 1, 2)
    return q_BITC, _padded(k_BSC, tiles.keys), w_BIT


def index_scores(q_BTIC: jax.Array, k_BSC: jax.Array, w_BTI: jax.Array, q_positions: jax.Array, k_positions: jax.Array,
                 q_segments: jax.Array, k_segments: jax.Array, *, scale: float, tiles: Tiles | None = None,
                 interpret: Any = False) -> jax.Array:
    """The scores of every pair, float32 [B, T, S], -inf where a key is not visible; see `api.index_scores`."""
    T, S = q_BTIC.shape[1], k_BSC.shape[1]
    tiles = tiles or tuned(Tiles, "index_scores", "pallas_gpu")
    ranges = visible_tiles(q_positions, k_positions, q_segments, k_segments, *tiles)
    of_queries = [_padded(x, tiles.queries) for x in (q_positions, q_segments)]
    of_keys = [_padded(x, tiles.keys) for x in (k_positions, k_segments)]
    return _scores(*_arranged(q_BTIC, k_BSC, w_BTI, scale, tiles), ranges, *of_queries, *of_keys, tiles=tiles,
                   as_keys=False, interpret=interpret)[:, :T, :S]


def _count(keys_ref, row: tuple, first: jax.Array, end: jax.Array, pivots: tuple[jax.Array, ...],
           chunk: int) -> list[jax.Array]:
    """How many keys of the row are at least each pivot: one read of the row for all of them."""
    def add(step: jax.Array, totals: list[jax.Array]) -> list[jax.Array]:
        key = keys_ref[*row, pl.ds(step * chunk, chunk)]
        return [total + (key >= pivot).astype(jnp.int32) for total, pivot in zip(totals, pivots)]
    return [jnp.sum(total) for total in lax.fori_loop(first, end, add, [jnp.zeros(chunk, jnp.int32) for _ in pivots])]


def _select_kernel(range_ref, keys_ref, out_ref, *, top_k: int, rows: int, chunk: int):
    b, t = pl.program_id(0), pl.program_id(1)
    row = b, t
    first, end = range_ref[b, 0, t // rows], range_ref[b, 1, t // rows]

    def quarters(low: jax.Array, high: jax.Array, turn: jax.Array) -> list[jax.Array]:
        # Dividing the range of values resolves typical scores soonest, dividing that of keys bounds the turns.
        half = lambda a, b: (a >> 1) + (b >> 1) + (a & b & 1)
        middle = half(low, high)
        of_keys = half(low, middle), middle, half(middle, high)
        below, above = float_of(low), float_of(high)
        of_values = [ordered(below * (1 - part) + above * part) for part in (0.25, 0.5, 0.75)]
        return [jnp.clip(jnp.where(turn % 3 == 2, key, value), low + 1, high - 1)
                for key, value in zip(of_keys, of_values)]

    def unresolved(state: tuple[jax.Array, ...]) -> jax.Array:
        low, high, at_least, _, _ = state
        return (at_least > top_k) & (high - low != 1)

    def narrow(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        low, high, at_least, above, turn = state
        pivots = quarters(low, high, turn)
        for pivot, count in zip(pivots, _count(keys_ref, row, first, end, tuple(pivots), chunk)):
            up, down = (count >= top_k) & (pivot > low), (count < top_k) & (pivot < high)
            low, at_least = jnp.where(up, pivot, low), jnp.where(up, count, at_least)
            high, above = jnp.where(down, pivot, high), jnp.where(down, count, above)
        return low, high, at_least, above, turn + 1

    def spread(step: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        least, most, number = state
        key = keys_ref[*row, pl.ds(step * chunk, chunk)]
        shown = key != LOWEST
        least, most = jnp.minimum(least, jnp.where(shown, key, HIGHEST)), jnp.maximum(most, key)
        return least, most, number + shown.astype(jnp.int32)

    full = lambda value: jnp.full(chunk, value, jnp.int32)
    least, most, number = lax.fori_loop(first, end, spread, (full(HIGHEST), full(LOWEST), full(0)))
    # Keys at least `low` number `at_least` >= top_k, those at least `high` number `above` < top_k.
    low, high, at_least, above, _ = lax.while_loop(
        unresolved, narrow, (jnp.min(least), jnp.max(most) + 1, jnp.sum(number), jnp.int32(0), jnp.int32(0)))
    high, above = jnp.where(at_least <= top_k, low, high), jnp.where(at_least <= top_k, at_least, above)
    wanted = jnp.minimum(top_k, at_least) - above  # of the keys in [low, high), the first ones

    def write(step: jax.Array, before: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """`before` and the sums hold two counts: sure ones in the low half, candidates in the high half."""
        key = keys_ref[*row, pl.ds(step * chunk, chunk)]
        sure, maybe = key >= high, (key >= low) & (key < high)
        ones = sure.astype(jnp.int32) + (maybe.astype(jnp.int32) << 16)
        sums = lax.cumsum(ones)
        sure_before = (sums & 0xFFFF) - sure.astype(jnp.int32) + before[0]
        maybe_before = (sums >> 16) - maybe.astype(jnp.int32) + before[1]
        slot = sure_before + jnp.minimum(maybe_before, wanted)
        index = step * chunk + lax.iota(jnp.int32, chunk)
        plgpu.store(out_ref.at[b, t, slot], index, mask=sure | (maybe & (maybe_before < wanted)))
        total = jnp.sum(ones)
        return before[0] + (total & 0xFFFF), before[1] + (total >> 16)

    lax.fori_loop(first, end, write, (jnp.int32(0), jnp.int32(0)))
    slots = out_ref.shape[2]
    step = min(slots, 1024)
    for start in range(0, slots, step):
        slot = start + lax.iota(jnp.int32, step)
        plgpu.store(out_ref.at[b, t, slot], jnp.full(step, -1, jnp.int32), mask=slot >= above + wanted)


def selection_tiles(queries: int) -> Tiles:
    """Tiles for so many queries of a sequence; decoding has one, and tall tiles of it are nearly all padding."""
    many, few = (tuned(Tiles, "select_topk", "pallas_gpu", shapes) for shapes in ("many queries", "few queries"))
    return few if queries < many.queries else many


def select_topk(q_BTIC: jax.Array, k_BSC: jax.Array, w_BTI: jax.Array, q_positions: jax.Array, k_positions: jax.Array,
                q_segments: jax.Array, k_segments: jax.Array, *, scale: float, top_k: int,
                tiles: Tiles | None = None, chunk: int = CHUNK, interpret: Any = False) -> jax.Array:
    """The selection contract, int32 [B, T, top_k]; see `api.select_topk`."""
    B, T, _, _ = q_BTIC.shape
    tiles = tiles or selection_tiles(T)
    q_BITC, k_BSC, w_BIT = _arranged(q_BTIC, _padded(k_BSC, chunk), w_BTI, scale, tiles)
    of_keys = [_padded(x, chunk) for x in (k_positions, k_segments)]
    of_queries = [_padded(x, tiles.queries) for x in (q_positions, q_segments)]
    S, padded_T = k_BSC.shape[1], q_BITC.shape[2]
    slots = pl.next_power_of_2(top_k)

    def select(block: tuple[jax.Array, ...]) -> jax.Array:
        q_BITC, w_BIT, q_positions, q_segments = block
        ranges = visible_tiles(q_positions, of_keys[0], q_segments, of_keys[1], tiles.queries, chunk)
        keys_BTS = _scores(q_BITC, k_BSC, w_BIT, ranges * (chunk // tiles.keys), q_positions, q_segments, *of_keys,
                           tiles=tiles, as_keys=True, interpret=interpret)
        return pl.pallas_call(
            functools.partial(_select_kernel, top_k=top_k, rows=tiles.queries, chunk=chunk),
            out_shape=jax.ShapeDtypeStruct((B, q_positions.shape[1], slots), jnp.int32),
            grid=(B, q_positions.shape[1]),
            compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=2),
            name="select_keys", interpret=interpret,
        )(ranges, keys_BTS)

    # As many tiles of queries at a time as fill the buffer, one at least.
    blocks = padded_T // tiles.queries
    together = max(1, min(blocks, KEY_BUFFER // (4 * B * S * tiles.queries)))
    while blocks % together:
        together -= 1
    split = lambda x, axis: jnp.moveaxis(
        x.reshape(*x.shape[:axis], blocks // together, together * tiles.queries, *x.shape[axis + 1:]), axis, 0)
    parts = split(q_BITC, 2), split(w_BIT, 2), *(split(x, 1) for x in of_queries)
    selected = lax.map(select, parts) if blocks > together else select(tuple(x[0] for x in parts))[None]
    return jnp.moveaxis(selected, 0, 1).reshape(B, padded_T, slots)[:, :T, :top_k]
