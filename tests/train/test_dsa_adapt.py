"""The agreement of an indexer with the attention, against the NumPy model and against selections made by hand."""

import jax
import numpy as np
import pytest

import glm5_jax as glm5
from glm5_jax.core.batch import Batch
from glm5_jax.train import dsa_adapt
from glm5_jax.train.step import Options
from tests.model import reference
from tests.model.reference import MICRO, random_params, RICH

SEGMENTS = np.array([[1] * 17, [0] * 3 + [4] * 9 + [2] * 5], np.int32)
TOKENS = np.random.default_rng(3).integers(0, MICRO.vocab_size, SEGMENTS.shape).astype(np.int32)


def batch():
    positions = reference.default_positions(SEGMENTS).astype(np.int32)
    return Batch(tokens=TOKENS, positions=positions, segment_ids=SEGMENTS, targets=np.roll(TOKENS, -1, 1),
                 weights=np.ones_like(TOKENS, np.float32))


def kl(p, logits):
    q = np.exp(logits - logits.max())
    q /= q.sum()
    return sum(a * np.log(a / b) for a, b in zip(p, q) if a > 0)


@pytest.mark.parametrize("config", [MICRO, RICH], ids=["plain", "rich"])
def test_agreement_equals_the_numpy_model(config):
    params = random_params(config)
    found = dsa_adapt.agreement(params, config.replace(query_chunk=5), batch())
    rows = reference.rows(config, glm5.to_hf(config, params), TOKENS, segments=SEGMENTS, indexer_loss="dense")
    for layer in range(config.num_hidden_layers):
        expected = {name: ([], []) for name in ("indexer", "recency", "uniform")}
        owner = max(i for i in range(layer + 1) if config.indexer_types[i] == "full")
        for row in rows:
            visible = reference.visibility(row.positions, row.segments)
            for t in range(17):
                keys = np.flatnonzero(visible[t])
                if len(keys) <= config.index_topk:
                    continue
                p = row.found[f"attention/{layer}"][t, keys]
                most = np.sort(p)[-config.index_topk:].sum()
                distance = row.positions[t] - row.positions[keys]
                for name, scores in (("indexer", row.found[f"index_scores/{owner}"][t, keys]),
                                     ("recency", -np.log1p(distance)), ("uniform", np.zeros(len(keys)))):
                    best = reference.select(scores, np.ones(len(keys), bool), config.index_topk)
                    share = config.index_topk / len(keys) if name == "uniform" else p[best].sum()
                    expected[name][0].append(kl(p, scores))
                    expected[name][1].append(share / most)
        for name, (divergences, recalls) in expected.items():
            assert len(divergences) > 10
            np.testing.assert_allclose(found[name].kl.value()[layer], np.mean(divergences), rtol=1e-3, err_msg=name)
            np.testing.assert_allclose(found[name].recall.value()[layer], np.mean(recalls), rtol=1e-3, err_msg=name)


def test_rows_with_nothing_to_select_do_not_count():
    found = dsa_adapt.agreement(random_params(MICRO), MICRO.replace(index_topk=17), batch())
    assert all(float(mean.count.sum()) == 0 for mean in jax.tree.leaves(
        found, is_leaf=lambda x: hasattr(x, "count")))


def test_the_config_names_the_kernels(monkeypatch):
    asked, scores = [], dsa_adapt.index_scores
    monkeypatch.setattr(dsa_adapt, "index_scores", lambda *arrays, **options: asked.append(options["implementation"])
                        or scores(*arrays, **options))
    config = MICRO.replace(kernels="reference")
    jax.eval_shape(lambda params: dsa_adapt.agreement(params, config, batch()), random_params(MICRO))
    assert asked == ["reference"] * config.num_hidden_layers


def test_the_two_stages():
    options = Options(router_bias_rate=0.1, mtp_steps=2)
    first, second = dsa_adapt.warmup(options), dsa_adapt.sparse(options)
    assert (first.attention, first.indexer_loss, first.trainable, first.router_bias_rate) == (
        "dense", "dense", {"indexer"}, 0.0)
    assert (second.attention, second.indexer_loss, second.trainable, second.router_bias_rate) == (
        "sparse", "sparse", None, 0.1)
    assert first.mtp_steps == second.mtp_steps == 2
