"""The groups by tags: AdamW written out in float64, what must not move at all, and what is kept for it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from glm5_jax import optim
from glm5_jax.core import params as core_params
from glm5_jax.core.params import ParamSpec
from glm5_jax.model import config as model_config, transformer
from glm5_jax.optim import partition

SPECS = {
    "w": ParamSpec((3, 2), (None, None), tags=frozenset({"matrix"})),
    "norm": ParamSpec((3,), (None,), tags=frozenset({"norm"})),
    "indexer": {"q": ParamSpec((2, 2), (None, None), tags=frozenset({"matrix", "indexer"}))},
    "bias": ParamSpec((4,), (None,), tags=frozenset({"router_bias"})),
}


def tree(seed):
    rng = np.random.default_rng(seed)
    return {"w": rng.normal(size=(3, 2)), "norm": rng.normal(size=3), "indexer": {"q": rng.normal(size=(2, 2))},
            "bias": rng.normal(size=4)}


def as_float32(values):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), values)


def train(optimizer, steps=3):
    params = as_float32(tree(0))
    state = optimizer.init(params)
    for i in range(steps):
        updates, state = optimizer.update(as_float32(tree(i + 1)), state, params, tokens_seen=jnp.float32(100.0 * i))
        params = optax.apply_updates(params, updates)
    return params


def written_out(p, grads, rate, decay, b1=0.9, b2=0.95, eps=1e-8):
    m = v = 0.0
    for i, g in enumerate(grads, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        p = p - rate(100.0 * (i - 1)) * (m / (1 - b1 ** i) / (np.sqrt(v / (1 - b2 ** i)) + eps) + decay * p)
    return p


def test_adamw_decays_matrices_alone_and_leaves_the_router_bias():
    rate = lambda tokens: 0.01 + tokens * 1e-4
    params = train(optim.build(SPECS, optimizer="adamw", learning_rate=rate, weight_decay=0.3))
    start, grads = tree(0), [tree(i) for i in (1, 2, 3)]
    for name, decay in (("w", 0.3), ("norm", 0.0)):
        expected = written_out(start[name], [g[name] for g in grads], rate, decay)
        np.testing.assert_allclose(params[name], expected, rtol=2e-5)
    np.testing.assert_array_equal(params["bias"], start["bias"].astype(np.float32))
    assert not np.array_equal(params["indexer"]["q"], start["indexer"]["q"].astype(np.float32))


def test_a_number_is_a_constant_rate_and_needs_no_tokens():
    given, constant = (optim.build(SPECS, learning_rate=rate) for rate in (0.02, lambda tokens: jnp.float32(0.02)))
    jax.tree.map(np.testing.assert_array_equal, train(given), train(constant))
    params = as_float32(tree(0))
    updates, _ = given.update(as_float32(tree(1)), given.init(params), params)
    assert updates["w"].any()
    with pytest.raises(ValueError, match="update: expected tokens_seen"):
        constant.update(as_float32(tree(1)), constant.init(params), params)


@pytest.mark.parametrize("optimizer", partition.OPTIMIZERS)
@pytest.mark.parametrize("choice", [dict(frozen=("indexer",)), dict(trainable=("indexer",)), dict(trainable=()),
                                    dict(frozen=("norm", "indexer"), trainable=("indexer", "matrix"))])
def test_frozen_parameters_get_exactly_nothing_and_keep_nothing(optimizer, choice):
    chain = optim.build(SPECS, optimizer=optimizer, learning_rate=0.1, weight_decay=0.5, **choice)
    start, params, state = as_float32(tree(0)), train(chain), chain.init(as_float32(tree(0)))
    moves = {"w": "trainable" not in choice or "matrix" in choice["trainable"],
             "norm": "trainable" not in choice and "norm" not in choice["frozen"],
             "indexer": "frozen" not in choice and choice["trainable"] == ("indexer",), "bias": False}
    kept = {name: 0 for name in SPECS}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        for name in SPECS:
            kept[name] += leaf.size if f"['{name}']" in jax.tree_util.keystr(path) else 0
    for name, moving in moves.items():
        before, after = (jax.tree.leaves(values[name])[0] for values in (start, params))
        assert np.array_equal(before, after) != moving, name
        assert (kept[name] > 0) == moving, name


def test_every_parameter_is_in_the_group_its_tags_say():
    specs = transformer.param_specs(model_config.tiny(attention_bias=True))
    leaves = jax.tree.leaves(specs, is_leaf=core_params.is_spec)
    for optimizer in partition.OPTIMIZERS:
        groups = jax.tree.leaves(partition.groups(specs, optimizer=optimizer))
        assert len(groups) == len(leaves)
        for spec, group in zip(leaves, groups):
            matrix = not spec.tags & {"embedding", "output_head", "norm", "bias", "router_bias"}
            assert group == ("frozen" if "router_bias" in spec.tags else
                             "muon" if matrix and optimizer != "adamw" else "adamw"), spec
    assert {"muon", "adamw", "frozen"} == set(jax.tree.leaves(partition.groups(specs, optimizer="muon")))


@pytest.mark.parametrize("optimizer", partition.OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_in_bfloat16_are_used_in_float32(optimizer, dtype):
    chain = optim.build(SPECS, optimizer=optimizer, learning_rate=0.1)
    params = jax.tree.map(lambda p: jnp.asarray(p, dtype), tree(0))
    narrow = jax.tree.map(lambda g: g.astype(jnp.bfloat16), as_float32(tree(1)))
    of_narrow, state = chain.update(narrow, chain.init(params), params)
    of_wide, _ = chain.update(jax.tree.map(lambda g: g.astype(jnp.float32), narrow), chain.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, of_narrow, of_wide)
    assert {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim} == {jnp.dtype("float32")}
    assert of_narrow["w"].dtype == jnp.float32


def test_errors_name_what_is_wrong():
    for field in ("frozen", "trainable"):
        with pytest.raises(ValueError, match=rf"{field}: unknown tags \['indexr'\]"):
            optim.build(SPECS, learning_rate=0.1, **{field: ("indexr",)})
    with pytest.raises(ValueError, match="optimizer: expected one of .* found 'muonsplit'"):
        optim.build(SPECS, learning_rate=0.1, optimizer="muonsplit")
    vector = {"a": {"b": ParamSpec((3,), ("embed",), tags=frozenset({"matrix"}))}}
    with pytest.raises(ValueError, match="parameter a/b: Muon: expected two axes .* found .*'embed'"):
        optim.build(vector, learning_rate=0.1)
    optim.build(vector, learning_rate=0.1, optimizer="adamw")
