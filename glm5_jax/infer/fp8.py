"""FP8 rollout weights: e4m3 with one float32 scale per block of 128 x 128, as in the FP8 release, made at every push.

`Fp8` stands in the tree where an array stood. Layers read their weights by `astype`, so that inside the scan over
layers one layer at a time is turned back; at rest a weight takes one byte. What is quantised is what the release
quantises: the matrices inside layers, but neither router nor the indexer's head weights.
"""

import functools
import math
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from glm5_jax.core.fp8 import BLOCK, E4M3, LARGEST
from glm5_jax.core.params import is_spec, ParamSpec, path_name
from glm5_jax.model.config import ModelConfig
from glm5_jax.model.transformer import param_specs


class Fp8(struct.PyTreeNode):
    """A stack of matrices: the last `columns` axes are a matrix's columns, the `rows` axes before them its rows."""

    values: jax.Array  # e4m3, in the shape of the weight
    scale: jax.Array   # float32 [..., row blocks, column blocks]
    rows: int = struct.field(pytree_node=False)
    columns: int = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def astype(self, dtype: Any) -> jax.Array:
        """The weight in `dtype`: e4m3 times scale, rounded once."""
        folded = _folded(self.values, self.rows, self.columns)
        return (folded.astype(jnp.float32) * _spread(self.scale, folded.shape)).astype(dtype).reshape(self.shape)


def quantised(config: ModelConfig, params: Any) -> tuple[Any, jax.Array]:
    """The parameters with `Fp8` in the place of every matrix that is quantised, and the root mean square error of these
    over their own root mean square, float32 []."""
    # An argument, since a division by a constant is compiled to a product with its reciprocal: one bit away.
    return _quantised(config, params, LARGEST)


@functools.partial(jax.jit, static_argnums=0)
def _quantised(config: ModelConfig, params: Any, limit: jax.Array) -> tuple[Any, jax.Array]:
    square_error, square = jnp.zeros(()), jnp.zeros(())

    def leaf(path: Any, spec: ParamSpec, weight: jax.Array) -> Any:
        nonlocal square_error, square
        if not is_quantised(path_name(path), spec):
            return weight
        packed = _quantise(weight, *_matrix_axes(spec), limit)
        exact = weight.astype(jnp.float32)
        square_error += jnp.square(packed.astype(jnp.float32) - exact).sum()
        square += jnp.square(exact).sum()
        return packed

    specs = param_specs(config)
    packed = jax.tree_util.tree_map_with_path(leaf, specs, {name: params[name] for name in specs}, is_leaf=is_spec)
    return params | packed, jnp.sqrt(square_error / jnp.maximum(square, jnp.finfo(jnp.float32).tiny))


def is_quantised(name: str, spec: ParamSpec) -> bool:
    """Whether the parameter, `layers/0/attention/q_a`, is a matrix that the FP8 release holds in e4m3."""
    return (name.startswith(("layers/", "mtp/layer/")) and "matrix" in spec.tags and "router" not in spec.tags
            and not name.endswith("indexer/weights"))


def _matrix_axes(spec: ParamSpec) -> tuple[int, int]:
    """How many axes are rows, and how many columns: heads and their channels belong together, layers and experts are
    stacked."""
    axes = [axis for axis in spec.axes if axis not in ("layers", "experts")]
    if len(axes) == 2:
        return 1, 1
    return (2, 1) if axes[1] == "head_dim" else (1, 2)


def _quantise(weight: jax.Array, rows: int, columns: int, limit: jax.Array) -> Fp8:
    """A scale is max|w| / 448 of its block, 1 where all is zero."""
    folded = _folded(weight, rows, columns).astype(jnp.float32)
    *stack, height, width = folded.shape
    room = [(0, 0)] * len(stack) + [(0, -size % step) for size, step in zip((height, width), BLOCK)]
    padded = jnp.pad(jnp.abs(folded), room)
    padded = padded.reshape(*stack, padded.shape[-2] // BLOCK[0], BLOCK[0], -1, BLOCK[1])
    largest = padded.max((-3, -1))
    scale = jnp.where(largest > 0, jnp.maximum(largest / limit, jnp.finfo(jnp.float32).tiny), 1)
    values = jnp.clip(folded / _spread(scale, folded.shape), -limit, limit).astype(E4M3)
    return Fp8(values.reshape(weight.shape), scale, rows, columns)


def _folded(x: jax.Array, rows: int, columns: int) -> jax.Array:
    """[..., rows, columns], one axis each."""
    stack, matrix = x.shape[:x.ndim - rows - columns], x.shape[x.ndim - rows - columns:]
    return x.reshape(*stack, math.prod(matrix[:rows]), math.prod(matrix[rows:]))


def _spread(scale: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The scale of every element."""
    wide = jnp.repeat(jnp.repeat(scale, BLOCK[0], -2), BLOCK[1], -1)
    return wide[..., :shape[-2], :shape[-1]]
