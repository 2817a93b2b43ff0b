"""Absorbed multi-head latent attention over the keys that each query selected.

B batch, T query positions, S key positions, H heads, R latent rank, K keys selected.
"""

import functools
from typing import Any, Callable

import jax
from jax.experimental import checkify
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.arguments import Argument, check, check_same_dtype
from pallas_kernels.sparse_mla import pallas_gpu, pallas_tpu, reference, vjp, xla


def sparse_mla(q_BTHR: jax.Array, kv_BSR: jax.Array, indices_BTK: jax.Array, *, scale: float, value_dim: int,
               return_lse: bool = False, deterministic: bool = True, implementation: str | None = None,
               interpret: Any = False, checks: bool = False) -> Any:
    """softmax over the selected s of (scale * q[t,h] . kv[s]), times kv[s, :value_dim]: [B, T, H, value_dim].

    DeepSeek-V2 report, section 2.1 (absorbed form), over the keys of DeepSeek-V3.2's selection. The latent row of a key
    is shared by all heads; its first `value_dim` channels are the value. Logits, softmax and sums are float32, the
    result has the dtype of q. Differentiable in q and kv; what queries add to the gradient of one key is summed in
    float32. With `deterministic` that sum has the same bits in every run; without, a GPU may be faster.

    q_BTHR, kv_BSR: floating, of one dtype. indices_BTK: integer, the keys of each query, distinct, in any order; -1 (or
    anything outside [0, S)) selects nothing. A query without keys gives zeros and gets a gradient of zero.
    A NaN in a row that a query did not select does not reach it.

    `return_lse=True` returns also log sum exp of the logits, float32 [B, T, H], -inf for a query without keys; it is
    differentiable too, and p[t,h,s] = exp(scale * q[t,h] . kv[s] - lse[t,h]).

    `implementation`: a name of `dispatch.IMPLEMENTATIONS`, or None for the one that `dispatch.explain` tells.
    `interpret=True` runs a Pallas implementation by interpretation, on any platform. `checks=True` makes an index
    outside [-1, S) and a NaN in q or kv errors, by `jax.experimental.checkify`: raised at once when called eagerly;
    under `jit` wrap the whole function in `checkify.checkify`.

    Raises ValueError for a wrong rank, shape or dtype, and NotImplementedError where the named implementation cannot
    run.
    """
    sizes = check("sparse_mla", Argument("q_BTHR", q_BTHR, "BTHR"), Argument("kv_BSR", kv_BSR, "BSR"),
                  Argument("indices_BTK", indices_BTK, "BTK", jnp.integer))
    check_same_dtype("sparse_mla", "kv_BSR", kv_BSR, "q_BTHR", q_BTHR)
    if not 0 < value_dim <= sizes["R"]:
        raise ValueError(f"sparse_mla: value_dim: expected 1 to R = {sizes['R']}, found {value_dim}")
    inside_BTK = (indices_BTK >= 0) & (indices_BTK < sizes["S"])
    if checks:
        _check_values(q_BTHR, kv_BSR, indices_BTK, inside_BTK)

    out, lse_BTH = _sparse_mla(
        q_BTHR, kv_BSR, jnp.where(inside_BTK, indices_BTK, -1).astype(jnp.int32), scale=float(scale),
        value_dim=value_dim, deterministic=deterministic, implementation=implementation, interpret=interpret)
    return (out, lse_BTH) if return_lse else out


@functools.partial(jax.jit, static_argnames=("scale", "value_dim", "deterministic", "implementation", "interpret"))
def _sparse_mla(q_BTHR: jax.Array, kv_BSR: jax.Array, indices_BTK: jax.Array, *, scale: float, value_dim: int,
                deterministic: bool, implementation: str | None, interpret: Any) -> tuple[jax.Array, jax.Array]:
    forward: dict[str, Callable[..., Any]] = {
        "reference": reference.forward, "xla": xla.forward,
        "pallas_tpu": pallas_tpu.forward, "pallas_gpu": pallas_gpu.forward}
    backward: dict[str, Callable[..., Any]] = {
        "xla": xla.backward, "pallas_tpu": pallas_tpu.backward, "pallas_gpu": pallas_gpu.backward}
    choose = {"shapes": {"q_BTHR": q_BTHR.shape, "kv_BSR": kv_BSR.shape, "indices_BTK": indices_BTK.shape,
                         "value_dim": (value_dim,)},
              "implementation": implementation, "interpret": interpret}
    bind = functools.partial(dispatch.bind, interpret=interpret, scale=scale, value_dim=value_dim)
    attend: Callable[..., Any] = functools.partial(dispatch.call, "sparse_mla", bind(forward), **choose)
    if implementation != "reference":  # which is left to autodiff
        attend = vjp.differentiable(attend, functools.partial(
            dispatch.call, "sparse_mla_backward", bind(backward, deterministic=deterministic), **choose))
    return attend(q_BTHR, kv_BSR, indices_BTK)


def sparse_mla_decode(q_BHR: jax.Array, kv_BSR: jax.Array, indices_BK: jax.Array, lengths_B: jax.Array, *, scale: float,
                      value_dim: int, return_lse: bool = False, implementation: str | None = None,
                      interpret: Any = False, checks: bool = False) -> Any:
    """`sparse_mla` of one new token per sequence over a cache of which `lengths_B` rows are filled: [B, H, value_dim].

    lengths_B: integer, 0 to S; an index at or beyond it selects nothing, so what a cache holds there is never read. A
    sequence of length 0 gives zeros. Everything else as in `sparse_mla`; the log-sum-exp is [B, H].
    """
    check("sparse_mla_decode", Argument("q_BHR", q_BHR, "BHR"), Argument("kv_BSR", kv_BSR, "BSR"),
          Argument("indices_BK", indices_BK, "BK", jnp.integer), Argument("lengths_B", lengths_B, "B", jnp.integer))
    indices_BK = jnp.where(indices_BK < lengths_B[:, None], indices_BK, -1)
    found = sparse_mla(q_BHR[:, None], kv_BSR, indices_BK[:, None], scale=scale, value_dim=value_dim,
                       return_lse=return_lse, implementation=implementation, interpret=interpret, checks=checks)
    return jax.tree.map(lambda x: x[:, 0], found)


def _check_values(q: jax.Array, kv: jax.Array, indices: jax.Array, inside: jax.Array) -> None:
    checkify.check((inside | (indices == -1)).all(),
                   "sparse_mla: indices_BTK: expected -1 to S - 1, found {least} to {most}",
                   least=indices.min(), most=indices.max())
    for name, array in (("q_BTHR", q), ("kv_BSR", kv)):
        checkify.check(~jnp.isnan(array).any(), f"sparse_mla: {name}: expected numbers, found NaN")
