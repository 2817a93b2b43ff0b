"""Tile sizes: their records, the tuned values of `blocks.json`, and the walk over blocks of queries.

B batch, T query positions.
"""

import functools
from importlib import resources
import json
from typing import Any, Callable, Mapping, NamedTuple, TypeVar

import jax
from jax import lax
import jax.numpy as jnp

FILE = "blocks.json"

Record = TypeVar("Record", bound=tuple)


class Tiles(NamedTuple):
    """Queries and keys of one step of a kernel's grid."""

    queries: int
    keys: int


class SelectionBlocks(NamedTuple):
    """How the selection is cut up in XLA's operations; [queries, S] float32 is the largest buffer.

    What a CPU computes in one step has to stay within its cache.
    """

    queries: int  # that score and select together
    scored_keys: int  # whose scores a CPU computes in one step
    bisected_scores: int  # that a CPU bisects in one step


class AttentionBlocks(NamedTuple):
    """How sparse attention is cut up in XLA's operations.

    A step of a CPU has to stay within its cache (measured: one query's 2,048 rows at a time are 4 times as fast as 64
    queries'), one sequence after the other; a step of an accelerator has to fill it.
    """

    gathered_bytes: int  # of the rows gathered in one step
    logits_bytes: int  # of the float32 logits of one step of masked dense attention
    dense_up_to: int  # masked dense attention is cheaper while S is at most this many times K
    whole_batch: bool  # all sequences in one step
    ordered_scatter: bool  # equal indices of one scatter are added in a fixed order
    gathered_as_bits: bool  # rows of 16 bits are gathered as integers: else a CPU widens all of them, then gathers
    float32_dense: bool  # masked dense products in float32: jaxlib 0.7 has no bfloat16 one of that form for a CPU


def tuned(record: type[Record], op: str, implementation: str, shapes: str = "all") -> Record:
    """The values of `blocks.json` for an operation, its implementation and a class of shapes, as a `record`.

    Raises ValueError naming the entry or its field where one is missing, unknown, or of another kind than the record's.
    """
    place = f"{FILE}: {op}, {implementation}, {shapes}"
    found = _entries().get(op, {}).get(implementation, {}).get(shapes)
    if found is None:
        raise ValueError(f"{place}: expected an entry, found none")
    kinds = record.__annotations__
    if wrong := sorted(found.keys() ^ kinds.keys()):
        raise ValueError(f"{place}: {wrong[0]}: expected the fields {', '.join(kinds)}, found {', '.join(found)}")
    return record(**{field: _checked(f"{place}: {field}", kind, found[field]) for field, kind in kinds.items()})


@functools.cache
def _entries() -> Mapping[str, Any]:
    return json.loads((resources.files("pallas_kernels") / FILE).read_text(encoding="utf-8"))


def _checked(place: str, kind: Any, value: Any) -> Any:
    positive = lambda x: type(x) is int and x > 0
    if kind is bool and type(value) is bool or kind is int and positive(value):
        return value
    if kind == tuple[int, ...] and isinstance(value, list) and all(map(positive, value)):
        return tuple(value)
    what = {bool: "true or false", int: "a positive integer"}.get(kind, "a list of positive integers")
    raise ValueError(f"{place}: expected {what}, found {value!r}")


def over_queries(fn: Callable[..., Any], size: int, *args: Any, axis: int = 1) -> Any:
    """`fn(*args)` over blocks of `size` queries, which are `axis` of every array of `args` and of the result.

    A checkpoint each: what does not depend on the weights, such as who sees whom, would else be kept for all blocks at
    once where a layer is differentiated.
    """
    length = jax.tree.leaves(args)[0].shape[axis]
    if length <= size:
        return fn(*args)
    out = lax.map(lambda block: jax.checkpoint(fn)(*block), split(args, size, axis))
    return merge(out, length, axis)


def split(tree: Any, size: int, axis: int = 0) -> Any:
    """Every array in blocks of at most `size` along `axis`, the number of the block first.

    The last block is filled up with zeros, or -1 in integer arrays: no segment, no selected key.
    """
    def one(x: jax.Array) -> jax.Array:
        *before, length = x.shape[:axis + 1]
        each = max(1, min(size, length))
        count = -(-length // each)
        widths = [(0, 0)] * axis + [(0, count * each - length)] + [(0, 0)] * (x.ndim - axis - 1)
        x = jnp.pad(x, widths, constant_values=-1 if jnp.issubdtype(x.dtype, jnp.integer) else 0)
        return jnp.moveaxis(x.reshape(*before, count, each, *x.shape[axis + 1:]), axis, 0)

    return jax.tree.map(one, tree)


def merge(tree: Any, length: int, axis: int = 0) -> Any:
    """The inverse of `split`."""
    def one(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, axis)
        x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2:])
        return lax.slice_in_dim(x, 0, length, axis=axis)

    return jax.tree.map(one, tree)
