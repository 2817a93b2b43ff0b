"""The train state: what it counts, and that its abstract form is what a restore needs."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from glm5_jax import optim
from glm5_jax.core import mesh
from glm5_jax.model import transformer
from glm5_jax.train import state


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def test_tokens_are_counted_beyond_one_integer():
    seen, expected = jnp.zeros(2, jnp.int32), 0
    add = jax.jit(state.add_tokens)
    for new in (2_000_000_000, 1_999_999_999, 7, 2_000_000_000):
        seen, expected = add(seen, jnp.int32(new)), expected + new
        assert int(seen[0]) * 10**6 + int(seen[1]) == expected
    np.testing.assert_allclose(state.as_float(seen), expected, rtol=1e-6)


def test_abstract_is_the_created_state_without_its_arrays(config, optimizer):
    created, abstract = state.create(config, optimizer, jax.random.key(0)), state.abstract(config, optimizer)
    assert shapes(created) == shapes(abstract)
    assert int(created.step) == 0 and not created.tokens_seen.any()
    assert {leaf.sharding for leaf in jax.tree.leaves(abstract)} == {created.step.sharding}


def test_on_a_mesh_the_optimiser_is_split_as_its_parameters(config, optimizer):
    abstract = state.abstract(config, optimizer, mesh.make_mesh(data=4, tensor=2))
    moments = abstract.opt_state.inner_states["adamw"].inner_state[0]
    assert abstract.params["embedding"].sharding.spec == P("tensor", "data")
    for name in ("mu", "nu"):
        assert getattr(moments, name)["embedding"].sharding.spec == P("tensor", "data")
    assert moments.count.sharding.spec == abstract.step.sharding.spec == P()
    assert shapes(abstract) == shapes(state.abstract(config, optimizer))

    muon = optim.build(transformer.param_specs(config), learning_rate=1e-2)
    abstract = state.abstract(config, muon, mesh.make_mesh(data=4, tensor=2))
    momentum = abstract.opt_state.inner_states["muon"].inner_state[0][0].trace
    for kept in (momentum["layers"]["0"], momentum["mtp"]["layer"]):
        assert kept["attention"]["q_b"].sharding.spec[-2] == "tensor"
    assert abstract.params["layers"]["0"]["attention"]["q_b"].sharding == (
        momentum["layers"]["0"]["attention"]["q_b"].sharding)
