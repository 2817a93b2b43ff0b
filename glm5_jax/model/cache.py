"""What decoding remembers: latent rows and index keys per layer, where each row stands, the MTP layer's last inputs.

Slots of a row are filled in order, so that a slot's index is its rank among the row's tokens. Padding tokens (segment
0) take no slot. Nothing is assigned to inside: every function returns a new cache.

B batch, T new tokens, S slots, L layers, N layers with an indexer, R latent rank, C index channels, U unrolled MTP
steps.
"""

import dataclasses
from typing import Iterator

from flax import struct
import jax
from jax import lax
import jax.numpy as jnp

from glm5_jax.model.config import ModelConfig


class Cache(struct.PyTreeNode):
    """The MTP layer's step k is layer L+k-1 of `latents` and N+k-1 of `index_keys`; it lags the trunk by k tokens."""

    latents_LBSR: jax.Array
    index_keys_NBSC: jax.Array
    positions_BS: jax.Array      # int32
    segment_ids_BS: jax.Array    # int32, 0 where a slot is empty
    lengths_B: jax.Array         # int32
    mtp_segment_ids_UBS: jax.Array  # int32
    last_tokens_BU: jax.Array    # int32, the row's last U tokens
    last_hidden_BUD: jax.Array   # their trunk output after the final norm

    @property
    def max_len(self) -> int:
        return self.positions_BS.shape[1]


def init_cache(config: ModelConfig, batch: int, max_len: int, *, dtype: str | None = None) -> Cache:
    """An empty cache for `batch` rows of up to `max_len` tokens, its arrays in `dtype` (default: the config's)."""
    if batch < 1 or max_len < 1:
        raise ValueError(f"init_cache: expected batch and max_len of at least 1, found {batch} and {max_len}")
    cache_dtype = jnp.dtype(dtype or config.dtype)
    steps = config.mtp_unroll if config.num_nextn_predict_layers else 0
    layers, indexers = config.num_hidden_layers, config.indexer_types.count("full")
    return Cache(
        latents_LBSR=jnp.zeros((layers + steps, batch, max_len, config.latent_dim), cache_dtype),
        index_keys_NBSC=jnp.zeros((indexers + steps, batch, max_len, config.index_head_dim), cache_dtype),
        positions_BS=jnp.zeros((batch, max_len), jnp.int32),
        segment_ids_BS=jnp.zeros((batch, max_len), jnp.int32),
        lengths_B=jnp.zeros(batch, jnp.int32),
        mtp_segment_ids_UBS=jnp.zeros((steps, batch, max_len), jnp.int32),
        last_tokens_BU=jnp.zeros((batch, steps), jnp.int32),
        last_hidden_BUD=jnp.zeros((batch, steps, config.hidden_size), cache_dtype))


def take_row(cache: Cache, index: jax.Array) -> Cache:
    """One row as a cache of its own, of batch 1."""
    return Cache(**{name: lax.dynamic_slice_in_dim(x, index, 1, axis) for name, x, axis in _by_row(cache)})


def put_row(cache: Cache, index: jax.Array, one: Cache) -> Cache:
    """The cache with `one`, of batch 1, in the place of one row."""
    return Cache(**{name: lax.dynamic_update_slice_in_dim(x, getattr(one, name), index, axis)
                    for name, x, axis in _by_row(cache)})


def _by_row(cache: Cache) -> Iterator[tuple[str, jax.Array, int]]:
    """Every field and its axis of rows, which its suffix names."""
    for field in dataclasses.fields(cache):
        yield field.name, getattr(cache, field.name), field.name.rpartition("_")[2].index("B")


def put(slots_BS: jax.Array, index_BT: jax.Array, new_BT: jax.Array) -> jax.Array:
    """Writes `new` at the given slots of each row; a slot outside the cache is dropped."""
    return jax.vmap(lambda row, index, new: row.at[index].set(new.astype(row.dtype), mode="drop"))(
        slots_BS, index_BT, new_BT)


def put_layer(stack_LBSC: jax.Array, layer: jax.Array, index_BT: jax.Array, new_BTC: jax.Array) -> jax.Array:
    """Writes `new` into one layer of a stack, in place under jit."""
    rows = jnp.arange(index_BT.shape[0])[:, None]
    return stack_LBSC.at[layer, rows, index_BT].set(new_BTC.astype(stack_LBSC.dtype), mode="drop")


def ranks(real_BT: jax.Array) -> jax.Array:
    """How many real tokens stand before each position of its row, int32 [B, T]."""
    return jnp.cumsum(real_BT, 1, dtype=jnp.int32) - real_BT.astype(jnp.int32)
