"""The step against its parts computed apart: the loss, the separation of gradients, the router-bias rule, clipping."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from glm5_jax.model import transformer
from glm5_jax.optim import partition, schedules
from glm5_jax.train import state as train_state, step as train_step

OPTIONS = train_step.Options(mtp_steps=2, mtp_weight=0.3, balance_weight=0.1, indexer_loss="sparse",
                             indexer_weight=0.5, router_bias_rate=0.01)
ONE_MTP_STEP = dataclasses.replace(OPTIONS, mtp_steps=1)


@pytest.fixture(scope="module")
def params(config):
    return transformer.init(config, jax.random.key(1))


@pytest.fixture(scope="module")
def batch(rows):
    return jax.tree.map(lambda x: x[-3:], rows)  # the last row ends in padding


@pytest.fixture(scope="module")
def stepped(config, optimizer, params, batch):
    """The state after one step and its metrics."""
    before = train_state.from_params(jax.tree.map(jnp.copy, params), optimizer)
    return train_step.make_train_step(config, optimizer, OPTIONS)(before, batch)


@pytest.fixture(scope="module")
def output(config, params, batch):
    return transformer.forward(params, config, batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids,
                               mtp_steps=2, indexer_loss="sparse", collect=("router",))


@pytest.fixture(scope="module")
def small(config):
    """Two layers of one kind, quick to compile."""
    return config.replace(num_hidden_layers=2, mlp_layer_types=("sparse", "sparse"))


@pytest.fixture(scope="module")
def small_params(small):
    return transformer.init(small, jax.random.key(1))


@pytest.fixture(scope="module")
def start(small, small_params):
    """A new state, of which a step may dispose, and the step."""
    optimizer = partition.build(transformer.param_specs(small), learning_rate=1e-2, optimizer="adamw")
    options = dataclasses.replace(ONE_MTP_STEP, mtp_weight=schedules.linear(0.3, 0.1, total=1e3),
                                  router_bias_rate=schedules.staged({0: 0.01, 20: 0.25}))
    step = train_step.make_train_step(small, optimizer, options)
    return lambda: train_state.from_params(jax.tree.map(jnp.copy, small_params), optimizer), step


def is_indexer(path):
    return "indexer" in jax.tree_util.keystr(path)


def only(batch, rows):
    """The batch with every other row empty."""
    kept = np.isin(np.arange(len(batch.tokens)), rows)
    return jax.tree.map(lambda x: np.where(kept[:, None], x, 0), batch)


@pytest.mark.slow
def test_metrics_are_those_of_the_parts(batch, stepped, output):
    assert (batch.segment_ids == 0).any() and (batch.segment_ids == 2).any()
    _, metrics = stepped
    expected = {}
    for k, logits in enumerate([output.logits, *output.mtp_logits]):
        log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
        total = count = 0.0
        for b, t in np.ndindex(*batch.tokens.shape):
            if t + k < 16 and batch.segment_ids[b, t + k] == batch.segment_ids[b, t] and batch.weights[b, t + k]:
                total, count = total - log_p[b, t, batch.targets[b, t + k]], count + 1
        assert count > 10
        expected["lm_loss" if k == 0 else f"mtp_loss/{k}"] = total / count
    expected["indexer_kl"] = np.mean([output.collected[f"indexer_kl/{i}"] for i in range(5)])
    expected["balance_loss"] = output.aux["balance_loss"] + output.aux["mtp_balance_loss"]
    expected["loss"] = (expected["lm_loss"] + 0.3 / 2 * (expected["mtp_loss/1"] + expected["mtp_loss/2"])
                        + 0.5 * expected["indexer_kl"] + 0.1 * expected["balance_loss"])
    load = np.asarray(output.aux["expert_load"])
    expected["expert_load"] = np.mean(load.max(-1) / load.mean(-1))
    expected |= {"index_nan": 0, "tokens": np.sum(batch.segment_ids != 0), "skipped_in_row": 0}
    expected |= {f"skipped/{reason}": 0 for reason in ("not_finite", "index_nan", "norm")}
    found = {name: float(metric.value()) for name, metric in metrics.items()}
    assert found.pop("grad_norm") > 0
    assert found == pytest.approx({name: float(value) for name, value in expected.items()}, rel=2e-5)


@pytest.mark.slow
def test_the_router_bias_follows_the_load_of_its_own_layer(batch, stepped, output):
    real = np.repeat(batch.segment_ids.reshape(-1) != 0, 2)
    biases = stepped[0].params["layers"]["1"]["moe"]["router_bias"].reshape(2, 4)  # layers 1 and 3
    for layer, bias in zip((1, 3), biases):
        chosen = np.asarray(output.collected[f"router/{layer}/experts"]).reshape(-1)[real]
        load = np.bincount(chosen, minlength=4)
        np.testing.assert_array_equal(bias, np.float32(0.01) * np.sign(load.mean() - load))
    assert not np.array_equal(biases[0], biases[1])
    load = np.asarray(output.aux["mtp_expert_load"])
    np.testing.assert_array_equal(stepped[0].params["mtp"]["layer"]["moe"]["router_bias"],
                                  np.float32(0.01) * np.sign(load.mean() - load))


def test_the_load_finds_its_layer_between_dense_ones(config, params):
    assert config.mlp_layer_types == ("dense", "sparse") * 2
    aux = {"expert_load": jnp.array([[9, 1, 1, 1], [1, 1, 1, 9]]), "mtp_expert_load": jnp.array([1, 9, 1, 1])}
    after = train_step.balance(params, config, aux, 0.5)
    np.testing.assert_array_equal(after["layers"]["1"]["moe"]["router_bias"].reshape(2, 4),  # of layers 1 and 3
                                  [[-0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, -0.5]])
    np.testing.assert_array_equal(after["mtp"]["layer"]["moe"]["router_bias"], [0.5, -0.5, 0.5, 0.5])


def test_gradients_of_the_indexer_and_of_the_rest_do_not_mix(small, small_params, batch):
    @jax.jit
    def gradient(params, rest, divergence):
        def weighted(params):
            loss, (metrics, _) = train_step._objective(params, small, ONE_MTP_STEP, batch,
                                                       train_step._counts(batch, ONE_MTP_STEP),
                                                       ONE_MTP_STEP.mtp_weight)
            kl = metrics["indexer_kl"].total
            return rest * (loss - OPTIONS.indexer_weight * kl) + divergence * kl
        return jax.grad(weighted)(params)

    of_rest, of_kl = gradient(small_params, 1.0, 0.0), gradient(small_params, 0.0, 1.0)
    for (path, rest), kl in zip(jax.tree_util.tree_flatten_with_path(of_rest)[0], jax.tree.leaves(of_kl)):
        assert np.any(kl) == is_indexer(path), path
        moved_by_gradient = not is_indexer(path) and "router_bias" not in jax.tree_util.keystr(path)
        assert np.any(rest) == moved_by_gradient, path


@pytest.mark.slow
def test_micro_batches_and_chunks_add_up_to_the_batch(small, small_params, batch):
    """Parts with other numbers of tokens, sequences and labels: loss and gradient are those of the whole, in one piece.

    The two layers share an index: their indexer counts as much as that of the MTP layer.
    """
    config = small.replace(indexer_types=("full", "shared"))
    params = {**small_params, "layers": transformer.init(config, jax.random.key(1))["layers"]}
    whole, parts = (dataclasses.replace(ONE_MTP_STEP, z_weight=0.01, loss_chunk=chunk) for chunk in (0, 5))
    counts = train_step._counts(batch, whole)
    gradient = jax.jit(jax.value_and_grad(train_step._objective, has_aux=True), static_argnums=(1, 2))
    (loss, (metrics, _)), grads = gradient(params, config, whole, batch, counts, 0.3)
    aux = transformer.forward(params, config, batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids,
                              mtp_steps=1, indexer_loss="sparse").aux
    kl = [float(each) for name in ("indexer_kl", "mtp_indexer_kl") for each in aux[name].value()]
    assert float(metrics["indexer_kl"].value()) == pytest.approx((np.mean(kl[:2]) + kl[2]) / 2, rel=1e-5)

    (first, _), first_grads = gradient(params, config, parts, only(batch, [0, 1]), counts, 0.3)
    (second, _), second_grads = gradient(params, config, parts, only(batch, [2]), counts, 0.3)
    assert float(first + second) == pytest.approx(float(loss), rel=1e-5)
    jax.tree.map(lambda a, b, both: np.testing.assert_allclose(a + b, both, rtol=1e-3, atol=2e-6),
                 first_grads, second_grads, grads)


def test_the_state_moves_on_and_is_donated(start, small_params, batch):
    begin, step = start
    before = begin()
    after, _ = step(before, batch)
    assert before.params["embedding"].is_deleted()
    assert int(after.step) == 1
    assert after.tokens_seen.tolist() == [0, int((batch.segment_ids != 0).sum())]
    for (path, old), new in zip(jax.tree_util.tree_flatten_with_path(small_params)[0], jax.tree.leaves(after.params)):
        assert not np.array_equal(old, new), path


def test_a_batch_is_learnt_by_heart(start, batch):
    begin, step = start
    state, losses = begin(), []
    for _ in range(40):
        state, metrics = step(state, batch)
        losses.append(float(metrics["lm_loss"].value()))
    assert losses[0] == pytest.approx(np.log(128), rel=0.02)
    assert losses[-1] < 0.5 * losses[0]


def test_clip():
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}
    clipped, norm = train_step.clip(grads, 1.0)
    assert norm == 5.0 and optax.tree.norm(clipped) == pytest.approx(1.0)
    same, _ = train_step.clip(grads, 5.5)
    jax.tree.map(np.testing.assert_array_equal, same, grads)
    zero, norm = train_step.clip({"a": jnp.zeros(2)}, 1.0)
    assert norm == 0 and not zero["a"].any()


def test_evaluation_counts_predicted_tokens_alone(config, params, batch):
    evaluate = train_step.make_eval_step(config)
    found = evaluate(params, batch)
    assert found.count == batch.weights.sum()
    assert float(found.value()) == pytest.approx(np.log(128), rel=0.05)
    parts = [evaluate(params, only(batch, rows)) for rows in ([0, 1], [2])]
    assert sum(part.count for part in parts) == found.count
    assert float(sum(part.total for part in parts)) == pytest.approx(float(found.total), rel=1e-5)


def test_numbers_may_be_schedules_over_tokens(start, batch):
    begin, step = start
    state = begin()
    for weight, rate in ((0.3, 0.01), (0.3 - 0.2 * (batch.segment_ids != 0).sum() / 1e3, 0.25)):
        before = np.asarray(state.params["layers"]["0"]["moe"]["router_bias"])
        state, metrics = step(state, batch)
        value = {name: float(metric.value()) for name, metric in metrics.items()}
        assert value["loss"] == pytest.approx(value["lm_loss"] + weight * value["mtp_loss/1"]
                                              + 0.5 * value["indexer_kl"] + 0.1 * value["balance_loss"], rel=1e-6)
        moved = state.params["layers"]["0"]["moe"]["router_bias"] - before
        assert np.abs(moved).max() == pytest.approx(rate, rel=1e-5)


def test_options_name_the_field():
    with pytest.raises(ValueError, match="Options.indexer_loss: expected None, 'dense' or 'sparse', found 'both'"):
        train_step.Options(indexer_loss="both")
    with pytest.raises(ValueError, match="Options.mtp_weight: expected 0 or more, found -1"):
        train_step.Options(mtp_weight=-1)
    with pytest.raises(ValueError, match="Options.loss_chunk: expected 0 or more, found -4"):
        train_step.Options(loss_chunk=-4)
    with pytest.raises(ValueError, match="Options.max_grad_norm"):
        train_step.Options(max_grad_norm=0)


@pytest.mark.slow
def test_bfloat16_computes_and_float32_remembers(small, small_params, batch):
    optimizer = partition.build(transformer.param_specs(small), learning_rate=1e-2, optimizer="adamw")
    after = {}
    for dtype in ("float32", "bfloat16"):
        config = small.replace(dtype=dtype)
        state = train_state.from_params(jax.tree.map(jnp.copy, small_params), optimizer)
        after[dtype] = train_step.make_train_step(config, optimizer, ONE_MTP_STEP)(state, batch)
    (_, exact_metrics), (state, metrics) = after["float32"], after["bfloat16"]
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.opt_state)} <= {jnp.dtype("float32"), jnp.dtype("int32")}
    losses = [float(each["lm_loss"].value()) for each in (exact_metrics, metrics)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2) and losses[0] != losses[1]
    in_bfloat16 = jax.tree.map(lambda x: bool(jnp.all(x == x.astype(jnp.bfloat16))), state.params["layers"])
    assert not any(jax.tree.leaves(in_bfloat16["0"]["attention"]))  # digits that bfloat16 has not
