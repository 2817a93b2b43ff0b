"""Arrays that are filled piece by piece into their sharding, and read back piece by piece.

The host never holds a stacked parameter beside the result: 75 layers of 256 experts are one array, and half a terabyte.
"""

import functools
import math
from typing import Any, Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

Bounds = tuple[tuple[int, int], ...]  # first and end of each dimension
Pieces = Callable[[Bounds], Iterable[tuple[tuple[int, ...], np.ndarray]]]


def assemble(shape: tuple[int, ...], dtype: Any, sharding: jax.sharding.Sharding, pieces: Pieces) -> jax.Array:
    """The array of which `pieces(bounds)` yields what falls into `bounds`: leading indices, relative to the bounds,
    and the values there, in any dtype.

    Each process fills the shards of its own devices, one after the other.
    """
    made: dict[Bounds, jax.Array] = {}
    shards = []
    device: Any
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(entry.indices(size)[:2] for entry, size in zip(index or (slice(None),) * len(shape), shape))
        if bounds in made:
            shards.append(jax.device_put(made[bounds], device))
            continue
        local = tuple(end - first for first, end in bounds)
        fill = fill_in_place if device.platform == "cpu" else fill_on_device
        made[bounds] = fill(local, dtype, device, pieces(bounds))
        shards.append(made[bounds])
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def fill_in_place(shape: tuple[int, ...], dtype: Any, device: Any,
                  pieces: Iterable[tuple[tuple[int, ...], np.ndarray]]) -> jax.Array:
    """Fills memory of the host that a CPU device then takes over: jax copies nothing that lies on 64 bytes."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    buffer = raw[start:start + nbytes].view(dtype).reshape(shape)
    for index, values in pieces:
        buffer[index] = values
    return jax.device_put(buffer, device)


def fill_on_device(shape: tuple[int, ...], dtype: Any, device: Any,
                   pieces: Iterable[tuple[tuple[int, ...], np.ndarray]]) -> jax.Array:
    """Fills memory of the device; the host holds one piece at a time."""
    array = jnp.zeros(shape, dtype, device=device)
    for index, values in pieces:
        piece = jax.device_put(values.astype(dtype).reshape((1,) * len(index) + values.shape), device)
        array = _put(array, piece, (*index, *(0,) * values.ndim))
        array.block_until_ready()  # else pieces queue up on the host
    return array


@functools.partial(jax.jit, donate_argnums=0)
def _put(array: jax.Array, piece: jax.Array, start: tuple[int, ...]) -> jax.Array:
    return jax.lax.dynamic_update_slice(array, piece, start)


def to_host(leaf: Any, index: tuple[int, ...]) -> np.ndarray:
    """`leaf[index]` in the memory of the host, and no more of the leaf than that.

    Where other processes hold parts of the leaf, all of them must make this call, and all get the values.
    """
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf)[index]
    if not leaf.is_fully_addressable:
        mesh = leaf.sharding.mesh  # type: ignore[attr-defined]
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        return np.asarray(_take(whole)(leaf, index).addressable_data(0))
    parts = {}
    for shard in leaf.addressable_shards:
        bounds = tuple(entry.indices(size)[:2] for entry, size in zip(shard.index, leaf.shape))
        if bounds not in parts and all(first <= i < end for i, (first, end) in zip(index, bounds)):
            own = tuple(i - first for i, (first, _) in zip(index, bounds))
            # The memory of a CPU device can be looked at; elsewhere the piece is cut out before it travels.
            parts[bounds] = np.asarray(shard.data)[own] if shard.device.platform == "cpu" else np.asarray(
                shard.data[own])
    if len(parts) == 1:
        return next(iter(parts.values()))
    out = np.empty(leaf.shape[len(index):], leaf.dtype)
    for bounds, values in parts.items():
        out[tuple(slice(*bound) for bound in bounds[len(index):])] = values
    return out


@functools.lru_cache(maxsize=None)
def _take(sharding: jax.sharding.Sharding) -> Callable[..., jax.Array]:
    return jax.jit(lambda leaf, index: leaf[index], out_shardings=sharding)
