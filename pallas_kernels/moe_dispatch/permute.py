"""Tokens to rows sorted by expert, and rows back to tokens, weighted.

N tokens, A experts per token, E experts, R rows, D width.

Both ways, and both gradients, are gathers: rows take from tokens by `token_R`, tokens from rows by `rows_NA`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.arguments import Argument, check
from pallas_kernels.moe_dispatch.shards import axes_of, vary


class Permutation(NamedTuple):
    """Where the choices of every token lie among the rows, and whose choice each row is; no two share a row."""

    rows_NA: jax.Array  # int32, -1 for a choice that has no row
    token_R: jax.Array  # int32, -1 for a row that is nobody's


def sort_by_expert(experts_NA: jax.Array, experts: int) -> tuple[Permutation, jax.Array]:
    """The permutation that sorts all N * A choices by expert, and int32 [E], how many rows every expert gets.

    Stable: the rows of one expert keep the order of their tokens. A value of `experts_NA` below 0, or of `experts` and
    more, is a choice of no expert, such as padding's: it has no row, and the last rows are nobody's.
    """
    check("sort_by_expert", Argument("experts_NA", experts_NA, "NA", jnp.integer))
    expert = experts_NA.reshape(-1).astype(jnp.int32)
    real = (expert >= 0) & (expert < experts)
    expert = jnp.where(real, expert, experts)
    order = jnp.argsort(expert, stable=True).astype(jnp.int32)
    rows = jnp.zeros_like(order).at[order].set(jnp.arange(len(order), dtype=jnp.int32), unique_indices=True)
    counts = (expert[:, None] == jnp.arange(experts)).sum(0, dtype=jnp.int32)
    return Permutation(jnp.where(real, rows, -1).reshape(experts_NA.shape),
                       jnp.where(real[order], order // max(experts_NA.shape[1], 1), -1)), counts


def dispatch(x_ND: jax.Array, permutation: Permutation) -> jax.Array:
    """rows[r] = x[token of r], [R, D]; zero where the row is nobody's. Differentiable in x, added up in float32."""
    check("dispatch", Argument("x_ND", x_ND, "ND"), Argument("rows_NA", permutation.rows_NA, "NA", jnp.integer),
          Argument("token_R", permutation.token_R, "R", jnp.integer))
    return _dispatch(*_alike(x_ND, permutation))


def combine(y_RD: jax.Array, permutation: Permutation, weights_NA: jax.Array) -> jax.Array:
    """out[n] = sum over a of weights[n,a] y[row of n's choice a], [N, D]. Differentiable in y and the weights.

    Added up in float32, in the order of the choices, and returned in the dtype of y. A choice without a row adds
    nothing.
    """
    check("combine", Argument("y_RD", y_RD, "RD"), Argument("token_R", permutation.token_R, "R", jnp.integer),
          Argument("rows_NA", permutation.rows_NA, "NA", jnp.integer), Argument("weights_NA", weights_NA, "NA"))
    return _combine(*_alike(y_RD, permutation, weights_NA))


def _alike(*trees: Any) -> Any:
    axes = axes_of(*jax.tree.leaves(trees))
    return jax.tree.map(lambda array: vary(axes, array), trees)


def _taken(values: jax.Array, index: jax.Array) -> jax.Array:
    """values[index], zero where the index is -1, whatever the values are."""
    return jnp.where((index >= 0)[..., None], values[index], 0)


@jax.custom_vjp
def _dispatch(x_ND: jax.Array, permutation: Permutation) -> jax.Array:
    return _taken(x_ND, permutation.token_R)


def _dispatch_forward(x_ND: jax.Array, permutation: Permutation) -> tuple[jax.Array, Permutation]:
    return _dispatch(x_ND, permutation), permutation


def _dispatch_backward(permutation: Permutation, drows_RD: jax.Array) -> tuple[jax.Array, None]:
    return _taken(drows_RD, permutation.rows_NA).astype(jnp.float32).sum(1).astype(drows_RD.dtype), None


_dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def _combine(y_RD: jax.Array, permutation: Permutation, weights_NA: jax.Array) -> jax.Array:
    y_NAD = _taken(y_RD, permutation.rows_NA).astype(jnp.float32)
    return (y_NAD * weights_NA[..., None].astype(jnp.float32)).sum(1).astype(y_RD.dtype)


def _combine_forward(y_RD: jax.Array, permutation: Permutation, weights_NA: jax.Array) -> tuple[jax.Array, Any]:
    return _combine(y_RD, permutation, weights_NA), (y_RD, permutation, weights_NA)


def _combine_backward(saved: Any, dout_ND: jax.Array) -> tuple[jax.Array, None, jax.Array]:
    y_RD, permutation, weights_NA = saved
    rows_NA, token_R = permutation
    dout_ND = dout_ND.astype(jnp.float32)
    dweights_NA = (_taken(y_RD, rows_NA).astype(jnp.float32) * dout_ND[:, None]).sum(-1)
    rows = len(token_R)
    weights_R = jnp.zeros_like(token_R, dtype=jnp.float32).at[jnp.where(rows_NA >= 0, rows_NA, rows)].set(
        weights_NA.astype(jnp.float32), mode="drop")
    dy_RD = _taken(dout_ND, token_R) * weights_R[:, None]
    return dy_RD.astype(y_RD.dtype), None, dweights_NA.astype(weights_NA.dtype)


_combine.defvjp(_combine_forward, _combine_backward)
