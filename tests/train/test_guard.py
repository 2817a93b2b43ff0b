"""What is skipped and why, against the rule written out in NumPy; and that nothing moves when it is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.train import guard, loop, state as train_state, step as train_step
from tests.train.test_loop import train

OPTIONS = train_step.Options(indexer_loss=None, norm_ratio=10.0)


def test_the_running_median_is_of_accepted_norms():
    rng = np.random.default_rng(0)
    norms = np.exp(rng.normal(size=200) * 2)
    watch, accepted, in_row = guard.fresh(), [], 0
    for norm in norms:
        reasons = guard.judge(watch, jnp.float32(1), jnp.float32(norm), jnp.int32(0), 5.0)
        skip = len(accepted) >= guard.LEAST and norm > 5.0 * np.median(accepted[-guard.WINDOW:])
        assert {name: bool(found) for name, found in reasons.items()} == {
            "not_finite": False, "index_nan": False, "norm": skip}
        watch = guard.after(watch, jnp.float32(norm), jnp.array(not skip))
        in_row = in_row + 1 if skip else 0
        accepted += [] if skip else [np.float32(norm)]
        assert int(watch.in_row) == in_row
    assert 10 < len(norms) - len(accepted) < 100


@pytest.mark.parametrize("loss, norm, index_nan, reason", [
    (np.nan, 1.0, 0, "not_finite"), (1.0, np.inf, 0, "not_finite"), (1.0, 1.0, 3, "index_nan"), (1.0, 1.0, 0, None),
    (1.0, 1e9, 0, None)])  # no norm is out of line before there are some
def test_one_reason_at_a_time(loss, norm, index_nan, reason):
    found = guard.judge(guard.fresh(), jnp.float32(loss), jnp.float32(norm), jnp.int32(index_nan), 10.0)
    assert [name for name, value in found.items() if value] == ([reason] if reason else [])


@pytest.fixture(scope="module")
def step(config, optimizer):
    return train_step.make_train_step(config, optimizer, OPTIONS)


def norms(values):
    return jnp.full(guard.WINDOW, jnp.nan).at[:len(values)].set(jnp.array(values))


def test_a_skipped_step_moves_nothing_but_the_count(config, optimizer, step, batches):
    state = train_state.create(config, optimizer, jax.random.key(0))
    quiet = guard.Guard(norms([1e-6] * 9), jnp.int32(9), jnp.int32(2))
    before = jax.device_get(state.replace(guard=quiet))
    after, metrics = step(state.replace(guard=quiet), next(batches()))
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (before.params, before.opt_state))
    assert int(after.step) == 1 and int(after.guard.in_row) == 3 and int(after.tokens_seen[1]) > 0
    assert float(metrics["skipped/norm"].value()) == 1 and float(metrics["skipped/not_finite"].value()) == 0
    np.testing.assert_array_equal(after.guard.norms_W, quiet.norms_W)


def test_a_broken_parameter_skips_and_a_sound_step_is_taken(config, optimizer, step, batches):
    state = train_state.create(config, optimizer, jax.random.key(0))
    broken = jax.tree.map(jnp.copy, state)
    broken = broken.replace(params={**broken.params, "norm": broken.params["norm"].at[0].set(jnp.nan)})
    _, metrics = step(broken, next(batches()))
    assert float(metrics["skipped/not_finite"].value()) == 1
    after, metrics = step(state, next(batches()))
    assert int(after.guard.accepted) == 1 and float(after.guard.norms_W[0]) == float(metrics["grad_norm"].value())
    assert not any(float(value.value()) for name, value in metrics.items() if name.startswith("skipped"))


@pytest.mark.parametrize("most", [1, 3])
def test_too_many_skips_in_a_row_stop_the_run(config, optimizer, step, batches, tmp_path, monkeypatch, most):
    monkeypatch.setattr("tests.train.test_loop.CADENCE", loop.Cadence(log_every=2, save_every=100, most_skips=most))

    def begin():
        state = train_state.create(config, optimizer, jax.random.key(0))
        return state.replace(guard=guard.Guard(norms([1e-6] * 9), jnp.int32(9), jnp.int32(0)))

    with pytest.raises(loop.Diverged, match=rf"the last {most} steps were all skipped \(norm in {most}\)") as error:
        train(tmp_path, batches(), step, begin, until=9)
    assert error.value.step == most


@pytest.mark.slow
def test_micro_batches_take_the_same_step(config, optimizer, rows):
    batch = jax.tree.map(lambda x: x[:4], rows)
    whole = dataclasses.replace(OPTIONS, indexer_loss="sparse", mtp_steps=1, router_bias_rate=0.01)
    results = []
    for passes in (1, 2, 4):
        options = dataclasses.replace(whole, micro_batches=passes)
        state = train_state.create(config, optimizer, jax.random.key(0))
        results.append(train_step.make_train_step(config, optimizer, options)(state, batch))
    (one, measured), *others = results
    for state, metrics in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5), state.params, one.params)
        for name, value in measured.items():
            np.testing.assert_allclose(metrics[name].value(), value.value(), rtol=1e-4, atol=1e-7, err_msg=name)


def test_micro_batches_divide_the_rows(config, optimizer, rows):
    step = train_step.make_train_step(config, optimizer, dataclasses.replace(OPTIONS, micro_batches=3))
    with pytest.raises(ValueError, match="micro_batches: expected a divisor of the 2 rows of a batch, found 3"):
        step(train_state.create(config, optimizer, jax.random.key(0)), jax.tree.map(lambda x: x[:2], rows))
