"""The store: what comes back, what is never listed, what is refused, and that donating after a save is safe."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jax.sharding import PartitionSpec as P

from glm5_jax.checkpoint.store import Store
from glm5_jax.core import mesh


@struct.dataclass
class State:
    step: jax.Array
    params: dict
    moments: tuple


def example(value=1.0, width=4):
    return State(jnp.int32(7), {"a": {"w": jnp.full((8, width), value)}, "b": jnp.arange(3, dtype=jnp.bfloat16)},
                 (jnp.full((8, width), value / 2), jnp.int32(2)))


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_what_is_saved_comes_back(tmp_path):
    extra = {"batches": {"next": 12, "nested": [1, None, "é"]}}
    with Store(tmp_path / "checkpoints") as store:
        assert store.latest_step() is None
        store.save(3, example(), extra)
    with Store(tmp_path / "checkpoints") as store:
        state, found = store.restore(store.latest_step(), abstract(example(9.0)))
    equal(state, example())
    assert found == extra


def test_a_relative_directory_and_the_newest_two(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Store("checkpoints", keep=2) as store:
        for step in (1, 2, 10):
            store.save(step, example(float(step)), None)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["10", "2"]
    with Store("checkpoints") as store:
        assert store.latest_step() == 10
        equal(store.restore(2, abstract(example()))[0], example(2.0))


def test_a_half_written_checkpoint_is_never_listed(tmp_path):
    with Store(tmp_path) as store:
        store.save(3, example(), None)
    torn = tmp_path / "9.orbax-checkpoint-tmp-123"
    (torn / "state").mkdir(parents=True)
    with Store(tmp_path) as store:
        assert not torn.exists()
        assert store.latest_step() == 3
        store.save(9, example(4.0), None)
    with Store(tmp_path) as store:
        equal(store.restore(9, abstract(example()))[0], example(4.0))


def test_donating_right_after_a_save_does_not_reach_the_checkpoint(tmp_path):
    grow = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros((512, 1024))
    with Store(tmp_path, keep=3) as store:
        for step in (1, 2, 3):
            store.save(step, {"x": x}, None)
            for _ in range(5):
                x = grow(x)
    with Store(tmp_path) as store:
        for step in (1, 2, 3):
            found = np.asarray(store.restore(step, {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)}
                                             )[0]["x"])
            assert (found == 5.0 * (step - 1)).all()


def test_restored_onto_a_mesh(tmp_path):
    whole = example(3.0)
    with Store(tmp_path) as store:
        store.save(1, whole, None)
    place = lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=jax.NamedSharding(mesh.make_mesh(), P("data") if x.ndim == 2 else P()))
    with Store(tmp_path) as store:
        state, _ = store.restore(1, jax.tree.map(place, whole))
    assert state.params["a"]["w"].sharding.spec == P("data")
    equal(state, whole)


@pytest.mark.parametrize("other, message", [
    (example(width=6), r"params/a/w: expected float32 \[8, 6\], found float32 \[8, 4\]"),
    (example().replace(step=jnp.float32(0)), r"step: expected float32 \[\], found int32 \[\]"),
    (example().replace(params={"b": jnp.zeros(3, jnp.bfloat16)}), r"params/a/w: expected nothing, found float32"),
    (example().replace(moments=(*example().moments, jnp.zeros(2))),
     r"moments/2: expected float32 \[2\], found nothing"),
])
def test_a_checkpoint_of_another_shape_is_one_clear_error(tmp_path, other, message):
    with Store(tmp_path) as store:
        store.save(3, example(), None)
        with pytest.raises(ValueError, match=message):
            store.restore(3, abstract(other))


def test_the_log_holds_warnings_alone(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        with Store(tmp_path) as store:
            store.save(1, example(), None)
            logging.getLogger("absl").info("from another user of absl")
    assert [record.message for record in caplog.records if record.name == "absl"] == ["from another user of absl"]


def test_keep(tmp_path):
    with pytest.raises(ValueError, match="keep: expected at least 1, found 0"):
        Store(tmp_path, keep=0)
