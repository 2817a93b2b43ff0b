"""`forward` as a whole, against the NumPy model of `reference.py` and against what must hold of any causal model."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm5_jax as glm5
from tests.model import reference
from tests.model.reference import MICRO, random_params, RICH

COLLECT = ("hidden", "index_scores", "selected", "router")
ONE = MICRO.replace(num_hidden_layers=1, mlp_layer_types=("sparse",), indexer_types=("full",), index_head_dim=4,
                    num_nextn_predict_layers=0, num_attention_heads=1, index_n_heads=1, index_topk=1)
CONFIGS = {"plain": MICRO, "rich": RICH, "one": ONE}
SEGMENTS = np.array([
    [1] * 17,
    [0, 0, 0, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 0, 0],
    [1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 9, 9],
    [0] * 17], np.int32)
TOKENS = np.random.default_rng(3).integers(0, MICRO.vocab_size, SEGMENTS.shape).astype(np.int32)
# Documents cut out of longer ones, with holes: any order-preserving positions are allowed.
POSITIONS = (reference.default_positions(SEGMENTS) * 3 + np.arange(4)[:, None] * 11).astype(np.int32)


def gathered(config: Any) -> Any:
    """The same model on the sparse path, in blocks of queries that do not divide the length."""
    return config.replace(dense_attention_max_len=0, query_chunk=5)


@functools.cache
def truth(name: str, indexer_loss: str | None, default_positions: bool) -> list[reference.Row]:
    config = CONFIGS[name]
    return reference.rows(config, glm5.to_hf(config, random_params(config)), TOKENS, segments=SEGMENTS,
                          positions=None if default_positions else POSITIONS, indexer_loss=indexer_loss)


def close(actual: Any, expected: Any, what: str, atol: float = 3e-5) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=atol, err_msg=what)


@pytest.mark.parametrize("name, path, indexer_loss, default_positions", [
    ("plain", "dense", "sparse", True), ("plain", "gathered", "sparse", False), ("plain", "dense", "dense", False),
    ("rich", "dense", "sparse", False), ("rich", "gathered", "sparse", True), ("rich", "gathered", "dense", True),
    ("one", "gathered", None, True)])
def test_forward_equals_the_reference(name, path, indexer_loss, default_positions):
    config = CONFIGS[name] if path == "dense" else gathered(CONFIGS[name])
    steps = 2 * config.num_nextn_predict_layers
    out = glm5.forward(random_params(config), config, TOKENS, segment_ids=SEGMENTS, mtp_steps=steps, collect=COLLECT,
                       positions=None if default_positions else POSITIONS, indexer_loss=indexer_loss)
    rows = truth(name, indexer_loss, default_positions)
    assert out.logits.dtype == jnp.float32 and out.mtp_logits is None or steps
    real = SEGMENTS != 0
    kl: dict[str, list[np.ndarray]] = {}
    for b, row in enumerate(rows):
        close(out.logits[b][real[b]], row.logits[real[b]], "logits")
        close(out.hidden[b][real[b]], row.hidden[real[b]], "hidden")
        for what, value in row.found.items():
            if what.startswith(("hidden", "index_scores")):
                close(out.collected[what][b][real[b]], value[real[b]], what)
            elif what.startswith("selected"):
                np.testing.assert_array_equal(out.collected[what][b], value, err_msg=what)
            elif what.startswith("router") and what.endswith("experts"):
                mine = slice(b * 17, b * 17 + 17)
                np.testing.assert_array_equal(out.collected[what][mine][real[b]], value[real[b]], err_msg=what)
                weights = what.replace("experts", "weights")
                close(out.collected[weights][mine][real[b]], row.found[weights][real[b]], weights)
            elif what.startswith("indexer_kl"):
                kl.setdefault(what, []).append(value[0][value[1]])
        if real[b].any():
            moe_layers = [i for i, kind in enumerate(config.mlp_layer_types) if kind == "sparse"]
            assert len(out.aux["expert_load"]) == len(moe_layers)
    moe_layers = [i for i, kind in enumerate(config.mlp_layer_types) if kind == "sparse"]
    np.testing.assert_array_equal(out.aux["expert_load"], [sum(r.found[f"load/{i}"] for r in rows) for i in moe_layers])
    close(out.aux["balance_loss"], np.mean([[r.found[f"balance/{i}"] for r in rows[:3]] for i in moe_layers]), "balance")
    assert out.aux["index_nan"] == 0

    mtp_kl = []
    for each in zip(*(row.mtp(steps) for row in rows)):
        k = len(mtp_kl)
        for b, (known, hidden, _) in enumerate(each):
            close(out.mtp_hidden[k, b][known], hidden[known], f"step {k + 1}")
            close(out.mtp_logits[k, b][known], rows[b].unembed(hidden)[known], f"step {k + 1}")
        mtp_kl.append(indexer_loss and np.concatenate([rows_kl[real] for _, _, (rows_kl, real) in each]).mean())
    for what, values in kl.items():
        close(out.collected[what], np.concatenate(values).mean(), what)
    if indexer_loss and steps:
        close(out.collected[f"indexer_kl/{config.num_hidden_layers}"], np.mean(mtp_kl), "KL of the MTP layer")
    assert {what for what in out.collected if "kl" in what} == (
        {f"indexer_kl/{i}" for i in range(config.num_hidden_layers + (steps > 0))} if indexer_loss else set())
