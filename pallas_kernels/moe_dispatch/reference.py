"""Grouped products the plain way: every row times every matrix in float32, and of these the right one.

N rows, K and M their widths before and after, E groups.
"""

import jax
from jax import lax
import jax.numpy as jnp


def owners(group_sizes_E: jax.Array, rows: int) -> jax.Array:
    """bool [E, N]: which group a row belongs to, none for the rows beyond the sum."""
    ends_E = jnp.cumsum(group_sizes_E)[:, None]
    row_N = jnp.arange(rows)
    return (ends_E - group_sizes_E[:, None] <= row_N) & (row_N < ends_E)


def product(x_NK: jax.Array, w_EKM: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """out[n] = x[n] @ w[group of n], [N, M]; zero beyond the groups."""
    out = jnp.zeros((x_NK.shape[0], w_EKM.shape[2]), jnp.float32)
    for own_N, w_KM in zip(owners(group_sizes_E, x_NK.shape[0]), w_EKM):
        x = jnp.where(own_N[:, None], x_NK, 0).astype(jnp.float32)
        out += jnp.dot(x, w_KM.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    return out.astype(x_NK.dtype)


def product_transposed(y_NM: jax.Array, w_EKM: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """out[n] = y[n] @ w[group of n]^T, [N, K]; zero beyond the groups."""
    return product(y_NM, w_EKM.swapaxes(1, 2), group_sizes_E)


def outer(x_NK: jax.Array, y_NM: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """out[e] = sum over the rows n of group e of x[n]^T y[n], [E, K, M]."""
    out = []
    for own_N in owners(group_sizes_E, x_NK.shape[0]):
        x, y = (jnp.where(own_N[:, None], rows, 0).astype(jnp.float32) for rows in (x_NK, y_NM))
        out.append(jnp.dot(x.T, y, precision=lax.Precision.HIGHEST))
    return jnp.stack(out).astype(x_NK.dtype)
