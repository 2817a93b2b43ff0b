"""Arrays filled piece by piece: the same on any sharding, and only what falls into a shard is asked for."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from glm5_jax.checkpoint import streaming
from glm5_jax.core.mesh import make_mesh

VALUES = np.arange(3 * 8 * 2 * 4, dtype=np.float32).reshape(3, 8, 2, 4)
SPECS = [P(), P(None, "data"), P(None, None, "tensor", "data"), P(None, ("data", "tensor")),
         P(None, None, None, "data")]


def pieces(asked=None):
    """Cut by the two leading indices, as layers and experts are."""
    def within(bounds):
        if asked is not None:
            asked.append(bounds)
        for i in range(*bounds[0]):
            for j in range(*bounds[1]):
                rest = tuple(slice(*bound) for bound in bounds[2:])
                yield (i - bounds[0][0], j - bounds[1][0]), VALUES[i, j][rest]
    return within


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_assembled_on_a_mesh_and_taken_apart(spec):
    sharding = NamedSharding(make_mesh(data=4, tensor=2), spec)
    asked: list = []
    array = streaming.assemble(VALUES.shape, np.float32, sharding, pieces(asked))
    assert array.sharding == sharding and len(asked) == len(set(asked))
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(shard.data, VALUES[shard.index])
    for index in [(0, 0), (2, 3), (1,), ()]:
        found = streaming.to_host(array, index)
        assert type(found) is np.ndarray
        np.testing.assert_array_equal(found, VALUES[index])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_ways_of_filling_agree(dtype):
    bounds = tuple((0, size) for size in VALUES.shape)
    for fill in (streaming.fill_in_place, streaming.fill_on_device):
        array = fill(VALUES.shape, dtype, jax.devices()[3], pieces()(bounds))
        assert array.dtype == dtype and array.devices() == {jax.devices()[3]}
        np.testing.assert_array_equal(array, VALUES.astype(dtype))


def test_filled_memory_is_taken_over_without_a_copy(monkeypatch):
    """On a CPU the array is the memory that was filled: nothing is held twice."""
    made = []
    empty = np.empty
    monkeypatch.setattr(streaming.np, "empty", lambda *shape: made.append(empty(*shape)) or made[-1])
    array = streaming.fill_in_place(VALUES.shape, np.float32, jax.devices()[0], [((), VALUES)])
    first = made[0].ctypes.data
    assert first <= array.unsafe_buffer_pointer() < first + 64


def test_arrays_of_numpy_are_taken_apart_too():
    np.testing.assert_array_equal(streaming.to_host(VALUES, (1, 2)), VALUES[1, 2])
