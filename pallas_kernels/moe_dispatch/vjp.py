"""The gradient of the grouped product: two more grouped products.

N rows, K and M their widths before and after, E groups.
"""

from typing import Any, Callable, NamedTuple

import jax


class Products(NamedTuple):
    """The three products an implementation offers, each of (rows, rows or matrices, group sizes)."""

    product: Callable[..., jax.Array]             # x_NK, w_EKM -> [N, M]
    product_transposed: Callable[..., jax.Array]  # y_NM, w_EKM -> [N, K]
    outer: Callable[..., jax.Array]               # x_NK, y_NM -> [E, K, M], added up in float32


def differentiable(products: Products) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """`products.product`, differentiable in the rows and the matrices; group sizes have no gradient."""
    @jax.custom_vjp
    def grouped(x_NK: jax.Array, w_EKM: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
        return products.product(x_NK, w_EKM, group_sizes_E)

    def forward(x_NK: jax.Array, w_EKM: jax.Array, group_sizes_E: jax.Array) -> tuple[jax.Array, Any]:
        return grouped(x_NK, w_EKM, group_sizes_E), (x_NK, w_EKM, group_sizes_E)

    def backward(saved: Any, dy_NM: jax.Array) -> tuple[jax.Array, jax.Array, None]:
        x_NK, w_EKM, group_sizes_E = saved
        return (products.product_transposed(dy_NM, w_EKM, group_sizes_E),
                products.outer(x_NK, dy_NM, group_sizes_E), None)

    grouped.defvjp(forward, backward)
    return grouped
