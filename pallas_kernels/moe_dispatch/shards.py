"""Arrays inside `shard_map`, whose types say over which mesh axes they vary.

jax checks that a loop's carry, a kernel's result and a custom gradient vary as declared. Outside `shard_map` nothing
varies, and these functions change nothing.
"""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp


def axes_of(*arrays: jax.Array) -> frozenset[str]:
    """The mesh axes over which any of the arrays varies."""
    types = [jax.typeof(array) for array in arrays]
    # jax 0.7 keeps the axes in `vma`.
    return frozenset().union(*(kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma
                               for kind in types))


def vary(axes: frozenset[str], array: jax.Array) -> jax.Array:
    """The array, as one that varies over the axes too; its gradient is then summed over those it did not vary over."""
    missing = tuple(sorted(axes - axes_of(array)))
    if not missing:
        return array
    if hasattr(lax, "pcast"):
        return lax.pcast(array, missing, to="varying")
    return getattr(lax, "pvary")(array, missing)  # jax 0.7


def zeros(shape: tuple[int, ...], dtype: Any, like: jax.Array) -> jax.Array:
    """Zeros that vary as `like` does."""
    return vary(axes_of(like), jnp.zeros(shape, dtype))


def result(shape: tuple[int, ...], dtype: Any, like: jax.Array) -> jax.ShapeDtypeStruct:
    """The result of a kernel, one that varies as `like` does."""
    kind = jax.typeof(like)
    if hasattr(kind, "manual_axis_type"):
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind.manual_axis_type)
    return jax.ShapeDtypeStruct(shape, dtype, **{"vma": kind.vma})  # jax 0.7
