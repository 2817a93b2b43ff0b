"""Muon and Muon Split: singular values, size, blocks, and a whole trajectory in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from glm5_jax import optim
from glm5_jax.core import mesh as core_mesh, params as core_params
from glm5_jax.core.params import ParamSpec
from glm5_jax.model import config as model_config, transformer
from glm5_jax.optim import muon_split


def matrix(shape, axes, *tags):
    return ParamSpec(shape, axes, tags=frozenset({"matrix", *tags}))


SPECS = {
    "q": core_params.stacked(matrix((12, 4, 6), ("q_rank", "heads", "head_dim"), "head_split"), 2, 1),
    "o": matrix((4, 6, 8), ("heads", "head_dim", "embed")),
    "experts": matrix((2, 8, 16), ("experts", "embed", "expert_mlp"), "expert"),
    "tall": matrix((16, 4), ("embed", None)),
    "norm": ParamSpec((8,), ("norm",), tags=frozenset({"norm"})),
}


def values(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=spec.shape) for name, spec in SPECS.items()}


def as_float32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def blocks_of(name, x, split):
    """Views of every block as [m, n], cut out by hand."""
    if name == "q":
        layers = [x[r, c] for r in range(2) for c in range(1)]
        return [w[:, h] for w in layers for h in range(4)] if split else [w.reshape(12, 24) for w in layers]
    return list(x) if name == "experts" else [x.reshape(-1, x.shape[-1])]


def newton_schulz(x):
    """By the singular values, which is what the polynomial acts on."""
    u, s, v = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    s = s / np.sqrt((s ** 2).sum())
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s ** 3 + 2.0315 * s ** 5
    return (u * s) @ v


def trajectory(optimizer, steps=4, **options):
    params = as_float32(values(0))
    state = optimizer.init(params)
    update = jax.jit(lambda grads, state, params, tokens: optimizer.update(grads, state, params, tokens_seen=tokens))
    for i in range(steps):
        updates, state = update(as_float32(values(i + 1)), state, params, jnp.float32(100 * i))
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("split", [True, False])
def test_a_trajectory_equals_float64(split):
    rate = lambda tokens: 0.02 + tokens * 1e-4
    found = trajectory(optim.build(SPECS, learning_rate=rate, weight_decay=0.3,
                                   optimizer="muon_split" if split else "muon"))
    start = values(0)
    for name in ("q", "o", "experts", "tall"):
        for b, w in enumerate(blocks_of(name, start[name], split)):
            w, momentum = w.copy(), np.zeros_like(w)
            for i in range(4):
                gradient = blocks_of(name, values(i + 1)[name], split)[b]
                momentum = 0.95 * momentum + gradient
                update = 0.2 * np.sqrt(max(w.shape)) * newton_schulz(gradient + 0.95 * momentum)
                w -= rate(100 * i) * (update + 0.3 * w)
            np.testing.assert_allclose(blocks_of(name, np.asarray(found[name]), split)[b], w, rtol=2e-4, atol=2e-5)
    assert not np.array_equal(found["norm"], start["norm"].astype(np.float32))


def test_the_whole_matrix_is_another_update_than_its_heads():
    split, whole = (trajectory(optim.build(SPECS, learning_rate=0.1, optimizer=name), steps=1)
                    for name in ("muon_split", "muon"))
    assert np.abs(split["q"] - whole["q"]).max() > 1e-3
    for name in ("o", "experts", "tall", "norm"):
        np.testing.assert_array_equal(split[name], whole[name])


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("size", [1e-12, 1e-3, 1e6])
def test_every_block_is_near_orthogonal_and_of_the_size_of_adamw(split, size):
    """Heads of very different sizes, and singular values over a range of 20, all come out alike."""
    rng = np.random.default_rng(7)
    gradients = {name: rng.normal(size=spec.shape) for name, spec in SPECS.items()}
    if split:
        gradients["q"] *= 10.0 ** rng.uniform(-3, 3, (2, 1, 1, 4, 1))
    transform = muon_split.scale_by_muon(SPECS | {"norm": matrix((8, 1), (None, None))}, split=split)
    gradients = as_float32(jax.tree.map(lambda g: g * size, gradients | {"norm": rng.normal(size=(8, 1))}))
    updates, _ = transform.update(gradients, transform.init(gradients))
    for name in ("q", "o", "experts", "tall"):
        for block in blocks_of(name, np.asarray(updates[name], np.float64), split):
            if size == 1e-12:  # below what the norm is kept from dividing by: it fades, it does not explode
                assert np.sqrt((block ** 2).mean()) < 0.3
                continue
            scaled = np.linalg.svd(block, compute_uv=False) / (0.2 * np.sqrt(max(block.shape)))
            assert 0.6 < scaled.min() and scaled.max() < 1.3, (name, scaled)
            assert np.sqrt((block ** 2).mean()) == pytest.approx(0.2, rel=0.2), name


def test_zero_gradients_and_the_reach_of_newton_schulz():
    assert not np.asarray(muon_split.orthogonalise(jnp.zeros((2, 3, 4)))).any()
    s = np.geomspace(0.01, 0.99, 40)
    s /= np.sqrt((s ** 2).sum())
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(60, 40)))
    found = np.linalg.svd(np.asarray(muon_split.orthogonalise(jnp.float32(q * s))), compute_uv=False)
    assert 0.6 < found[:len(s[s > 0.01])].min() and found.max() < 1.3


def test_the_blocks_of_the_released_model():
    """Per-head blocks of the three up-projections (and of the indexer's), every expert and every layer alone."""
    specs = transformer.param_specs(model_config.glm5())
    names, leaves = zip(*[(core_params.path_name(path), spec) for path, spec in jax.tree_util.tree_flatten_with_path(
        specs, is_leaf=core_params.is_spec)[0] if "matrix" in spec.tags])
    layer = {"attention/q_a": (6144, 2048), "attention/q_b": (64, 2048, 256), "attention/kv_a": (6144, 576),
             "attention/k_b": (64, 512, 192), "attention/v_b": (64, 512, 256), "attention/o": (16384, 6144),
             "indexer/q": (32, 2048, 128), "indexer/k": (6144, 128), "indexer/weights": (6144, 32)}
    mlp = lambda prefix, width: {f"{prefix}/gate": (6144, width), f"{prefix}/up": (6144, width),
                                 f"{prefix}/down": (width, 6144)}
    experts = {"moe/experts/gate": (256, 6144, 2048), "moe/experts/up": (256, 6144, 2048),
               "moe/experts/down": (256, 2048, 6144), "moe/router": (6144, 256)}
    dense, sparse = layer | mlp("mlp", 12288), layer | experts | mlp("moe/shared", 2048)
    expected = ({f"layers/0/{name}": (1, 3, *shape) for name, shape in dense.items()}
                | {f"layers/3/{name}": (1, 75, *shape) for name, shape in sparse.items()}
                | {f"mtp/layer/{name}": shape for name, shape in sparse.items()} | {"mtp/projection": (12288, 6144)})
    assert {name: muon_split.blocks(spec, split=True).shape for name, spec in zip(names, leaves)} == expected
    whole = {name: muon_split.blocks(spec, split=False).shape for name, spec in zip(names, leaves)}
    assert {name: shape for name, shape in whole.items() if shape != expected[name]} == {
        f"{stack}/{name}": (*lead, *shape) for stack, lead in (("layers/0", (1, 3)), ("layers/3", (1, 75)),
                                                               ("mtp/layer", ()))
        for name, shape in (("attention/q_b", (2048, 16384)), ("attention/k_b", (512, 12288)),
                            ("attention/v_b", (512, 16384)), ("indexer/q", (2048, 4096)))}


def test_split_over_devices_it_is_the_same():
    mesh = core_mesh.make_mesh(data=2, expert=2, tensor=2)
    shardings = core_mesh.param_shardings(SPECS, mesh, core_mesh.ShardingRules())
    optimizer = optim.build(SPECS, learning_rate=0.1)
    params, grads = as_float32(values(0)), as_float32(values(1))

    def step(params, grads):
        updates, state = optimizer.update(grads, optimizer.init(params), params)
        return optax.apply_updates(params, updates), state

    alone, _ = jax.jit(step)(params, grads)
    with jax.set_mesh(mesh):
        placed = jax.device_put((params, grads), (shardings, shardings))
        spread, _ = jax.jit(step, out_shardings=(shardings, None))(*placed)
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(spread))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), alone, spread)
