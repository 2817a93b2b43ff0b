"""The grouped product: rows sorted by group, each times the matrix of its group.

N rows, K and M their widths before and after, E groups.
"""

import functools
from typing import Any

import jax
from jax.experimental import checkify
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.arguments import Argument, check, check_same_dtype
from pallas_kernels.moe_dispatch import pallas_gpu, pallas_tpu, reference, vjp, xla
from pallas_kernels.moe_dispatch.shards import axes_of, vary, zeros


def grouped_matmul(x_NK: jax.Array, w_EKM: jax.Array, group_sizes_E: jax.Array, *, implementation: str | None = None,
                   interpret: Any = False, checks: bool = False) -> jax.Array:
    """out[n] = x[n] @ w[group of n], [N, M]: the first group_sizes[0] rows are of group 0, the next of group 1.

    Rows beyond the sum of the group sizes are zero, whatever x holds there, and so are their gradients. Differentiable
    in x and w; all sums are float32, the results have the dtype of x.

    x_NK, w_EKM: floating, of one dtype. group_sizes_E: integer, not negative, of a sum of at most N.

    `implementation`: a name of `dispatch.IMPLEMENTATIONS`, or None for the one that `dispatch.explain` tells.
    `interpret=True` runs a Pallas implementation by interpretation, on any platform. `checks=True` makes group sizes
    out of range, and a NaN in w or in a row of a group, an error, by `jax.experimental.checkify`: raised at once when
    called eagerly; under `jit` wrap the whole function in `checkify.checkify`.

    Raises ValueError for a wrong rank, shape or dtype, and NotImplementedError where the named implementation cannot
    run.
    """
    op = "grouped_matmul"
    sizes = check(op, Argument("x_NK", x_NK, "NK"), Argument("w_EKM", w_EKM, "EKM"),
                  Argument("group_sizes_E", group_sizes_E, "E", jnp.integer))
    check_same_dtype(op, "w_EKM", w_EKM, "x_NK", x_NK)
    arrays = [vary(axes_of(x_NK, w_EKM, group_sizes_E), array) for array in (x_NK, w_EKM, group_sizes_E)]
    if checks:
        total = group_sizes_E.sum()
        checkify.check((group_sizes_E >= 0).all() & (total <= sizes["N"]), f"{op}: group_sizes_E: expected sizes of at "
                       f"least 0 and a sum of at most {sizes['N']}, found a sum of {{total}}", total=total)
        own = (jnp.arange(sizes["N"]) < total)[:, None]
        for name, array in (("x_NK", jnp.where(own, x_NK, 0)), ("w_EKM", w_EKM)):
            checkify.check(~jnp.isnan(array).any(), f"{op}: {name}: expected numbers, found NaN")
    if 0 in sizes.values():
        return zeros((sizes["N"], sizes["M"]), x_NK.dtype, arrays[0])

    def offered(name: str) -> Any:
        implementations = {
            "reference": getattr(reference, name), "xla": getattr(xla, name),
            "pallas_tpu": functools.partial(getattr(pallas_tpu, name), interpret=interpret),
            "pallas_gpu": functools.partial(getattr(pallas_gpu, name), interpret=interpret)}
        return functools.partial(dispatch.call, op, implementations, implementation=implementation, interpret=interpret,
                                 shapes={"x_NK": x_NK.shape, "w_EKM": w_EKM.shape})

    return vjp.differentiable(vjp.Products(*map(offered, vjp.Products._fields)))(*arrays)
