"""The indexer in XLA's operations: scores head by head, selection by bisection or by `lax.top_k`.

B batch, T query positions, S key positions, I indexer heads, C channels per head, K keys selected.
"""

import functools
from typing import Callable

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels.blocks import SelectionBlocks, over_queries, tuned
from pallas_kernels.lightning_indexer.reference import LOWEST, visible

HIDDEN = jnp.iinfo(jnp.int32).min
LANES = 128  # a row is counted and summed in columns of so many: whole vectors, and short sums


def index_scores(q_BTIC: jax.Array, k_BSC: jax.Array, w_BTI: jax.Array, q_positions: jax.Array,
                 k_positions: jax.Array, q_segments: jax.Array, k_segments: jax.Array, *, scale: float) -> jax.Array:
    """See `api.index_scores`. One head at a time, anew in the backward pass: memory is that of the result."""
    @jax.checkpoint
    def add_head(total_BTS: jax.Array, head: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        q_BTC, w_BT = head
        products = jnp.einsum("btc,bsc->bts", q_BTC, k_BSC, precision=lax.Precision.HIGHEST,
                              preferred_element_type=jnp.float32)
        return total_BTS + w_BT[..., None] * jax.nn.relu(products), None

    heads = jnp.moveaxis(q_BTIC, 2, 0), jnp.moveaxis(w_BTI.astype(jnp.float32) * scale, 2, 0)
    zeros = jnp.zeros((*q_BTIC.shape[:2], k_BSC.shape[1]), jnp.float32)
    scores = lax.scan(add_head, zeros, heads)[0]
    return jnp.where(visible(q_positions, k_positions, q_segments, k_segments), jnp.maximum(scores, LOWEST), -jnp.inf)


def select_topk(q_BTIC: jax.Array, k_BSC: jax.Array, w_BTI: jax.Array, q_positions: jax.Array, k_positions: jax.Array,
                q_segments: jax.Array, k_segments: jax.Array, *, scale: float, top_k: int,
                blocks: SelectionBlocks | None = None) -> jax.Array:
    """See `api.select_topk`. One block of queries at a time."""
    blocks = blocks or tuned(SelectionBlocks, "select_topk", "xla")
    keys = k_BSC, k_positions, k_segments

    def block(q: jax.Array, w: jax.Array, positions: jax.Array, segments: jax.Array) -> jax.Array:
        score = lambda k, k_positions, k_segments: index_scores(
            q, k, w, positions, k_positions, segments, k_segments, scale=scale)
        scores = lax.platform_dependent(*keys, cpu=functools.partial(_over_keys, score, blocks.scored_keys),
                                        default=score)
        return best(scores, top_k)

    return over_queries(block, blocks.queries, q_BTIC, w_BTI, q_positions, q_segments)


def _over_keys(score: Callable[..., jax.Array], size: int, *keys: jax.Array) -> jax.Array:
    """`score(*keys)` in blocks of keys, whose products with all heads stay in the cache; the last two may overlap."""
    length = keys[0].shape[1]
    if length <= size:
        return score(*keys)

    def add(number: jax.Array, scores_BTS: jax.Array) -> jax.Array:
        start = jnp.minimum(number * size, length - size)
        block = score(*(lax.dynamic_slice_in_dim(x, start, size, 1) for x in keys))
        return lax.dynamic_update_slice_in_dim(scores_BTS, block, start, 2)

    shape = jax.eval_shape(score, *keys)
    return lax.fori_loop(0, -(-length // size), add, jnp.zeros(shape.shape, shape.dtype))


def best(scores_BTS: jax.Array, top_k: int) -> jax.Array:
    """The selection contract on masked scores, -inf where not visible: int32 [..., top_k].

    Measured on one CPU core at a top_k of 2048, bisection is 3.3, 2.7, 2.0 and 1.4 times as fast as `lax.top_k` for S
    of 4K, 8K, 16K and 32K; at a small top_k it is slower. Elsewhere every bit would read the scores from memory again,
    which pays only in a kernel that keeps them on the chip.
    """
    by_sorting = functools.partial(best_by_sorting, top_k=top_k)
    if top_k < 256 or 64 * top_k < scores_BTS.shape[-1]:
        return by_sorting(scores_BTS)
    return lax.platform_dependent(scores_BTS, cpu=functools.partial(best_by_bisection, top_k=top_k), default=by_sorting)


def best_by_sorting(scores_BTS: jax.Array, top_k: int) -> jax.Array:
    """`best` by `lax.top_k`, which for a large `top_k` sorts whole rows on every platform."""
    length = scores_BTS.shape[-1]
    scores = jnp.where(jnp.isnan(scores_BTS), -jnp.inf, scores_BTS)
    scores = jnp.where(scores == 0, 0.0, scores)  # lax.top_k would put +0.0 before -0.0
    found, chosen = lax.top_k(scores, min(top_k, length))  # of equal scores, the lowest index comes first
    chosen = jnp.sort(jnp.where(found > -jnp.inf, chosen, length), -1)
    chosen = jnp.where(chosen == length, -1, chosen).astype(jnp.int32)
    padding = [(0, 0)] * (chosen.ndim - 1) + [(0, top_k - chosen.shape[-1])]
    return jnp.pad(chosen, padding, constant_values=-1)


def best_by_bisection(scores_BTS: jax.Array, top_k: int) -> jax.Array:
    """`best` without a sort: the score of the last key selected is found bit by bit, and the selected move together."""
    *leading, length = scores_BTS.shape
    rows_NS = jnp.pad(scores_BTS.reshape(-1, length), ((0, 0), (0, -length % LANES)), constant_values=-jnp.inf)
    bisect = functools.partial(_bisect, top_k=top_k)
    together = tuned(SelectionBlocks, "select_topk", "xla").bisected_scores
    chosen_NK = over_queries(bisect, max(1, together // rows_NS.shape[-1]), rows_NS, axis=0)
    return chosen_NK.reshape(*leading, top_k)


def _bisect(scores_NS: jax.Array, top_k: int) -> jax.Array:
    """Of keys whose score equals the last one's, those of the lowest index fill what the higher scores leave."""
    rows, length = scores_NS.shape
    keys_NGL = lax.optimization_barrier(_ordered(scores_NS).reshape(rows, -1, LANES))  # or every bit makes them anew
    last_N = _largest_reached(keys_NGL, top_k)[:, None, None]
    above, equal = keys_NGL > last_N, (keys_NGL == last_N) & (keys_NGL > HIDDEN)
    rank_above, rank_equal = _running_counts(above, equal)
    left = top_k - rank_above[:, -1:, -1:]
    selected = above | (equal & (rank_equal <= left))
    slot = rank_above + jnp.minimum(rank_equal, left) - 1 + top_k * jnp.arange(rows)[:, None, None]
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32).reshape(1, -1, LANES), keys_NGL.shape)
    found = jnp.full(rows * top_k, -1, jnp.int32)
    return found.at[jnp.where(selected, slot, found.size)].set(index, mode="drop").reshape(rows, top_k)


def _ordered(scores: jax.Array) -> jax.Array:
    """Integers in the order of the scores, HIDDEN for -inf and NaN."""
    bits = lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.int32)
    return jnp.where(scores > -jnp.inf, bits ^ (lax.shift_right_arithmetic(bits, 31) & 0x7FFFFFFF), HIDDEN)


def _largest_reached(keys_NGL: jax.Array, count: int) -> jax.Array:
    """The largest integer that at least `count` keys of a row reach, [N]; HIDDEN where there is none."""
    def decide(bit: jax.Array, found_N: jax.Array) -> jax.Array:
        tried_N = found_N + lax.shift_left(jnp.int32(1), 31 - bit)  # the highest bit: from the lowest integer to 0
        reached = jnp.sum(keys_NGL >= tried_N[:, None, None], 1, dtype=jnp.float32).sum(-1)  # float32: vectorised
        return jnp.where(reached >= count, tried_N, found_N)

    return lax.fori_loop(0, 32, decide, jnp.full(len(keys_NGL), HIDDEN, jnp.int32))


def _running_counts(*marks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of two kinds of marks, how many of a row there are up to each place, itself included, int32 [N, G, L].

    One product counts both within a group: a group has at most 128 of a kind, so the second is counted in 256ths.
    """
    first, second = (x.astype(jnp.float32) for x in marks)
    within = ((first + 256 * second) @ jnp.triu(jnp.ones((LANES, LANES), jnp.float32))).astype(jnp.int32)
    below = lambda x: x + (jnp.cumsum(x[..., -1], -1) - x[..., -1])[..., None]
    return below(within & 255), below(within >> 8)
