"""The lightning indexer: the scores of keys, and the exact selection of the best.

The selection contract, for every implementation: a key is visible to a query if both are of the same segment, the
segment is not 0, and the key's position is not after the query's. The `top_k` largest scores among the visible keys are
selected; of equal scores the lowest index wins; +0.0 equals -0.0; a NaN score is not visible. The result is int32:
valid key indices ascending, then -1.

B batch, T query positions, S key positions, I indexer heads, C channels per head.
"""

import functools
from typing import Any, Callable

import jax
from jax import lax
from jax.experimental import checkify
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.arguments import Argument, check, check_same_dtype
from pallas_kernels.lightning_indexer import pallas_gpu, pallas_tpu, reference, vjp, xla


def index_scores(q_BTIC: jax.Array, k_BSC: jax.Array, w_BTI: jax.Array, *, scale: float, q_positions: jax.Array,
                 k_positions: jax.Array, q_segments: jax.Array, k_segments: jax.Array,
                 implementation: str | None = None, interpret: Any = False, checks: bool = False) -> jax.Array:
    """I[t,s] = scale * sum_i w[t,i] relu(q[t,i] . k[s]), float32 [B, T, S], -inf where s is not visible to t.

    DeepSeek-V3.2 report, equation 1. Products accumulate in float32. A visible score is at least the lowest finite
    float32, so that -inf says one thing only; a NaN stays NaN. Differentiable in q, k and w.

    q_BTIC, k_BSC: floating, of one dtype. w_BTI: floating, of any sign. `scale`: positive. q_positions, q_segments:
    integer [B, T]; k_positions, k_segments: integer [B, S]; segment 0 is padding.

    `implementation`: a name of `dispatch.IMPLEMENTATIONS`, or None for the one that `dispatch.explain` tells.
    `interpret=True` runs a Pallas implementation by interpretation, on any platform. `checks=True` makes a NaN in q, k
    or w an error, by `jax.experimental.checkify`: raised at once when called eagerly; under `jit` wrap the whole
    function in `checkify.checkify`.

    Raises ValueError for a wrong rank, shape or dtype, and NotImplementedError where the named implementation cannot
    run.
    """
    arrays = (q_BTIC, k_BSC, w_BTI, q_positions, k_positions, q_segments, k_segments)
    _check("index_scores", *arrays, checks=checks)
    return _index_scores(*arrays, scale=float(scale), implementation=implementation, interpret=interpret)


def select_topk(q_BTIC: jax.Array, k_BSC: jax.Array, w_BTI: jax.Array, *, scale: float, q_positions: jax.Array,
                k_positions: jax.Array, q_segments: jax.Array, k_segments: jax.Array, top_k: int,
                implementation: str | None = None, interpret: Any = False, checks: bool = False) -> jax.Array:
    """The `top_k` keys of each query by the contract above, int32 [B, T, top_k].

    Arguments as of `index_scores`; `top_k` may exceed S. Memory beyond the result is that of one block of queries.
    A selection has no gradient.
    """
    arrays = (q_BTIC, k_BSC, w_BTI, q_positions, k_positions, q_segments, k_segments)
    _check("select_topk", *arrays, checks=checks)
    if top_k < 1:
        raise ValueError(f"select_topk: top_k: expected at least 1, found {top_k}")
    return _select_topk(*lax.stop_gradient(arrays), scale=float(scale), top_k=top_k, implementation=implementation,
                        interpret=interpret)


@functools.partial(jax.jit, static_argnames=("scale", "implementation", "interpret"))
def _index_scores(*arrays: jax.Array, scale: float, implementation: str | None, interpret: Any) -> jax.Array:
    kernels = {"reference": reference.index_scores, "xla": xla.index_scores,
               "pallas_tpu": pallas_tpu.index_scores, "pallas_gpu": pallas_gpu.index_scores}
    call: Callable[..., jax.Array] = functools.partial(
        dispatch.call, "index_scores", dispatch.bind(kernels, interpret, scale=scale), shapes=_shapes(*arrays),
        implementation=implementation, interpret=interpret)
    if implementation != "reference":  # which is left to autodiff
        call = vjp.differentiable(call, scale)
    return call(*arrays)


@functools.partial(jax.jit, static_argnames=("scale", "top_k", "implementation", "interpret"))
def _select_topk(*arrays: jax.Array, scale: float, top_k: int, implementation: str | None,
                 interpret: Any) -> jax.Array:
    kernels = {"reference": reference.select_topk, "xla": xla.select_topk,
               "pallas_tpu": pallas_tpu.select_topk, "pallas_gpu": pallas_gpu.select_topk}
    return dispatch.call("select_topk", dispatch.bind(kernels, interpret, scale=scale, top_k=top_k), *arrays,
                         shapes=_shapes(*arrays) | {"top_k": (top_k,)}, implementation=implementation,
                         interpret=interpret)


def _shapes(q: jax.Array, k: jax.Array, w: jax.Array, *_: jax.Array) -> dict[str, tuple[int, ...]]:
    return {"q_BTIC": q.shape, "k_BSC": k.shape, "w_BTI": w.shape}


def _check(op: str, q: jax.Array, k: jax.Array, w: jax.Array, q_positions: jax.Array, k_positions: jax.Array,
           q_segments: jax.Array, k_segments: jax.Array, *, checks: bool) -> None:
    check(op, Argument("q_BTIC", q, "BTIC"), Argument("k_BSC", k, "BSC"), Argument("w_BTI", w, "BTI"),
          Argument("q_positions", q_positions, "BT", jnp.integer),
          Argument("k_positions", k_positions, "BS", jnp.integer),
          Argument("q_segments", q_segments, "BT", jnp.integer), Argument("k_segments", k_segments, "BS", jnp.integer))
    check_same_dtype(op, "k_BSC", k, "q_BTIC", q)
    if checks:
        for name, array in (("q_BTIC", q), ("k_BSC", k), ("w_BTI", w)):
            checkify.check(~jnp.isnan(array).any(), f"{op}: {name}: expected numbers, found NaN")
