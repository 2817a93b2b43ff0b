"""AdamW by tags: the update written out in float64, and what must not move at all."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from glm5_jax.core.params import ParamSpec
from glm5_jax.optim import partition, schedules

SPECS = {
    "w": ParamSpec((3, 2), (None, None), tags=frozenset({"matrix"})),
    "norm": ParamSpec((3,), (None,), tags=frozenset({"norm"})),
    "indexer": {"w": ParamSpec((2, 2), (None, None), tags=frozenset({"matrix", "indexer"}))},
    "bias": ParamSpec((4,), (None,), tags=frozenset({"router_bias"})),
}


def tree(seed):
    rng = np.random.default_rng(seed)
    return {"w": rng.normal(size=(3, 2)), "norm": rng.normal(size=3), "indexer": {"w": rng.normal(size=(2, 2))},
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
    params = train(partition.build(SPECS, learning_rate=rate, weight_decay=0.3))
    start, grads = tree(0), [tree(i) for i in (1, 2, 3)]
    for name, decay in (("w", 0.3), ("norm", 0.0)):
        expected = written_out(start[name], [g[name] for g in grads], rate, decay)
        np.testing.assert_allclose(params[name], expected, rtol=2e-5)
    np.testing.assert_array_equal(params["bias"], start["bias"].astype(np.float32))
    assert not np.array_equal(params["indexer"]["w"], start["indexer"]["w"].astype(np.float32))


def test_a_number_is_a_constant_rate():
    given, constant = (train(partition.build(SPECS, learning_rate=rate))
                       for rate in (0.02, lambda tokens: jnp.float32(0.02)))
    jax.tree.map(np.testing.assert_array_equal, given, constant)


def test_frozen_tags_get_exactly_nothing():
    params = train(partition.build(SPECS, learning_rate=0.1, frozen=("indexer",)))
    start = as_float32(tree(0))
    np.testing.assert_array_equal(params["indexer"]["w"], start["indexer"]["w"])
    assert not np.array_equal(params["w"], start["w"])


def test_unknown_tag():
    with pytest.raises(ValueError, match=r"frozen: unknown tags \['indexr'\]"):
        partition.build(SPECS, learning_rate=0.1, frozen=("indexr",))


def test_warmup_cosine():
    rate = schedules.warmup_cosine(2.0, warmup=100, total=300, final=0.5)
    seen = {0: 0.0, 50: 1.0, 100: 2.0, 150: 0.5 + 1.5 * (1 + np.cos(np.pi / 4)) / 2, 200: 1.25, 300: 0.5, 900: 0.5}
    np.testing.assert_allclose([rate(jnp.float32(tokens)) for tokens in seen], list(seen.values()), atol=1e-6)
    assert schedules.warmup_cosine(2.0, warmup=0, total=10)(jnp.float32(0)) == 2.0
    with pytest.raises(ValueError, match="warmup: expected"):
        schedules.warmup_cosine(2.0, warmup=10, total=10)
