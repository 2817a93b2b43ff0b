"""Attention over selected latent rows on TPU: every tile of keys that a block of queries touches, under a mask.

That is for queries that share tiles; where a sequence is much longer than what they touch, and the chip has
SparseCores, the forward pass gathers rows instead: see `choice.form_on_tpu` and `gathered`.

Rows cannot be fetched one by one from the TensorCore: a DMA of one row takes 31 bundles to issue, 36 us for the 2,048
rows of a query against 1.4 us that their bytes take. Neighbouring queries share tiles instead: the matrix unit computes
all logits of a tile, and a mask made from the indices keeps the selected ones. The mask is itself a matrix product: a
key is 128 * high + low, and the product of the one-hot rows of high with those of low has a one where both meet.

B batch, T query positions, S key positions, H heads, R latent rank, K keys selected.
"""

import functools
import logging
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.blocks import Tiles, tuned
from pallas_kernels.sparse_mla import choice, gathered, sparse_core

_log = logging.getLogger(__name__)

LANES = 128
NT = (((1,), (1,)), ((), ()))  # both operands have the summed axis last
TN = (((0,), (0,)), ((), ()))  # both operands have the summed axis first
VMEM = 64 << 20


def _dot(a: jax.Array, b: jax.Array, contract: Any = (((1,), (0,)), ((), ()))) -> jax.Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, contract, precision=precision, preferred_element_type=jnp.float32)


def _mark(indices_1K: jax.Array, first: jax.Array, chunks: int) -> jax.Array:
    """1.0 where a key is selected, float32 [chunks, 128], for the chunks of 128 keys from number `first` on."""
    one_hot = lambda value, size: jnp.where(
        lax.broadcasted_iota(jnp.int32, (size, indices_1K.shape[1]), 0) == value, 1.0, 0.0).astype(jnp.bfloat16)
    # -1 >> 7 is -1, which no chunk has.
    return _dot(one_hot((indices_1K >> 7) - first, chunks), one_hot(indices_1K & (LANES - 1), LANES), NT)


def _mark_all(indices_ref, marks_ref, first: jax.Array) -> None:
    """Marks for every query of the block; marks_ref is [chunks, queries, 128], its first chunk is number `first`."""
    @pl.loop(0, marks_ref.shape[1])
    def _(query):
        marks_ref[:, pl.ds(query, 1), :] = _mark(indices_ref[pl.ds(query, 1), :], first, marks_ref.shape[0])[:, None]


def _selected(marks_ref, tile: jax.Array, tiles: Tiles) -> jax.Array:
    """Of one tile of keys, bool [queries, keys]."""
    chunks = tiles.keys // LANES
    return jnp.concatenate([marks_ref[tile * chunks + chunk] for chunk in range(chunks)], -1) > 0


def _logits(q_NR: jax.Array, kv_SR: jax.Array, offset_1S: jax.Array, selected_TS: jax.Array, scale: float) -> jax.Array:
    """float32 [queries, H, keys]; -inf where not selected."""
    logits_NS = _dot(q_NR, kv_SR, NT) * scale + offset_1S
    logits_THS = logits_NS.reshape(selected_TS.shape[0], -1, selected_TS.shape[1])
    return jnp.where(selected_TS[:, None], logits_THS, -jnp.inf)


def _forward_kernel(range_ref, indices_ref, q_ref, kv_ref, offset_ref, out_ref, lse_ref, marks_ref, top_ref, sum_ref,
                    mixed_ref, *, scale: float, tiles: Tiles):
    b, i, j = (pl.program_id(axis) for axis in range(3))

    @pl.when(j == 0)
    def _():
        _mark_all(indices_ref, marks_ref, jnp.int32(0))
        top_ref[...] = jnp.full(top_ref.shape, -jnp.inf, jnp.float32)
        sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)
        mixed_ref[...] = jnp.zeros(mixed_ref.shape, jnp.float32)

    @pl.when((range_ref[b, 0, i] <= j) & (j < range_ref[b, 1, i]))
    def _():
        selected_TS = _selected(marks_ref, j, tiles)
        logits_THS = _logits(q_ref[...], kv_ref[...], offset_ref[...], selected_TS, scale)
        before = top_ref[...]
        top = jnp.maximum(before, jnp.max(logits_THS, -1, keepdims=True))
        base = jnp.where(top == -jnp.inf, 0.0, top)
        weights_THS = jnp.exp(logits_THS - base)
        shrink = jnp.exp(before - base)
        top_ref[...], sum_ref[...] = top, sum_ref[...] * shrink + jnp.sum(weights_THS, -1, keepdims=True)
        weights_NS = weights_THS.reshape(-1, tiles.keys).astype(kv_ref.dtype)
        mixed = _dot(weights_NS, kv_ref[:, :mixed_ref.shape[2]]).reshape(mixed_ref.shape)
        mixed_ref[...] = mixed_ref[...] * shrink + mixed

    @pl.when(j == pl.num_programs(2) - 1)
    def _():
        top, total = top_ref[...], sum_ref[...]
        mixed = mixed_ref[...] / jnp.where(total == 0, 1.0, total)
        out_ref[...] = mixed.reshape(out_ref.shape).astype(out_ref.dtype)
        lse_ref[...] = jnp.where(total == 0, -jnp.inf, top + jnp.log(total))[..., 0]


def _pull(q_NR: jax.Array, kv_SR: jax.Array, offset_1S: jax.Array, selected_TS: jax.Array, lse_TH: jax.Array,
          d_out_NV: jax.Array, delta_TH: jax.Array, scale: float) -> tuple[jax.Array, jax.Array]:
    """Probabilities and the gradient of the products q . kv, both [queries * H, keys] in the dtype of kv."""
    logits_THS = _logits(q_NR, kv_SR, offset_1S, selected_TS, scale)
    p_THS = jnp.exp(logits_THS - jnp.where(lse_TH == -jnp.inf, 0.0, lse_TH)[:, :, None])
    d_p_THS = _dot(d_out_NV, kv_SR[:, :d_out_NV.shape[1]], NT).reshape(p_THS.shape)
    d_products_THS = p_THS * (d_p_THS - delta_TH[:, :, None]) * scale
    rows = lambda x: x.reshape(-1, kv_SR.shape[0]).astype(kv_SR.dtype)
    return rows(p_THS), rows(d_products_THS)


def _d_q_kernel(range_ref, indices_ref, q_ref, kv_ref, offset_ref, lse_ref, d_out_ref, delta_ref, d_q_ref, marks_ref,
                sum_ref, *, scale: float, tiles: Tiles):
    b, i, j = (pl.program_id(axis) for axis in range(3))

    @pl.when(j == 0)
    def _():
        _mark_all(indices_ref, marks_ref, jnp.int32(0))
        sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)

    @pl.when((range_ref[b, 0, i] <= j) & (j < range_ref[b, 1, i]))
    def _():
        _, d_products_NS = _pull(q_ref[...], kv_ref[...], offset_ref[...], _selected(marks_ref, j, tiles), lse_ref[...],
                                 d_out_ref[...], delta_ref[...], scale)
        sum_ref[...] += _dot(d_products_NS, kv_ref[...])

    @pl.when(j == pl.num_programs(2) - 1)
    def _():
        d_q_ref[...] = sum_ref[...].astype(d_q_ref.dtype)


def _d_kv_kernel(range_ref, indices_ref, q_ref, kv_ref, offset_ref, lse_ref, d_out_ref, delta_ref, d_kv_ref, marks_ref,
                 *, scale: float, tiles: Tiles):
    b, j, i = (pl.program_id(axis) for axis in range(3))

    @pl.when(i == 0)
    def _():
        d_kv_ref[...] = jnp.zeros(d_kv_ref.shape, jnp.float32)

    @pl.when((range_ref[b, 0, i] <= j) & (j < range_ref[b, 1, i]))
    def _():
        _mark_all(indices_ref, marks_ref, j * marks_ref.shape[0])
        p_NS, d_products_NS = _pull(q_ref[...], kv_ref[...], offset_ref[...], _selected(marks_ref, jnp.int32(0), tiles),
                                    lse_ref[...], d_out_ref[...], delta_ref[...], scale)
        value_dim = d_out_ref.shape[1]
        d_kv_ref[...] += _dot(d_products_NS, q_ref[...], TN)
        d_kv_ref[:, :value_dim] += _dot(p_NS, d_out_ref[...], TN)


class _Arranged(NamedTuple):
    """Arguments filled up to whole tiles, queries and heads in one axis N."""

    ranges: jax.Array
    indices_BTK: jax.Array
    q_BNR: jax.Array
    kv_BSR: jax.Array
    offset_B1S: jax.Array


def _fill(x: jax.Array, axis: int, multiple: int, value: Any = 0) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths, constant_values=value)


def _arrange(q_BTHR: jax.Array, kv_BSR: jax.Array, indices_BTK: jax.Array, tiles: Tiles) -> _Arranged:
    B, S, R = kv_BSR.shape
    indices_BTK = _fill(_fill(indices_BTK, 1, tiles.queries, -1), 2, LANES, -1)
    q_BTHR, kv_BSR = _fill(q_BTHR, 1, tiles.queries), _fill(kv_BSR, 1, tiles.keys)
    # A row that is not finite must reach those that selected it, and no other by way of a product with zero.
    finite_BS = jnp.isfinite(kv_BSR).all(-1)
    offset_B1S = jnp.where(finite_BS, 0.0, jnp.nan)[:, None]
    kv_BSR = jnp.where(finite_BS[..., None], kv_BSR, 0)
    blocks = indices_BTK.reshape(B, -1, tiles.queries * indices_BTK.shape[2])
    first = jnp.min(jnp.where(blocks < 0, S, blocks), -1) // tiles.keys
    end = jnp.max(blocks, -1) // tiles.keys + 1
    return _Arranged(jnp.stack([jnp.minimum(first, end), end], 1), indices_BTK, q_BTHR.reshape(B, -1, R), kv_BSR,
                     offset_B1S)


def _specs(heads: int, tiles: Tiles, arranged: _Arranged, *, keys_outside: bool) -> Any:
    """Block specs by what they hold: per query and head, per query, per key; and the grid.

    The tile of keys is the outer loop where gradients of keys are summed, else the inner one. A tile outside the range
    of the block of queries is not fetched: the nearest one inside stays.
    """
    B, N, _ = arranged.q_BNR.shape
    blocks, key_tiles = N // heads // tiles.queries, arranged.kv_BSR.shape[1] // tiles.keys
    if keys_outside:
        grid = B, key_tiles, blocks
        block, tile = lambda b, j, i, r: i, lambda b, j, i, r: j
    else:
        grid = B, blocks, key_tiles
        block = lambda b, i, j, r: i
        tile = lambda b, i, j, r: jnp.clip(j, r[b, 0, i], jnp.maximum(r[b, 1, i] - 1, r[b, 0, i]))
    of_rows = lambda width: pl.BlockSpec((None, tiles.queries * heads, width), lambda *at: (at[0], block(*at), 0))
    of_queries = lambda width: pl.BlockSpec((None, tiles.queries, width), lambda *at: (at[0], block(*at), 0))
    of_keys = lambda width: pl.BlockSpec((None, tiles.keys, width), lambda *at: (at[0], tile(*at), 0))
    offsets = pl.BlockSpec((None, 1, tiles.keys), lambda *at: (at[0], 0, tile(*at)))
    return grid, of_rows, of_queries, of_keys, offsets


_PARAMETERS = dict(dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM)


def forward(q_BTHR: jax.Array, kv_BSR: jax.Array, indices_BTK: jax.Array, *, scale: float, value_dim: int,
            tiles: Tiles | None = None, interpret: Any = False) -> tuple[jax.Array, jax.Array]:
    """See `api.sparse_mla`: the result and the log-sum-exp of the logits, float32 [B, T, H]."""
    chip = "interpreted" if interpret else sparse_core.of_target()
    shapes = {"q_BTHR": q_BTHR.shape, "kv_BSR": kv_BSR.shape, "indices_BTK": indices_BTK.shape}
    form, reason = choice.form_on_tpu(shapes, str(q_BTHR.dtype), chip if isinstance(chip, str) else None)
    _log.info("sparse_mla: pallas_tpu by %s (%s)", form, reason)
    if form == "gathered":
        return gathered.forward(q_BTHR, kv_BSR, indices_BTK, scale=scale, value_dim=value_dim, chip=chip)
    B, T, H, R = q_BTHR.shape
    tiles = tiles or tuned(Tiles, "sparse_mla", "pallas_tpu")
    x = _arrange(q_BTHR, kv_BSR, indices_BTK, tiles)
    grid, of_rows, of_queries, of_keys, offsets = _specs(H, tiles, x, keys_outside=False)
    N, chunks = x.q_BNR.shape[1], x.kv_BSR.shape[1] // LANES
    per_head = lambda width: pltpu.VMEM((tiles.queries, H, width), jnp.float32)
    out, lse = pl.pallas_call(
        functools.partial(_forward_kernel, scale=scale, tiles=tiles),
        out_shape=(jax.ShapeDtypeStruct((B, N, value_dim), q_BTHR.dtype),
                   jax.ShapeDtypeStruct((B, N // H, H), jnp.float32)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=grid,
            in_specs=[of_queries(x.indices_BTK.shape[2]), of_rows(R), of_keys(R), offsets],
            out_specs=(of_rows(value_dim), of_queries(H)),
            scratch_shapes=[pltpu.VMEM((chunks, tiles.queries, LANES), jnp.float32), per_head(1), per_head(1),
                            per_head(value_dim)]),
        compiler_params=pltpu.CompilerParams(**_PARAMETERS), name="sparse_mla", interpret=interpret,
    )(x.ranges, x.indices_BTK, x.q_BNR, x.kv_BSR, x.offset_B1S)
    return out.reshape(B, -1, H, value_dim)[:, :T], lse[:, :T]


def backward(q_BTHR: jax.Array, kv_BSR: jax.Array, indices_BTK: jax.Array, lse_BTH: jax.Array, d_out: jax.Array,
             delta_BTH: jax.Array, *, scale: float, value_dim: int, deterministic: bool, tiles: Tiles | None = None,
             interpret: Any = False) -> tuple[jax.Array, jax.Array]:
    """The gradients of q, in its dtype, and of kv, float32; `delta` is sum(d_out * out) less the gradient of lse.

    Two passes, one per gradient: each tile of either is summed in one place and in one order, so the result is the same
    in every run whatever `deterministic` says.
    """
    B, T, H, R = q_BTHR.shape
    S = kv_BSR.shape[1]
    tiles = tiles or tuned(Tiles, "sparse_mla", "pallas_tpu")
    x = _arrange(q_BTHR, kv_BSR, indices_BTK, tiles)
    N, chunks = x.q_BNR.shape[1], x.kv_BSR.shape[1] // LANES
    d_out_BNV = _fill(d_out, 1, tiles.queries).reshape(B, N, value_dim).astype(q_BTHR.dtype)
    inputs = (x.ranges, x.indices_BTK, x.q_BNR, x.kv_BSR, x.offset_B1S, _fill(lse_BTH, 1, tiles.queries), d_out_BNV,
              _fill(delta_BTH, 1, tiles.queries))

    def call(kernel: Any, name: str, keys_outside: bool, out: jax.ShapeDtypeStruct, scratch: list) -> jax.Array:
        grid, of_rows, of_queries, of_keys, offsets = _specs(H, tiles, x, keys_outside=keys_outside)
        return pl.pallas_call(
            functools.partial(kernel, scale=scale, tiles=tiles), out_shape=out,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1, grid=grid,
                in_specs=[of_queries(x.indices_BTK.shape[2]), of_rows(R), of_keys(R), offsets, of_queries(H),
                          of_rows(value_dim), of_queries(H)],
                out_specs=of_keys(R) if keys_outside else of_rows(R), scratch_shapes=scratch),
            compiler_params=pltpu.CompilerParams(**_PARAMETERS), name=name, interpret=interpret)(*inputs)

    d_q_BNR = call(_d_q_kernel, "sparse_mla_d_q", False, jax.ShapeDtypeStruct(x.q_BNR.shape, q_BTHR.dtype),
                   [pltpu.VMEM((chunks, tiles.queries, LANES), jnp.float32),
                    pltpu.VMEM((tiles.queries * H, R), jnp.float32)])
    d_kv_BSR = call(_d_kv_kernel, "sparse_mla_d_kv", True, jax.ShapeDtypeStruct(x.kv_BSR.shape, jnp.float32),
                    [pltpu.VMEM((tiles.keys // LANES, tiles.queries, LANES), jnp.float32)])
    return d_q_BNR.reshape(B, -1, H, R)[:, :T], d_kv_BSR[:, :S]
