"""Block sizes by target platform, and the walk over blocks of queries.

B batch, T query positions.
"""

from typing import Any, Callable, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

# Queries that score and select together: [queries, S] float32 is the largest buffer.
SELECTION_QUERIES = 64


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
    float32_dense: bool  # masked dense products in float32: jaxlib 0.7 has no bfloat16 one of that form for a CPU


CPU = AttentionBlocks(1 << 22, 1 << 23, 2, whole_batch=False, ordered_scatter=True, float32_dense=True)
TPU = AttentionBlocks(1 << 28, 1 << 28, 4, whole_batch=True, ordered_scatter=True, float32_dense=False)
GPU = AttentionBlocks(1 << 28, 1 << 28, 4, whole_batch=True, ordered_scatter=False, float32_dense=False)


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
