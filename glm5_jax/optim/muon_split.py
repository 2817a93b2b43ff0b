"""Muon: the update of a weight matrix is its momentum made orthogonal, block by block.

A block with gradient G keeps M <- mu M + G and moves along 0.2 sqrt(max(m, n)) NS(G + mu M), where NS takes every
singular value to about 1: the update then has a root mean square of about 0.2, as AdamW's tends to. Which blocks a
parameter has follows from the names of its axes: every layer of a stack and every expert is one and, in Muon Split,
every head of the up-projections (tag `head_split`). GLM-4.5 report, section 2.4; GLM-5 report, section 2.1; the scale
is that of arXiv 2502.16982.

Optax's own Muon flattens the batch of blocks, which gathers what is split over devices, and before 0.2.6 knows no
blocks at all: the momentum is Optax's, the orthogonalisation is here.
"""

import math
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from glm5_jax.core.params import ParamSpec

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
RMS = 0.2

_STACKED = ("layers", "experts")
_HEADS = ("heads", "index_heads")


class Blocks(NamedTuple):
    """How a parameter becomes [..., m, n]: its axes in `order` have the shape `split`, then merge into `shape`."""

    order: tuple[int, ...]
    split: tuple[int, ...]
    shape: tuple[int, ...]

    def take(self, x: jax.Array) -> jax.Array:
        return x.transpose(self.order).reshape(self.shape)

    def put(self, blocks: jax.Array) -> jax.Array:
        return blocks.reshape(self.split).transpose(np.argsort(self.order))


def blocks(spec: ParamSpec, *, split: bool) -> Blocks:
    """The blocks of a parameter; `split` makes one of each head where the tag `head_split` says that they are many.

    Heads that are not split are folded with the `head_dim` axis behind them. Raises ValueError where other than two
    axes are left to form the matrix.
    """
    apart = _STACKED + (_HEADS if split and "head_split" in spec.tags else ())
    batch = [i for i, name in enumerate(spec.axes) if name in apart]
    matrix = [i for i in range(len(spec.shape)) if i not in batch]
    sizes: list[int] = []
    for i in matrix:
        if i > 0 and i - 1 in matrix and spec.axes[i - 1] in _HEADS and spec.axes[i] == "head_dim":
            sizes[-1] *= spec.shape[i]
        else:
            sizes.append(spec.shape[i])
    if len(sizes) != 2:
        raise ValueError(f"Muon: expected two axes beside {' and '.join(apart)} (a head axis and the head_dim behind "
                         f"it are one), found {spec.axes} of shape {spec.shape}; name the axes so, or drop the tag "
                         f"'matrix'")
    order = (*batch, *matrix)
    return Blocks(order, tuple(spec.shape[i] for i in order), (*(spec.shape[i] for i in batch), *sizes))


def orthogonalise(x: jax.Array) -> jax.Array:
    """Newton-Schulz: each matrix of x [..., m, n] with its singular values taken to about 1, float32.

    Five steps of the quintic a x + (b A + c A^2) x, A = x x^T, reach 0.68 to 1.13 from every singular value above about
    a hundredth of the Frobenius norm; smaller ones fall short, and a matrix of zeros stays one.
    """
    a, b, c = COEFFICIENTS
    wide = x.shape[-2] <= x.shape[-1]
    x = x.astype(jnp.float32) if wide else x.astype(jnp.float32).mT  # the smaller product x x^T
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-8)

    def step(_: int, x: jax.Array) -> jax.Array:
        square = x @ x.mT
        return a * x + (b * square + c * (square @ square)) @ x

    x = lax.fori_loop(0, STEPS, step, x)
    return x if wide else x.mT


def scale_by_muon(specs: Any, *, split: bool, momentum: float = 0.95) -> optax.GradientTransformation:
    """Momentum (Nesterov, kept in float32), orthogonalised by block and scaled to a root mean square of about 0.2.

    `specs` is the tree of `ParamSpec` of the gradients; leaves that are `optax.MaskedNode` are passed over.
    """
    def update(gradient: Any, spec: ParamSpec) -> Any:
        if isinstance(gradient, optax.MaskedNode):
            return gradient
        of = blocks(spec, split=split)
        return of.put(RMS * math.sqrt(max(of.shape[-2:])) * orthogonalise(of.take(gradient)))

    def updates(gradients: Any, params: Any) -> Any:
        return jax.tree.map(update, gradients, specs, is_leaf=lambda x: isinstance(x, optax.MaskedNode))

    return optax.chain(optax.trace(momentum, nesterov=True, accumulator_dtype=jnp.float32), optax.stateless(updates))
