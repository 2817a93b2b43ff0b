"""The gradient of the index scores, the same for every kernel: the scores anew, head by head, in XLA's operations."""

import functools
from typing import Any, Callable

import jax

from pallas_kernels.lightning_indexer import xla


def differentiable(scores: Callable[..., jax.Array], scale: float) -> Callable[..., jax.Array]:
    """`scores(q, k, w, q_positions, k_positions, q_segments, k_segments)` with a gradient by q, k and w."""
    wrapped = jax.custom_vjp(scores)
    exact = functools.partial(xla.index_scores, scale=scale)

    def forward(*args: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        return scores(*args), args

    def backward(args: tuple[jax.Array, ...], ct_BTS: jax.Array) -> tuple[Any, ...]:
        _, pull = jax.vjp(lambda *floats: exact(*floats, *args[3:]), *args[:3])
        return *pull(ct_BTS), None, None, None, None

    wrapped.defvjp(forward, backward)
    return wrapped
