"""Norms, rotary positions, gated feed-forward.

B batch, T query positions, D model width, F feed-forward width, C channels.
"""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from glm5_jax.core.params import ParamSpec
from glm5_jax.model.config import ModelConfig

Params = dict[str, Any]


def matrix(config: ModelConfig, shape: tuple[int, ...], axes: tuple[str | None, ...], *tags: str) -> ParamSpec:
    """The spec of a weight, drawn with the config's `initializer_range`."""
    return ParamSpec(shape, axes, config.param_dtype, "normal", config.initializer_range, frozenset({"matrix", *tags}))


def norm_scale(config: ModelConfig, size: int) -> ParamSpec:
    return ParamSpec((size,), ("norm",), config.param_dtype, "ones", tags=frozenset({"norm"}))


def bias(config: ModelConfig, size: int) -> ParamSpec:
    return ParamSpec((size,), ("norm",), config.param_dtype, "zeros", tags=frozenset({"bias"}))


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """scale * x / sqrt(mean(x^2) + eps) over the last axis, computed in float32, returned in the dtype of x."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + eps)
    return (x32 * scale.astype(jnp.float32)).astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, offset: jax.Array, eps: float) -> jax.Array:
    """LayerNorm over the last axis, computed and returned in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, -1, keepdims=True)
    x32 = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + eps)
    return x32 * scale.astype(jnp.float32) + offset.astype(jnp.float32)


def rope_table(positions_BT: jax.Array, dim: int, theta: float) -> jax.Array:
    """cos and sin of position * theta^(-2i/dim), float32 [2, B, T, dim/2]."""
    frequency = theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    angle = positions_BT.astype(jnp.float32)[..., None] * frequency
    return jnp.stack([jnp.cos(angle), jnp.sin(angle)])


def rotate(x: jax.Array, table: jax.Array) -> jax.Array:
    """Rotates the interleaved pairs (x_2i, x_2i+1) of the last axis; x [B, T, ..., dim], computed in float32."""
    cos, sin = (t.reshape(*t.shape[:2], *(1,) * (x.ndim - 3), t.shape[-1]) for t in table)
    even, odd = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return rotated.reshape(x.shape).astype(x.dtype)


def mlp_specs(config: ModelConfig, width: int) -> Params:
    """Specs of a gated feed-forward of the given width."""
    d = config.hidden_size
    return {"gate": matrix(config, (d, width), ("embed", "mlp")),
            "up": matrix(config, (d, width), ("embed", "mlp")),
            "down": matrix(config, (width, d), ("mlp", "embed"))}


def mlp(params: Params, x_BTD: jax.Array) -> jax.Array:
    """(silu(x Wg) * x Wu) Wd."""
    weight = lambda name: params[name].astype(x_BTD.dtype)
    return (jax.nn.silu(x_BTD @ weight("gate")) * (x_BTD @ weight("up"))) @ weight("down")
