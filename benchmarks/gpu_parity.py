"""What the Pallas kernels of `pallas_kernels` compute on this device, beside their exact references.

B batch, T query positions, S key positions, I indexer heads, C channels per head, H heads, R latent rank, K keys
selected, N rows, E groups.
"""

import functools
from typing import Any, Callable, Iterable, Mapping, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels

# Of the difference, relative in norm: rounding in float32, of which TF32 would make 3e-4, and in bfloat16.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
POISON = 1 << 28  # bytes of NaN left where results are likely to be put


class Shapes(NamedTuple):
    """Sizes that are no multiple of any tile, unless they are the model's."""

    name: str
    dtype: str
    batch: int = 2
    queries: int = 37
    keys: int = 300
    index: tuple[int, int] = (3, 32)  # heads and channels
    heads: int = 5
    rank: int = 40
    value_dim: int = 32
    top_k: int = 70
    grouped: tuple[int, int, int, int] = (300, 6, 72, 88)  # rows, groups, widths before and after


SMALL = Shapes("small", "float32"), Shapes("small", "bfloat16")
REAL = Shapes("real", "bfloat16", 1, 256, 32768, (32, 128), 64, 576, 512, 2048, (2048, 32, 6144, 2048))
Operation = Callable[..., Any]
Results = Mapping[str, tuple[Any, Any]]  # what is compared: found, expected


def indexed(shapes: Shapes) -> dict[str, jax.Array]:
    """Whole numbers, whose scores are exact in any order of the sum, and often equal; padding, then two sequences."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.integers(-2, 3, shape), shapes.dtype)
    batch, queries, keys = shapes.batch, shapes.queries, shapes.keys
    (heads, channels), place = shapes.index, np.arange(keys, dtype=np.int32)
    segments = np.where(place < 7, 0, 1 + place // (keys - queries // 2)).astype(np.int32)
    k_positions, k_segments = (jnp.asarray(np.tile(x, (batch, 1))) for x in (place, segments))
    return {"q_BTIC": draw(batch, queries, heads, channels), "k_BSC": draw(batch, keys, channels),
            "w_BTI": draw(batch, queries, heads).astype(jnp.float32),
            "q_positions": k_positions[:, keys - queries:], "k_positions": k_positions,
            "q_segments": k_segments[:, keys - queries:], "k_segments": k_segments}


def selected(shapes: Shapes, queries: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, latent rows, and for each query distinct keys in any order, a fifth of them missing."""
    rng = np.random.default_rng(1)
    order = np.stack([rng.permutation(shapes.keys)[:shapes.top_k] for _ in range(shapes.batch * queries)])
    order = np.where(rng.random(order.shape) < 0.2, -1, order).reshape(shapes.batch, queries, shapes.top_k)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32)).astype(shapes.dtype)
    return (draw(shapes.batch, queries, shapes.heads, shapes.rank), draw(shapes.batch, shapes.keys, shapes.rank),
            jnp.asarray(order, jnp.int32))


def with_gradients(fn: Operation, names: str, *args: jax.Array) -> dict[str, Any]:
    """The results, and the gradients by all arguments, of cotangents that are drawn."""
    def program(*args: jax.Array) -> dict[str, Any]:
        out, pull = jax.vjp(fn, *args)
        draw = lambda number, x: jax.random.normal(jax.random.key(number), x.shape).astype(x.dtype)
        cotangents = [draw(number, x) for number, x in enumerate(jax.tree.leaves(out))]
        gradients = pull(jax.tree.unflatten(jax.tree.structure(out), cotangents))
        return {"forward": out} | {f"gradient of {name}": g for name, g in zip(names.split(), gradients)}

    return jax.jit(program)(*args)


def index_scores(shapes: Shapes, options: dict[str, Any]) -> Results:
    case = indexed(shapes)
    floating = [case.pop(name) for name in ("q_BTIC", "k_BSC", "w_BTI")]
    fn = functools.partial(pallas_kernels.index_scores, **case, scale=0.5)
    return _pairs(lambda **chosen: with_gradients(functools.partial(fn, **chosen), "q k w", *floating), options)


def select_topk(shapes: Shapes, options: dict[str, Any]) -> Results:
    fn = functools.partial(pallas_kernels.select_topk, **indexed(shapes), scale=0.5, top_k=shapes.top_k)
    return _pairs(lambda **chosen: {"indices": fn(**chosen)}, options)


def sparse_mla(shapes: Shapes, options: dict[str, Any]) -> Results:
    q, kv, indices = selected(shapes, shapes.queries)
    indices = indices.at[0, shapes.queries // 2].set(-1)  # a query without keys
    fn = functools.partial(pallas_kernels.sparse_mla, indices_BTK=indices, scale=256 ** -0.5,
                           value_dim=shapes.value_dim, return_lse=True)
    outcome = lambda **chosen: with_gradients(functools.partial(fn, **chosen), "q kv", q, kv)
    found = _pairs(outcome, options)
    in_any_order = outcome(deterministic=False, **options)
    return found | {f"{name}, any order": (in_any_order[name], expected) for name, (_, expected) in found.items()
                    if name != "forward"}


def sparse_mla_decode(shapes: Shapes, options: dict[str, Any]) -> Results:
    """One sequence is cut short, a second one empty."""
    q, kv, indices = selected(shapes, 1)
    lengths = jnp.asarray([shapes.keys - 5, 0][:shapes.batch], jnp.int32)
    fn = functools.partial(pallas_kernels.sparse_mla_decode, q[:, 0], kv, indices[:, 0], lengths, scale=256 ** -0.5,
                           value_dim=shapes.value_dim)
    return _pairs(lambda **chosen: {"forward": fn(**chosen)}, options)


def grouped_matmul(shapes: Shapes, options: dict[str, Any]) -> Results:
    """By Zipf's law, with an empty group, and rows beyond the groups."""
    rows, groups, depth, width = shapes.grouped
    rng = np.random.default_rng(2)
    share = 1 / np.arange(1, groups + 1)
    share[groups // 2] = 0
    sizes = jnp.asarray(rng.multinomial(rows - 3, share / share.sum()), jnp.int32)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32)).astype(shapes.dtype)
    x, w = draw(rows, depth), draw(groups, depth, width)

    def outcome(**chosen: Any) -> dict[str, Any]:
        return with_gradients(lambda x, w: pallas_kernels.grouped_matmul(x, w, sizes, **chosen), "x w", x, w)

    return _pairs(outcome, options)


KERNELS: dict[str, Callable[[Shapes, dict[str, Any]], Results]] = {
    fn.__name__: fn for fn in (index_scores, select_topk, sparse_mla, sparse_mla_decode, grouped_matmul)}


def _pairs(outcome: Callable[..., dict[str, Any]], options: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    # `full` and `del` at once: what is allocated next is likely to lie where the NaN are.
    jax.block_until_ready(jnp.full(POISON // 4, jnp.nan)).delete()
    found, expected = outcome(**options), outcome(implementation="reference")
    return {name: (found[name], expected[name]) for name in expected}


@jax.jit
def _apart(found: jax.Array, expected: jax.Array) -> jax.Array:
    """The norm of the difference over that of what is expected; infinite where non-finite values differ."""
    found, expected = found.astype(jnp.float32), expected.astype(jnp.float32)
    finite = jnp.isfinite(expected)
    difference, whole = (jnp.linalg.norm(jnp.where(finite, x, 0).reshape(-1)) for x in (found - expected, expected))
    return jnp.where(jnp.where(finite, True, found == expected).all(), difference / jnp.maximum(whole, 1e-30), jnp.inf)


def compared(kernel: str, shapes: Shapes, options: dict[str, Any]) -> dict[str, Any]:
    """{result: relative error} of one kernel; indices have to be equal. "failed" says what is wrong, if anything."""
    try:
        results = KERNELS[kernel](shapes, options)
        errors = {name: max(float(_apart(*pair)) for pair in zip(*map(jax.tree.leaves, both)))
                  for name, both in results.items()}
    except Exception as error:  # whatever a compiler or a device raises: the other kernels are still of use
        return {"failed": f"{type(error).__name__}: {error}"[:400]}
    allowed = {name: 0.0 if name == "indices" else TOLERANCE[shapes.dtype] for name in errors}
    wrong = [f"{name}: expected within {allowed[name]:g} of the reference, found {error:.1e}"
             for name, error in errors.items() if not error <= allowed[name]]
    return errors | ({"failed": "; ".join(wrong)} if wrong else {})


def check(kernels: Iterable[str], shapes: tuple[Shapes, ...], options: dict[str, Any]) -> dict[str, Any]:
    """{kernel: {shape: errors}}, printed as they come."""
    record: dict[str, Any] = {}
    for kernel in kernels:
        record[kernel] = {}
        for one in shapes:
            record[kernel][f"{one.name} {one.dtype}"] = found = compared(kernel, one, options)
            said = found.get("failed") or ", ".join(f"{name} {error:.1e}" for name, error in found.items())
            print(f"  {kernel:18} {one.name:5} {one.dtype:8} {'WRONG ' if 'failed' in found else ''}{said}", flush=True)
    return record
