"""The operations of `pallas_kernels` on a CPU, each beside what it is meant to beat: ratios within one run.

    python benchmarks/kernels.py            (`--parts attention`, `--lengths 4096 8192` for less)

- attention: 32 queries at the end of a sequence, 8 heads, latent rows of 512 + 64, an indexer of 8 x 128, top_k 2048.
  Sparse is `select_topk` and `sparse_mla`; dense is absorbed attention over every key under the causal mask, without
  an indexer. `sparse_mla` alone, forward and with its gradient, has dense attention's beside it.
- selection: the 2048 best of 64 rows by bisection, beside `lax.top_k` (whose indices come in no order).
- grouped: `grouped_matmul` of 4096 rows over 32 experts of 512 x 1024, spread evenly and by Zipf's law, beside one
  dense product of as many operations, its roof; `lax.ragged_dot`; for the even spread the gradients of all three.

Inputs are random normal. Before timing, sparse attention over all keys is compared with dense, the bisection with
`lax.top_k`, and the grouped product with `lax.ragged_dot`. Two CPU cores: three to six minutes. Seen: attention gains
with length, 0.8x at 4K to 2.9x at 32K in float32, 0.6x to 1.6x in bfloat16 (aim 3x); selection 2.1x at 4K, 0.95x at
32K; a grouped product 0.56 of its roof in float32, 0.38 in bfloat16 (aim 0.5), `lax.ragged_dot` about 1/32. Writes
benchmarks/results/kernels-<date>-<device>.json.
"""

import argparse
import functools
import pathlib
from typing import Any, Callable, NamedTuple, Sequence

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from pallas_kernels.lightning_indexer import xla

import measure
from measure import Job

LENGTHS = (4096, 8192, 16384, 32768)
AGREEMENT = {"float32": 1e-4, "bfloat16": 3e-2}  # of the largest difference, over dense's deviation
AIM_AT_32K = 3.0  # bfloat16
AIM_OF_ROOF = 0.5


class Sizes(NamedTuple):
    """Of one measurement; `top_k` is that of the selection part too, `rows` are its own."""

    queries: int = 32
    heads: int = 8
    rank: int = 576
    value_dim: int = 512
    index_heads: int = 8
    index_dim: int = 128
    top_k: int = 2048
    rows: int = 64
    grouped: tuple[int, int, int, int] = (4096, 32, 512, 1024)  # rows, experts, widths before and after


class Inputs(NamedTuple):
    """Of attention over one sequence, whose last positions are the queries'."""

    q_BTHR: jax.Array
    kv_BSR: jax.Array
    index: dict[str, jax.Array]


def inputs(sizes: Sizes, length: int, dtype: str) -> Inputs:
    rng = np.random.default_rng(0)
    drawn = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32)).astype(dtype)
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    last, ones = positions[:, length - sizes.queries:], jnp.ones((1, length), jnp.int32)
    index = {"q_BTIC": drawn(1, sizes.queries, sizes.index_heads, sizes.index_dim),
             "k_BSC": drawn(1, length, sizes.index_dim), "w_BTI": drawn(1, sizes.queries, sizes.index_heads),
             "q_positions": last, "k_positions": positions, "q_segments": jnp.ones_like(last), "k_segments": ones}
    return Inputs(drawn(1, sizes.queries, sizes.heads, sizes.rank), drawn(1, length, sizes.rank), index)


def select(sizes: Sizes, x: Inputs) -> jax.Array:
    return pallas_kernels.select_topk(**x.index, scale=sizes.index_dim ** -0.5, top_k=sizes.top_k)


def sparse(sizes: Sizes, x: Inputs, selected_BTK: jax.Array) -> jax.Array:
    return pallas_kernels.sparse_mla(x.q_BTHR, x.kv_BSR, selected_BTK, scale=sizes.rank ** -0.5,
                                     value_dim=sizes.value_dim)


def dense(sizes: Sizes, x: Inputs) -> jax.Array:
    """Absorbed attention over every earlier key, [B, T, H, value_dim]."""
    logits = jnp.einsum("bthr,bsr->bths", x.q_BTHR, x.kv_BSR, preferred_element_type=jnp.float32) * sizes.rank ** -0.5
    earlier = x.index["k_positions"][:, None] <= x.index["q_positions"][:, :, None]
    p = jax.nn.softmax(jnp.where(earlier[:, :, None], logits, -jnp.inf), -1).astype(x.q_BTHR.dtype)
    return jnp.einsum("bths,bsv->bthv", p, x.kv_BSR[..., :sizes.value_dim])


def with_gradient(attend: Callable[..., jax.Array], x: Inputs, *args: Any) -> Any:
    """The gradient by queries and rows."""
    def total(q_BTHR: jax.Array, kv_BSR: jax.Array) -> jax.Array:
        return attend(x._replace(q_BTHR=q_BTHR, kv_BSR=kv_BSR), *args).astype(jnp.float32).sum()

    return jax.grad(total, (0, 1))(x.q_BTHR, x.kv_BSR)


def timed(programs: dict[str, tuple[Any, ...]], baseline: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Compiles `function, *arguments` and times them by turns; how many times as fast as the baseline each is."""
    compiled = {name: (jax.jit(fn).lower(*args).compile(), args) for name, (fn, *args) in programs.items()}
    jobs = {name: Job(program, lambda args=args: args) for name, (program, args) in compiled.items()}
    return measure.speed(measure.taking_turns(jobs, rounds), baseline)


def show(title: str, rows: dict[str, dict[str, Any]]) -> None:
    for name, row in rows.items():
        print(f"  {title:16} {name:24} {row['seconds']:8.3f} s  {row['ratio']:6.2f}x  "
              f"({row['ratio_lowest']:.2f} to {row['ratio_highest']:.2f})", flush=True)


def attention(sizes: Sizes, lengths: Sequence[int], rounds: int) -> dict[str, Any]:
    """Sparse beside dense attention. Raises SystemExit where they differ although every key is selected."""
    table: dict[str, Any] = {}
    of = lambda fn: functools.partial(fn, sizes)
    for dtype, allowed in AGREEMENT.items():
        x = inputs(sizes, sizes.top_k, dtype)
        full, chosen = (np.asarray(out, np.float32) for out in (dense(sizes, x), sparse(sizes, x, select(sizes, x))))
        apart = float(np.abs(full - chosen).max() / full.std())
        if not apart < allowed:
            raise SystemExit(f"sparse attention over all keys, {dtype}: expected dense attention within {allowed:g}, "
                             f"found {apart:.1e}")
        table[dtype] = {"difference_where_all_are_selected": apart}
        for length in lengths:
            x = inputs(sizes, length, dtype)
            selected = jax.jit(of(select))(x)
            rows = timed({
                "dense": (of(dense), x),
                "sparse": (lambda x: sparse(sizes, x, select(sizes, x)), x),
                "sparse_mla alone": (of(sparse), x, selected)}, "dense", rounds)
            gradients = timed({
                "dense gradient": (functools.partial(with_gradient, of(dense)), x),
                "sparse_mla gradient": (functools.partial(with_gradient, of(sparse)), x, selected)},
                "dense gradient", rounds)
            table[dtype][length] = rows | gradients
            show(f"{dtype} {length}", table[dtype][length])
    if 32768 in lengths:
        reached = table["bfloat16"][32768]["sparse"]["ratio"]
        print(f"  bfloat16 at 32768: {reached:.2f}x (aim {AIM_AT_32K:g}x)")
    return table


def selection(sizes: Sizes, lengths: Sequence[int], rounds: int) -> dict[str, Any]:
    """The bisection beside `lax.top_k`. Raises SystemExit where they select other keys."""
    bisection = functools.partial(xla.best_by_bisection, top_k=sizes.top_k)
    top_k = lambda x_NS: lax.top_k(x_NS, sizes.top_k)[1]
    table: dict[str, Any] = {}
    for length in lengths:
        x_NS = jnp.asarray(np.random.default_rng(0).standard_normal((sizes.rows, length), np.float32))
        if not np.array_equal(jax.jit(bisection)(x_NS), np.sort(jax.jit(top_k)(x_NS))):
            raise SystemExit(f"selection of {sizes.top_k} from {length}: expected the keys of lax.top_k, found others")
        table[str(length)] = timed({"lax.top_k": (top_k, x_NS), "bisection": (bisection, x_NS)}, "lax.top_k", rounds)
        show(str(length), table[str(length)])
    return table


def grouped(sizes: Sizes, lengths: Sequence[int], rounds: int) -> dict[str, Any]:
    """Grouped products beside one dense product. Raises SystemExit where ours and `lax.ragged_dot` differ."""
    rows, experts, depth, width = sizes.grouped
    rng = np.random.default_rng(0)
    shares = {"even": np.ones(experts), "zipf": 1 / np.arange(1, experts + 1)}
    table: dict[str, Any] = {}
    for dtype, allowed in AGREEMENT.items():
        x, w = (jnp.asarray(rng.standard_normal(shape, np.float32)).astype(dtype)
                for shape in ((rows, depth), (experts, depth, width)))
        for load, share in shares.items():
            group_sizes = jnp.asarray(rng.multinomial(rows, share / share.sum()), jnp.int32)
            products: dict[str, tuple[Any, ...]] = {
                "dense": (jnp.matmul, x, w[0]), "grouped_matmul": (pallas_kernels.grouped_matmul, x, w, group_sizes),
                "lax.ragged_dot": (lax.ragged_dot, x, w, group_sizes)}
            ours, theirs = (np.asarray(jax.jit(products[name][0])(*products[name][1:]), np.float32)
                            for name in ("grouped_matmul", "lax.ragged_dot"))
            apart = float(np.abs(ours - theirs).max() / theirs.std())
            if not apart < allowed:
                raise SystemExit(f"grouped_matmul, {dtype}, {load}: expected lax.ragged_dot within {allowed:g}, "
                                 f"found {apart:.1e}")
            found = timed(products, "dense", rounds)
            if load == "even":
                gradients = {f"{name} gradient": (functools.partial(_gradients, fn), *args)
                             for name, (fn, *args) in products.items()}
                found |= timed(gradients, "dense gradient", rounds)
            table[f"{dtype} {load}"] = found
            show(f"{dtype} {load}", found)
            print(f"  {dtype} {load}: {found['grouped_matmul']['ratio']:.2f} of the roof (aim {AIM_OF_ROOF:g})")
    return table


def _gradients(product: Callable[..., jax.Array], x: jax.Array, w: jax.Array, *args: Any) -> Any:
    """Both gradients, of a cotangent that is the product itself."""
    out, pull = jax.vjp(lambda x, w: product(x, w, *args), x, w)
    return pull(out)


PARTS: dict[str, Callable[[Sizes, Sequence[int], int], dict[str, Any]]] = {
    "attention": attention, "selection": selection, "grouped": grouped}


def main(arguments: list[str] | None = None, sizes: Sizes = Sizes()) -> None:
    parser = argparse.ArgumentParser(description="Operations of pallas_kernels beside what they are meant to beat.")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    record = measure.surroundings() | {"rounds": options.rounds, "sizes": sizes._asdict()}
    for part in options.parts:
        print(f"{part}: seconds, and how many times as fast as the first")
        record[part] = PARTS[part](sizes, options.lengths, options.rounds)
    print(f"Written to {measure.write(options.out, 'kernels', record)}")


if __name__ == "__main__":
    main()
