"""Attention over selected latent rows on Hopper GPUs, through Pallas' Triton: one program per query and 64 heads.

A program gathers its rows chunk by chunk; all heads share them. Mosaic has no row gather on Hopper, Triton has: a load
takes any pointers. Where gradients of keys have to have the same bits in every run, the gradients of the rows of a
block of queries are stored, then summed per key in a fixed order; otherwise they are added atomically.

B batch, T query positions, S key positions, H heads, R latent rank, V of it the value, K keys selected.
"""

import functools
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from pallas_kernels.blocks import tuned

NT = (((1,), (1,)), ((), ()))  # both operands have the summed axis last
TN = (((0,), (0,)), ((), ()))  # both operands have the summed axis first
ROW_GRADIENTS = 512 << 20  # bytes of the gradients of gathered rows that are kept at a time
SMALLEST = 16  # side of a product on the tensor cores


PROGRAMS = 264  # two for each multiprocessor of a Hopper GPU


class Tiles(NamedTuple):
    """Heads of one program, and keys of one step of its loop: the most that neither spills nor overflows the memory."""

    heads: int
    keys: int

    def fitting(self, heads: int, dtype: Any) -> "Tiles":
        """For so many heads; in float32, whose rows are twice as long, half as many at a time."""
        heads = min(self.heads * 2 // dtype.itemsize, pl.next_power_of_2(heads))
        return self._replace(heads=max(SMALLEST, heads))


class Columns(NamedTuple):
    """Columns of a latent row as powers of two, which is what Triton computes with: the value's, and the rest."""

    at: jax.Array  # int32
    end: int | None  # where they end, if not with the power of two

    def mask(self, present: jax.Array) -> jax.Array:
        """Of rows by columns; no comparison where every column is there, for it would take registers."""
        rows = present[:, None]
        return rows if self.end is None else rows & (self.at < self.end)[None]


def _columns(start: int, end: int) -> Columns:
    size = max(SMALLEST, pl.next_power_of_2(end - start))
    return Columns(start + lax.iota(jnp.int32, size), None if end - start == size else end)


def _dot(a: jax.Array, b: jax.Array, contract: Any = (((1,), (0,)), ((), ()))) -> jax.Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, contract, precision=precision, preferred_element_type=jnp.float32)


def _load(ref, b: jax.Array, rows: jax.Array, present: jax.Array, columns: Columns) -> jax.Array:
    """Rows of [B, rows, width], zero where absent."""
    shape = len(rows), len(columns.at)
    mask = jnp.broadcast_to(columns.mask(present), shape)
    return plgpu.load(ref.at[b, rows[:, None], columns.at[None]], mask=mask, other=0)


def _store(ref, b: jax.Array, rows: jax.Array, present: jax.Array, columns: Columns, value: jax.Array) -> None:
    mask = jnp.broadcast_to(columns.mask(present), value.shape)
    plgpu.store(ref.at[b, rows[:, None], columns.at[None]], value.astype(ref.dtype), mask=mask)


class _Query(NamedTuple):
    """A query, and which rows of [B, T * H, width] belong to its heads."""

    b: jax.Array
    t: jax.Array
    rows_H: jax.Array
    present_H: jax.Array


def _query(heads: int, tiles: Tiles) -> _Query:
    b, t, h = (pl.program_id(axis) for axis in range(3))
    head = h * tiles.heads + lax.iota(jnp.int32, tiles.heads)
    return _Query(b, t, t * heads + head, head < heads)


def _gather(indices_ref, kv_ref, b: jax.Array, t: jax.Array, step: jax.Array, tiles: Tiles,
            *columns: Columns) -> tuple[jax.Array, ...]:
    """Indices of one chunk of keys, which of them are any, and their columns."""
    index = indices_ref[b, t, pl.ds(step * tiles.keys, tiles.keys)]
    present, row = index >= 0, jnp.maximum(index, 0)
    return row, present, *(_load(kv_ref, b, row, present, part) for part in columns)


def _forward_kernel(ends_ref, indices_ref, q_ref, kv_ref, out_ref, lse_ref, *, heads: int, parts: int, scale: float,
                    tiles: Tiles, value_dim: int):
    at = _query(heads, tiles)
    value, rest = _columns(0, value_dim), _columns(value_dim, kv_ref.shape[2])
    rows_of_q_H = at.rows_H - (at.t - at.t // parts) * heads
    q_value, q_rest = (_load(q_ref, at.b, rows_of_q_H, at.present_H, part) for part in (value, rest))

    def attend(step: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, mixed = state
        _, present, kv_value, kv_rest = _gather(indices_ref, kv_ref, at.b, at.t, step, tiles, value, rest)
        logits = (_dot(q_value, kv_value, NT) + _dot(q_rest, kv_rest, NT)) * scale
        logits = jnp.where(present[None], logits, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(logits, 1))
        base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        weights, shrink = jnp.exp(logits - base[:, None]), jnp.exp(top - base)
        mixed = mixed * shrink[:, None] + _dot(weights.astype(kv_value.dtype), kv_value)
        return new_top, total * shrink + jnp.sum(weights, 1), mixed

    start = (jnp.full(tiles.heads, -jnp.inf, jnp.float32), jnp.zeros(tiles.heads, jnp.float32),
             jnp.zeros((tiles.heads, len(value.at)), jnp.float32))
    top, total, mixed = lax.fori_loop(0, ends_ref[at.b, at.t], attend, start)
    mixed = mixed / jnp.where(total == 0, 1.0, total)[:, None]
    _store(out_ref, at.b, at.rows_H, at.present_H, value, mixed)
    lse = jnp.where(total == 0, -jnp.inf, top + jnp.log(total))
    plgpu.store(lse_ref.at[at.b, at.rows_H], lse, mask=at.present_H)


def _pull(q_value, q_rest, kv_value, kv_rest, present, lse, d_out, delta, scale: float) -> tuple[jax.Array, jax.Array]:
    """Probabilities and the gradient of the products q . kv, both [H, keys] in the dtype of kv."""
    products = _dot(q_value, kv_value, NT) + _dot(q_rest, kv_rest, NT)
    p = jnp.where(present[None], jnp.exp(products * scale - lse[:, None]), 0.0)
    d_products = p * (_dot(d_out, kv_value, NT) - delta[:, None]) * scale
    return p.astype(kv_value.dtype), d_products.astype(kv_value.dtype)


def _of_query(at: _Query, value: Columns, rest: Columns, q_ref, lse_ref, d_out_ref, delta_ref) -> tuple[jax.Array, ...]:
    q = (_load(q_ref, at.b, at.rows_H, at.present_H, part) for part in (value, rest))
    # exp(0 - inf) = 0: neither an absent head nor a query without keys has any weight.
    lse = plgpu.load(lse_ref.at[at.b, at.rows_H], mask=at.present_H, other=jnp.inf)
    delta = plgpu.load(delta_ref.at[at.b, at.rows_H], mask=at.present_H, other=0)
    return *q, jnp.where(lse == -jnp.inf, jnp.inf, lse), _load(d_out_ref, at.b, at.rows_H, at.present_H, value), delta


def _d_q_kernel(ends_ref, indices_ref, q_ref, kv_ref, lse_ref, d_out_ref, delta_ref, d_q_ref, *, heads: int,
                scale: float, tiles: Tiles, value_dim: int):
    at = _query(heads, tiles)
    value, rest = _columns(0, value_dim), _columns(value_dim, kv_ref.shape[2])
    q_value, q_rest, lse, d_out, delta = _of_query(at, value, rest, q_ref, lse_ref, d_out_ref, delta_ref)

    def add(step: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        _, present, kv_value, kv_rest = _gather(indices_ref, kv_ref, at.b, at.t, step, tiles, value, rest)
        _, d_products = _pull(q_value, q_rest, kv_value, kv_rest, present, lse, d_out, delta, scale)
        return sums[0] + _dot(d_products, kv_value), sums[1] + _dot(d_products, kv_rest)

    start = tuple(jnp.zeros((tiles.heads, len(part.at)), jnp.float32) for part in (value, rest))
    sums = lax.fori_loop(0, ends_ref[at.b, at.t], add, start)
    for part, total in zip((value, rest), sums):
        _store(d_q_ref, at.b, at.rows_H, at.present_H, part, total)


def _d_rows_kernel(ends_ref, indices_ref, q_ref, kv_ref, lse_ref, d_out_ref, delta_ref, _, out_ref, *, heads: int,
                   scale: float, tiles: Tiles, value_dim: int, atomic: bool, interpreted: bool):
    """The gradient of each gathered row, added to its key, or stored at [B, T * K, R]; all heads in one program."""
    b, t = pl.program_id(0), pl.program_id(1)
    value, rest = _columns(0, value_dim), _columns(value_dim, kv_ref.shape[2])
    slots = indices_ref.shape[2]

    def of_chunk(step: jax.Array, _: None) -> None:
        row, present, kv_value, kv_rest = _gather(indices_ref, kv_ref, b, t, step, tiles, value, rest)

        def add(block: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            head = block * tiles.heads + lax.iota(jnp.int32, tiles.heads)
            at = _Query(b, t, t * heads + head, head < heads)
            q_value, q_rest, lse, d_out, delta = _of_query(at, value, rest, q_ref, lse_ref, d_out_ref, delta_ref)
            p, d_products = _pull(q_value, q_rest, kv_value, kv_rest, present, lse, d_out, delta, scale)
            of_value = sums[0] + _dot(d_products, q_value, TN) + _dot(p, d_out, TN)
            return of_value, sums[1] + _dot(d_products, q_rest, TN)

        start = tuple(jnp.zeros((tiles.keys, len(part.at)), jnp.float32) for part in (value, rest))
        sums = lax.fori_loop(0, pl.cdiv(heads, tiles.heads), add, start)
        place = row if atomic else t * slots + step * tiles.keys + lax.iota(jnp.int32, tiles.keys)
        for part, total in zip((value, rest), sums):
            if not atomic:
                _store(out_ref, b, place, present, part, total)
            elif interpreted:
                # The interpreter has no atomics on gathered addresses, and runs one program after the other. It writes
                # back what a mask leaves out, so that absent rows must not share a place with a present one.
                place = jnp.where(present, row, out_ref.shape[1] + lax.iota(jnp.int32, tiles.keys))
                _store(out_ref, b, place, present, part, _load(out_ref, b, row, present, part) + total)
            else:
                mask = jnp.broadcast_to(part.mask(present), total.shape)
                plgpu.atomic_add(out_ref, (b, place[:, None], part.at[None]), total, mask=mask)

    lax.fori_loop(0, ends_ref[b, t], of_chunk, None)


def _sum_kernel(starts_ref, order_ref, rows_ref, before_ref, out_ref):
    """out[s] = before[s] + the rows whose numbers are order[starts[s] : starts[s + 1]], one after the other."""
    b, s = pl.program_id(0), pl.program_id(1)
    part = _columns(0, out_ref.shape[2])
    one = lambda row: row + jnp.zeros(1, jnp.int32)
    present = jnp.ones(1, bool)

    def add(place: jax.Array, total: jax.Array) -> jax.Array:
        return total + _load(rows_ref, b, one(order_ref[b, place]), present, part)

    total = lax.fori_loop(starts_ref[b, s], starts_ref[b, s + 1], add, _load(before_ref, b, one(s), present, part))
    _store(out_ref, b, one(s), present, part, total)


def _call(kernel: Any, name: str, out: Any, grid: tuple[int, ...], interpret: Any, *, warps: int = 8, stages: int = 2,
          aliases: dict[int, int] | None = None) -> Any:
    """Every kernel addresses its arrays itself: Triton takes any pointer, and blocks of 576 columns are none of its."""
    return pl.pallas_call(kernel, out_shape=out, grid=grid, name=name, interpret=interpret,
                          input_output_aliases=aliases or {},
                          compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages))


def _chunks(indices_BTK: jax.Array, tiles: Tiles) -> tuple[jax.Array, jax.Array]:
    """Indices filled up to whole chunks, and per query the number of chunks that hold any."""
    filled = jnp.pad(indices_BTK, ((0, 0), (0, 0), (0, -indices_BTK.shape[2] % tiles.keys)), constant_values=-1)
    number = jnp.arange(filled.shape[2], dtype=jnp.int32) // tiles.keys + 1
    return filled, jnp.max(jnp.where(filled >= 0, number, 0), -1)


def forward(q_BTHR: jax.Array, kv_BSR: jax.Array, indices_BTK: jax.Array, *, scale: float, value_dim: int,
            tiles: Tiles | None = None, interpret: Any = False) -> tuple[jax.Array, jax.Array]:
    """See `api.sparse_mla`: the result and the log-sum-exp of the logits, float32 [B, T, H].

    Where there are too few queries to fill the GPU, as in decoding, the keys of a query are divided among programs.
    """
    B, T, H, R = q_BTHR.shape
    K = indices_BTK.shape[2]
    tiles = (tiles or tuned(Tiles, "sparse_mla", "pallas_gpu", "forward")).fitting(H, q_BTHR.dtype)
    programs = B * T * pl.cdiv(H, tiles.heads)
    parts = max(1, min(PROGRAMS // programs, K // (8 * tiles.keys)))
    width = pl.cdiv(pl.cdiv(K, parts), tiles.keys) * tiles.keys
    indices_BTK = jnp.pad(indices_BTK, ((0, 0), (0, 0), (0, parts * width - K)), constant_values=-1)
    indices_BTK, ends_BT = _chunks(indices_BTK.reshape(B, T * parts, width), tiles)
    kernel = functools.partial(_forward_kernel, heads=H, parts=parts, scale=scale, tiles=tiles, value_dim=value_dim)
    shapes = (jax.ShapeDtypeStruct((B, T * parts * H, value_dim), q_BTHR.dtype if parts == 1 else jnp.float32),
              jax.ShapeDtypeStruct((B, T * parts * H), jnp.float32))
    out, lse = _call(kernel, "sparse_mla", shapes, (B, T * parts, pl.cdiv(H, tiles.heads)), interpret)(
        ends_BT, indices_BTK, q_BTHR.reshape(B, T * H, R), kv_BSR)
    out, lse = out.reshape(B, T, parts, H, value_dim), lse.reshape(B, T, parts, H)
    if parts == 1:
        return out[:, :, 0], lse[:, :, 0]
    top = jnp.max(lse, 2, keepdims=True)
    weights = jnp.exp(lse - jnp.where(top == -jnp.inf, 0.0, top))
    total = jnp.sum(weights, 2)
    mixed = jnp.einsum("btph,btphv->bthv", weights, out, precision=lax.Precision.HIGHEST)
    out = mixed / jnp.where(total == 0, 1.0, total)[..., None]
    return out.astype(q_BTHR.dtype), top[:, :, 0] + jnp.log(total)


def backward(q_BTHR: jax.Array, kv_BSR: jax.Array, indices_BTK: jax.Array, lse_BTH: jax.Array, d_out: jax.Array,
             delta_BTH: jax.Array, *, scale: float, value_dim: int, deterministic: bool, tiles: Tiles | None = None,
             interpret: Any = False) -> tuple[jax.Array, jax.Array]:
    """The gradients of q, in its dtype, and of kv, float32; `delta` is sum(d_out * out) less the gradient of lse."""
    B, T, H, R = q_BTHR.shape
    S, K = kv_BSR.shape[1], indices_BTK.shape[2]
    tiles = (tiles or tuned(Tiles, "sparse_mla", "pallas_gpu", "backward")).fitting(H, q_BTHR.dtype)
    options = dict(heads=H, scale=scale, tiles=tiles, value_dim=value_dim)

    def arguments(q, indices, lse, d_out, delta) -> tuple[jax.Array, ...]:
        indices, ends = _chunks(indices, tiles)
        rows = lambda x: x.reshape(B, -1, *x.shape[3:])
        return ends, indices, rows(q), kv_BSR, rows(lse), rows(d_out.astype(q.dtype)), rows(delta)

    of_queries = q_BTHR, indices_BTK, lse_BTH, d_out, delta_BTH
    d_q = _call(functools.partial(_d_q_kernel, **options), "sparse_mla_d_q",
                jax.ShapeDtypeStruct((B, T * H, R), q_BTHR.dtype), (B, T, pl.cdiv(H, tiles.heads)), interpret)(
                    *arguments(*of_queries)).reshape(q_BTHR.shape)
    d_kv_BSR = jnp.zeros((B, S, R), jnp.float32)

    def d_rows(queries: int, out_BNR: jax.Array, *of_queries: jax.Array) -> jax.Array:
        """One gradient per gathered row, into `out_BNR`: where it stands is summed, or stored."""
        kernel = functools.partial(_d_rows_kernel, **options, atomic=not deterministic, interpreted=bool(interpret))
        shape = jax.ShapeDtypeStruct(out_BNR.shape, jnp.float32)
        return _call(kernel, "sparse_mla_d_rows", shape, (B, queries), interpret, aliases={7: 0})(
            *arguments(*of_queries), out_BNR)

    if not deterministic:
        return d_q, d_rows(T, d_kv_BSR, *of_queries)

    slots = -(-K // tiles.keys) * tiles.keys
    block = max(1, min(T, ROW_GRADIENTS // (4 * B * slots * R)))
    count = -(-T // block)

    def split(x: jax.Array) -> jax.Array:
        fill = -1 if x.dtype == jnp.int32 else 0
        x = jnp.pad(x, [(0, 0), (0, count * block - T)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
        return jnp.moveaxis(x.reshape(B, count, block, *x.shape[2:]), 1, 0)

    def add(d_kv_BSR: jax.Array, of_queries: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        rows_BNR = d_rows(block, jnp.zeros((B, block * slots, R), jnp.float32), *of_queries)
        keys_BN = _chunks(of_queries[1], tiles)[0].reshape(B, -1)
        keys_BN = jnp.where(keys_BN < 0, S, keys_BN)  # absent ones come last
        order_BN = jnp.argsort(keys_BN, axis=1, stable=True).astype(jnp.int32)
        ordered_BN = jnp.take_along_axis(keys_BN, order_BN, 1)
        starts = jax.vmap(lambda keys_N: jnp.searchsorted(keys_N, jnp.arange(S + 1), side="left"))(ordered_BN)
        summed = _call(_sum_kernel, "sparse_mla_sum_rows",
                       jax.ShapeDtypeStruct((B, S, R), jnp.float32), (B, S), interpret, warps=4, aliases={3: 0})(
                           starts.astype(jnp.int32), order_BN, rows_BNR, d_kv_BSR)
        return summed, None

    return d_q, lax.scan(add, d_kv_BSR, jax.tree.map(split, of_queries))[0]
