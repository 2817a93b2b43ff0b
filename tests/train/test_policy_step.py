"""The step of reinforcement learning against one loss over the whole batch, differentiated in one piece."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from glm5_jax.core import metrics as core_metrics
from glm5_jax.data import packing
from glm5_jax.losses import policy
from glm5_jax.model import transformer
from glm5_jax.train import policy_step, state as train_state
from glm5_jax.train.policy_step import PolicyStep

LOSS = functools.partial(policy.icepop, beta=1.5)


def batch_of(config, rows: int, seed: int = 0):
    """Packed rows of which some tokens were sampled, with log-probs around those of an untrained model."""
    rng = np.random.default_rng(seed)
    documents = [rng.integers(1, config.vocab_size, size).astype(np.int32) for size in (9, 5, 14, 8, 3, 16, 6, 7)]
    streams = {"logp_behaviour": [-4.85 + 0.4 * rng.standard_normal(len(x)) for x in documents],
               "advantage": [np.full(len(x), rng.standard_normal()) for x in documents]}
    packed = packing.pack_best_fit(documents, 16, streams=streams,
                                   loss_weights=[rng.random(len(x)) < 0.7 for x in documents])
    return jax.tree.map(lambda x: np.pad(x, ((0, rows - len(x)), (0, 0))), packed)


@pytest.fixture(scope="module")
def config(config):
    return config.replace(num_hidden_layers=2, mlp_layer_types=("dense", "sparse"), num_nextn_predict_layers=0)


@pytest.fixture(scope="module")
def params(config):
    return transformer.init(config, jax.random.key(0))


@pytest.fixture(scope="module")
def step(config):
    """One that goes down the gradient itself."""
    plain = optax.with_extra_args_support(optax.sgd(1.0))
    return PolicyStep(config, plain, LOSS, policy_step.Options(rows=2, max_grad_norm=1e9))


def fresh(params):
    """The step donates its state."""
    return train_state.from_params(jax.tree.map(jnp.copy, params), optax.with_extra_args_support(optax.sgd(1.0)))


def test_a_batch_cut_into_passes_is_the_batch(config, params, step):
    """Invariant 15. The indexers and the routers' bias do not move at all."""
    batch = batch_of(config, rows=6)

    def objective(params):
        """By a plain forward over all rows, logits and all."""
        out = transformer.forward(params, config, batch.tokens, positions=batch.positions,
                                  segment_ids=batch.segment_ids)
        logp = jnp.take_along_axis(jax.nn.log_softmax(out.logits), batch.targets[..., None], -1)[..., 0]
        return LOSS(logp, logp_behaviour=batch.streams["logp_behaviour"], advantage=batch.streams["advantage"],
                    mask=batch.weights, segment_ids=batch.segment_ids)

    (loss, metrics), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(params)
    after, found = step(fresh(params), batch)
    moved = jax.tree.map(lambda new, old: np.asarray(old) - np.asarray(new), after.params, params)
    for (path, delta), grad in zip(jax.tree_util.tree_leaves_with_path(moved), jax.tree.leaves(grads), strict=True):
        name = jax.tree_util.keystr(path)
        if "indexer" in name or "router_bias" in name:
            assert not delta.any(), name
        else:
            assert delta.any(), name
            np.testing.assert_allclose(delta, grad, atol=2e-6, err_msg=name)

    values, expected = core_metrics.collect(found), core_metrics.collect(metrics)
    np.testing.assert_allclose(values["loss"], loss, rtol=1e-5)
    for name, value in expected.items():
        np.testing.assert_allclose(values[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    assert 0 < values["weight/low"] < 1 and values["tokens"] == (batch.segment_ids > 0).sum()


def test_log_probs_are_those_of_the_logits(config, params, step):
    batch = batch_of(config, rows=6)
    found = step.log_probs(params, batch)
    out = transformer.forward(params, config, batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids)
    expected = jnp.take_along_axis(jax.nn.log_softmax(out.logits), batch.targets[..., None], -1)[..., 0]
    real = batch.segment_ids > 0
    np.testing.assert_allclose(found[real], expected[real], atol=1e-5)


def test_the_first_step_on_policy_is_neither_clipped_nor_far(config, params, step):
    """Invariant 17."""
    batch = batch_of(config, rows=6)
    batch = batch.replace(streams=batch.streams | {"logp_behaviour": np.asarray(step.log_probs(params, batch))})
    values = core_metrics.collect(step(fresh(params), batch)[1])
    assert values["ppo_kl"] == values["clip/low"] == values["clip/high"] == 0
    assert values["mismatch/log_max"] < 1e-6


def test_no_batch_compiles_anew(config, params, step, caplog):
    """Invariant 23: batches of any number of rows."""
    state, _ = step(fresh(params), batch_of(config, rows=8))
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for rows, seed in ((6, 1), (10, 2), (8, 3)):
            state, _ = step(state, batch_of(config, rows=rows, seed=seed))
    assert [record.message for record in caplog.records if "Compiling" in record.message] == []
    assert int(state.step) == 4


@pytest.mark.parametrize("rows", [0, 5])
def test_rows_that_do_not_fit(config, params, step, rows):
    batch = jax.tree.map(lambda x: x[:rows], batch_of(config, rows=6))
    with pytest.raises(ValueError, match=f"expected a multiple of 2 rows .*, found {rows}"):
        step.log_probs(params, batch)


@pytest.mark.parametrize(("field", "value"), [("rows", 0), ("aggregation", "mean"), ("max_grad_norm", 0.0)])
def test_options_that_make_no_sense(field, value):
    with pytest.raises(ValueError, match=field):
        policy_step.Options(**{field: value})
