"""The lightning indexer on TPU: scores, and the selection fused with them.

`select_topk` keeps the scores of a block of queries in VMEM as int32 keys that order as the scores do, finds each row's
threshold by bisection, packs the selected keys into words of 32 bits, and reads the positions of the bits off the
words: no score leaves the chip, and nothing is sorted.

B batch, T query positions, S key positions, I indexer heads, C channels per head, K keys selected.
"""

import functools
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.blocks import Tiles, tuned
from pallas_kernels.lightning_indexer.ranges import HIGHEST, LOWEST, finite, float_of, ordered, visible_tiles

LANES, BITS = 128, 32
GROUP = LANES * BITS  # keys of one row of words: lane l of a group holds keys 32 l to 32 l + 31, one per bit
WINDOW = 4  # chunks of 128 slots that are searched at once: enough chains to hide the latency of a lane gather
ROW_BUFFER = 32 << 20  # bytes of VMEM for the scores of a block of queries
NT = (((1,), (1,)), ((), ()))  # both operands have channels last


def columns_and_rows(q_positions: jax.Array, k_positions: jax.Array, q_segments: jax.Array,
                     k_segments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Positions and segments laid out for a tile, int32 [B, T, 2] and [B, 2, S]; padding comes after every query."""
    k_positions = jnp.where(k_segments == 0, HIGHEST, k_positions)
    return jnp.stack([q_positions, q_segments], -1), jnp.stack([k_positions, k_segments], 1)


def _visible(q_T2: jax.Array, k_2S: jax.Array) -> jax.Array:
    return (k_2S[:1] <= q_T2[:, :1]) & (k_2S[1:] == q_T2[:, 1:])


def _precision(dtype: Any) -> lax.Precision | None:
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _scores_kernel(range_ref, q_meta_ref, k_meta_ref, w_ref, q_ref, k_ref, out_ref):
    b, i, j = (pl.program_id(axis) for axis in range(3))
    seen = (range_ref[b, 0, i] <= j) & (j < range_ref[b, 1, i])

    @pl.when(seen)
    def _():
        # Keys stream through the matrix unit and queries stay: the weights are then rows, and need no cross-lane moves.
        k_SC = k_ref[...]
        total_ST: Any = None
        for head in range(q_ref.shape[0]):
            products = lax.dot_general(k_SC, q_ref[head], NT, precision=_precision(k_SC.dtype),
                                       preferred_element_type=jnp.float32)
            weighted = jnp.maximum(products, 0.0) * w_ref[head:head + 1, :]
            total_ST = weighted if total_ST is None else total_ST + weighted
        scores_TS = finite(total_ST.T)
        out_ref[...] = jnp.where(_visible(q_meta_ref[...], k_meta_ref[...]), scores_TS, -jnp.inf)

    @pl.when(jnp.logical_not(seen))
    def _():
        out_ref[...] = jnp.full(out_ref.shape, -jnp.inf, jnp.float32)


def _nearest_seen(b: jax.Array, i: jax.Array, j: jax.Array, ranges: Any) -> jax.Array:
    """The key tile to hold at step j: a tile that nobody sees is not fetched, the nearest one that is stays."""
    return jnp.clip(j, ranges[b, 0, i], jnp.maximum(ranges[b, 1, i] - 1, ranges[b, 0, i]))


def index_scores(q_BTIC: jax.Array, k_BSC: jax.Array, w_BTI: jax.Array, q_positions: jax.Array, k_positions: jax.Array,
                 q_segments: jax.Array, k_segments: jax.Array, *, scale: float, tiles: Tiles | None = None,
                 interpret: Any = False) -> jax.Array:
    """The scores of every pair, float32 [B, T, S], -inf where a key is not visible; see `api.index_scores`."""
    B, T, I, C = q_BTIC.shape
    S = k_BSC.shape[1]
    tiles = tiles or tuned(Tiles, "index_scores", "pallas_tpu")
    tiles = Tiles(min(tiles.queries, T), min(tiles.keys, S))
    ranges = visible_tiles(q_positions, k_positions, q_segments, k_segments, *tiles)
    q_meta, k_meta = columns_and_rows(q_positions, k_positions, q_segments, k_segments)
    q_BITC = jnp.swapaxes(q_BTIC, 1, 2)
    w_BIT = jnp.swapaxes(w_BTI.astype(jnp.float32) * scale, 1, 2)  # relu(x * scale) = scale * relu(x)
    return pl.pallas_call(
        _scores_kernel,
        out_shape=jax.ShapeDtypeStruct((B, T, S), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, pl.cdiv(T, tiles.queries), pl.cdiv(S, tiles.keys)),
            in_specs=[
                pl.BlockSpec((None, tiles.queries, 2), lambda b, i, j, r: (b, i, 0)),
                pl.BlockSpec((None, 2, tiles.keys), lambda b, i, j, r: (b, 0, _nearest_seen(b, i, j, r))),
                pl.BlockSpec((None, I, tiles.queries), lambda b, i, j, r: (b, 0, i)),
                pl.BlockSpec((None, I, tiles.queries, C), lambda b, i, j, r: (b, 0, i, 0)),
                pl.BlockSpec((None, tiles.keys, C), lambda b, i, j, r: (b, _nearest_seen(b, i, j, r), 0)),
            ],
            out_specs=pl.BlockSpec((None, tiles.queries, tiles.keys), lambda b, i, j, r: (b, i, j))),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        name="index_scores", interpret=interpret,
    )(ranges, q_meta, k_meta, w_BIT, q_BITC, k_BSC)


def nth_bit(word: jax.Array, n: jax.Array) -> jax.Array:
    """The position of the set bit that has n set bits below it, for n less than the number of set bits."""
    position = jnp.zeros_like(word)
    for width in (16, 8, 4, 2, 1):
        below = lax.population_count(lax.shift_right_logical(word, position) & ((1 << width) - 1))
        above = n >= below
        n = jnp.where(above, n - below, n)
        position = jnp.where(above, position + width, position)
    return position


def _sum_lanes(x: jax.Array) -> jax.Array:
    """Every lane gets the sum of its row; exact, as counts are below 2^24."""
    return jnp.broadcast_to(jnp.sum(x, -1, keepdims=True), x.shape)


def _find_threshold(keys_ref, stats_ref, first: jax.Array, end: jax.Array, top_k: int) -> None:
    """Bisects each row until at most `top_k` keys are at least `low`, or `low` is the last value with more than that.

    stats_ref holds, per row: low, high, and the number of keys that are at least low. On return the keys >= high are
    selected, and of those in [low, high) the first ones, up to `top_k` in all.
    """
    def count(pivot: jax.Array) -> jax.Array:
        def add(group: jax.Array, total: jax.Array) -> jax.Array:
            for bit in range(BITS):
                total += (keys_ref[group * BITS + bit] >= pivot).astype(jnp.int32)
            return total
        return _sum_lanes(lax.fori_loop(first, end, add, jnp.zeros_like(pivot)))

    def unresolved() -> jax.Array:
        low, high, at_least = stats_ref[0], stats_ref[1], stats_ref[2]
        return (at_least > top_k) & (high - low != 1)

    def step(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        turn, _ = state
        low, high, at_least = stats_ref[0], stats_ref[1], stats_ref[2]
        # Halving the range of values resolves typical scores soonest, halving that of keys bounds the number of turns.
        middle = ordered(float_of(low) * 0.5 + float_of(high) * 0.5)
        middle = jnp.where(turn % 4 == 3, (low >> 1) + (high >> 1) + (low & high & 1), middle)
        middle = jnp.clip(middle, low + 1, high - 1)
        open_ = unresolved()
        counted = count(middle)
        up, down = open_ & (counted >= top_k), open_ & (counted < top_k)
        stats_ref[0] = jnp.where(up, middle, low)
        stats_ref[1] = jnp.where(down, middle, high)
        stats_ref[2] = jnp.where(up, counted, at_least)
        return turn + 1, jnp.max(unresolved().astype(jnp.int32))

    lax.while_loop(lambda state: state[1] > 0, step, (jnp.int32(0), jnp.max(unresolved().astype(jnp.int32))))
    stats_ref[1] = jnp.where(stats_ref[2] <= top_k, stats_ref[0], stats_ref[1])


def _pack(keys_ref, stats_ref, words_ref, ranks_ref, first: jax.Array, end: jax.Array, top_k: int) -> None:
    """Words of selected keys, and for each word the number of selected keys before it.

    Two sweeps: the keys from `high` on come first, because how many of [low, high) are still wanted depends on them.
    """
    low, high = stats_ref[0], stats_ref[1]
    lane = lambda axis: lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis)
    before = (lane(0) < lane(1)).astype(jnp.bfloat16)

    def prefix(counts: jax.Array) -> jax.Array:
        """Exclusive sums along the lanes: counts of at most 32 are exact in bfloat16, sums in float32."""
        return jnp.dot(counts.astype(jnp.float32).astype(jnp.bfloat16), before,
                       preferred_element_type=jnp.float32).astype(jnp.int32)

    def pack(group: jax.Array, above: jax.Array) -> jax.Array:
        sure, maybe = jnp.zeros_like(low), jnp.zeros_like(low)
        for bit in range(BITS):
            key, flag = keys_ref[group * BITS + bit], jnp.int32(1 << bit if bit < 31 else LOWEST)
            sure |= jnp.where(key >= high, flag, 0)
            maybe |= jnp.where(key >= low, flag, 0)
        words_ref[group], ranks_ref[group] = sure, maybe ^ sure
        return above + lax.population_count(sure)

    wanted = top_k - _sum_lanes(lax.fori_loop(first, end, pack, jnp.zeros_like(low)))

    def rank(group: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        wanted, total = state
        ties = ranks_ref[group]
        counts = lax.population_count(ties)
        take = jnp.clip(wanted - prefix(counts), 0, counts)
        kept = jnp.where(take == counts, ties, ties & (lax.shift_left(jnp.ones_like(take), nth_bit(ties, take)) - 1))
        word = words_ref[group] | kept
        selected = lax.population_count(word)
        words_ref[group], ranks_ref[group] = word, total + prefix(selected)
        return wanted - _sum_lanes(take), total + _sum_lanes(selected)

    lax.fori_loop(first, end, rank, (wanted, jnp.zeros_like(low)))


def _unpack(words_ref, ranks_ref, slots_ref, first: jax.Array, end: jax.Array) -> None:
    """Slot n of a row gets the position of its n-th selected key, by bisection over the ranks of the words.

    slots_ref is [slots / 128 + WINDOW, queries, 128], so that a window of slots may start at any multiple of 128.
    """
    rows = 8
    slots_ref[...] = jnp.full(slots_ref.shape, -1, jnp.int32)

    @pl.loop(0, slots_ref.shape[1] // rows)
    def _(block):
        row = pl.ds(pl.multiple_of(block * rows, rows), rows)

        @pl.loop(first, end)
        def _(group):
            words, ranks = words_ref[group, row], ranks_ref[group, row]
            start = ranks[:, :1]
            stop = ranks[:, LANES - 1:] + lax.population_count(words[:, LANES - 1:])
            chunk = jnp.min(start) // LANES

            @pl.loop(0, pl.cdiv(jnp.max(stop) - chunk * LANES, LANES * WINDOW))
            def _(window):
                chunks = [chunk + window * WINDOW + part for part in range(WINDOW)]
                slots = [lax.broadcasted_iota(jnp.int32, words.shape, 1) + c * LANES for c in chunks]
                lanes = [jnp.zeros_like(slot) for slot in slots]
                for step in (64, 32, 16, 8, 4, 2, 1):
                    reached = [jnp.take_along_axis(ranks, lane + step, 1) <= slot for lane, slot in zip(lanes, slots)]
                    lanes = [jnp.where(hit, lane + step, lane) for hit, lane in zip(reached, lanes)]
                for c, slot, lane in zip(chunks, slots, lanes):
                    rest = slot - jnp.take_along_axis(ranks, lane, 1)
                    position = nth_bit(jnp.take_along_axis(words, lane, 1), rest) + group * GROUP + lane * BITS
                    here = (start <= slot) & (slot < stop)
                    slots_ref[c, row] = jnp.where(here, position, slots_ref[c, row])


def _select_kernel(range_ref, q_meta_ref, k_meta_ref, w_ref, q_ref, k_ref, out_ref, keys_ref, words_ref, ranks_ref,
                   stats_ref, slots_ref, *, top_k: int):
    b, i, j = (pl.program_id(axis) for axis in range(3))
    first, end = range_ref[b, 0, i], range_ref[b, 1, i]
    slices = k_ref.shape[0] // LANES
    group = j * slices // BITS

    @pl.when(j == 0)
    def _():
        stats_ref[0] = jnp.full(stats_ref.shape[1:], HIGHEST, jnp.int32)
        stats_ref[1] = jnp.full(stats_ref.shape[1:], LOWEST, jnp.int32)
        stats_ref[2] = jnp.zeros(stats_ref.shape[1:], jnp.int32)

    @pl.when((first <= group) & (group < end))
    def _():
        k_SC, total_TS = k_ref[...], None
        for head in range(q_ref.shape[0]):
            products = lax.dot_general(q_ref[head], k_SC, NT, precision=_precision(k_SC.dtype),
                                       preferred_element_type=jnp.float32)
            weighted = jnp.maximum(products, 0.0) * w_ref[:, head:head + 1]
            total_TS = weighted if total_TS is None else total_TS + weighted
        shown = _visible(q_meta_ref[...], k_meta_ref[...]) & (total_TS == total_TS)
        key_TS = jnp.where(shown, ordered(finite(total_TS)), LOWEST)
        least, most, number = stats_ref[0], stats_ref[1], stats_ref[2]
        for part in range(slices):
            key = key_TS[:, part * LANES:(part + 1) * LANES]
            keys_ref[j * slices + part] = key
            least = jnp.minimum(least, jnp.where(key == LOWEST, HIGHEST, key))
            most = jnp.maximum(most, key)
            number += (key != LOWEST).astype(jnp.int32)
        stats_ref[0], stats_ref[1], stats_ref[2] = least, most, number

    @pl.when(j == pl.num_programs(2) - 1)
    def _():
        spread = lambda x: jnp.broadcast_to(x, stats_ref.shape[1:])
        stats_ref[0] = spread(jnp.min(stats_ref[0], -1, keepdims=True))
        stats_ref[1] = spread(jnp.max(stats_ref[1], -1, keepdims=True)) + 1
        stats_ref[2] = _sum_lanes(stats_ref[2])
        _find_threshold(keys_ref, stats_ref, first, end, top_k)
        _pack(keys_ref, stats_ref, words_ref, ranks_ref, first, end, top_k)
        _unpack(words_ref, ranks_ref, slots_ref, first, end)
        for chunk in range(out_ref.shape[1] // LANES):
            out_ref[:, chunk * LANES:(chunk + 1) * LANES] = slots_ref[chunk]


def selection_tiles(queries: int, keys: int) -> Tiles:
    """The largest block of queries whose rows of scores fit in VMEM.

    Raises ValueError where not even eight rows fit.
    """
    tiles = tuned(Tiles, "select_topk", "pallas_tpu")
    rows = min(tiles.queries, -(-queries // 8) * 8)
    groups = -(-keys // GROUP)
    while rows >= 8 and groups * GROUP * rows * 4 > ROW_BUFFER:
        rows //= 2
    if rows < 8:
        raise ValueError(f"select_topk: k_BSC: expected at most {ROW_BUFFER // 32:,} keys, so that the scores of eight "
                         f"queries fit in VMEM, found {keys:,}")
    return tiles._replace(queries=rows)


def select_topk(q_BTIC: jax.Array, k_BSC: jax.Array, w_BTI: jax.Array, q_positions: jax.Array, k_positions: jax.Array,
                q_segments: jax.Array, k_segments: jax.Array, *, scale: float, top_k: int, tiles: Tiles | None = None,
                interpret: Any = False) -> jax.Array:
    """The selection contract, int32 [B, T, top_k]; see `api.select_topk`."""
    B, T, I, C = q_BTIC.shape
    S = k_BSC.shape[1]
    tiles = tiles or selection_tiles(T, S)
    groups, slots = pl.cdiv(S, GROUP), pl.cdiv(top_k, LANES) * LANES

    def interleave(x_BSZ: jax.Array) -> jax.Array:
        """Key 32 l + b of each group goes to place 128 b + l, so that the bits of a word are consecutive keys."""
        x = jnp.pad(x_BSZ, ((0, 0), (0, groups * GROUP - S), (0, 0)))  # padding is of segment 0
        return jnp.swapaxes(x.reshape(B, groups, LANES, BITS, -1), 2, 3).reshape(B, groups * GROUP, -1)

    ranges = visible_tiles(q_positions, k_positions, q_segments, k_segments, tiles.queries, GROUP)
    k_positions, k_segments = (interleave(x[..., None])[..., 0] for x in (k_positions, k_segments))
    q_meta, k_meta = columns_and_rows(q_positions, k_positions, q_segments, k_segments)
    q_BITC = jnp.swapaxes(q_BTIC, 1, 2)
    per_group = GROUP // tiles.keys
    key_tile = lambda b, i, j, r: jnp.clip(
        j, r[b, 0, i] * per_group, jnp.maximum(r[b, 1, i] * per_group - 1, r[b, 0, i] * per_group))
    words = pltpu.VMEM((groups, tiles.queries, LANES), jnp.int32)
    return pl.pallas_call(
        functools.partial(_select_kernel, top_k=top_k),
        out_shape=jax.ShapeDtypeStruct((B, T, slots), jnp.int32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, pl.cdiv(T, tiles.queries), groups * per_group),
            in_specs=[
                pl.BlockSpec((None, tiles.queries, 2), lambda b, i, j, r: (b, i, 0)),
                pl.BlockSpec((None, 2, tiles.keys), lambda b, i, j, r: (b, 0, key_tile(b, i, j, r))),
                pl.BlockSpec((None, tiles.queries, I), lambda b, i, j, r: (b, i, 0)),
                pl.BlockSpec((None, I, tiles.queries, C), lambda b, i, j, r: (b, 0, i, 0)),
                pl.BlockSpec((None, tiles.keys, C), lambda b, i, j, r: (b, key_tile(b, i, j, r), 0)),
            ],
            out_specs=pl.BlockSpec((None, tiles.queries, slots), lambda b, i, j, r: (b, i, 0)),
            scratch_shapes=[pltpu.VMEM((groups * BITS, tiles.queries, LANES), jnp.int32), words, words,
                            pltpu.VMEM((3, tiles.queries, LANES), jnp.int32),
                            pltpu.VMEM((slots // LANES + WINDOW, tiles.queries, LANES), jnp.int32)]),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"),
                                             vmem_limit_bytes=ROW_BUFFER + (16 << 20)),
        name="select_topk", interpret=interpret,
    )(ranges, q_meta, k_meta, w_BTI.astype(jnp.float32) * scale, q_BITC, interleave(k_BSC))[..., :top_k]
