"""config.json to our config and back: where each value stands, and errors that name the fields."""

import json
import re
from typing import Any

import pytest

import glm5_jax as glm5
from glm5_jax.checkpoint import hf_config
from glm5_jax.checkpoint.errors import ConfigError
from tests.checkpoint.directories import CONFIGS, how_it_runs


def parse(**fields: Any) -> Any:
    return hf_config.from_json({"model_type": "glm_moe_dsa", **fields})


@pytest.mark.parametrize("config", [glm5.glm5(), glm5.glm5_2(), *CONFIGS.values(), glm5.tiny()],
                         ids=["glm5", "glm5_2", *CONFIGS, "tiny"])
def test_config_round_trip(config):
    fields = json.loads(json.dumps(hf_config.to_json(config, config.dtype)))
    again = hf_config.from_json(fields).replace(param_dtype=config.param_dtype, **how_it_runs(config))
    assert again == config


def test_absent_fields_are_those_of_glm5():
    config = parse(dtype="bfloat16", num_nextn_predict_layers=1)
    assert config.replace(param_dtype="float32") == glm5.glm5()
    assert parse().num_nextn_predict_layers == 0
    assert parse(num_experts=128).n_routed_experts == 128
    assert parse(num_experts=128, n_routed_experts=64).n_routed_experts == 64
    assert parse(head_dim=192, ep_size=1, moe_layer_freq=1, pretraining_tp=1).qk_rope_head_dim == 64


@pytest.mark.parametrize("fields, full", [
    (dict(), list(range(9))),
    (dict(index_topk_freq=4, index_skip_topk_offset=3), [0, 1, 2, 6]),
    (dict(index_topk_freq=4), [0, 1, 5]),
    (dict(index_topk_freq=4, index_skip_topk_offset=None), [0, 1, 5]),
    (dict(index_topk_freq=4, index_skip_topk_offset=3, index_topk_pattern=None), [0, 1, 2, 6]),
    (dict(index_topk_pattern="FSSFSSFSS", index_topk_freq=4), [0, 3, 6]),
    (dict(index_topk_pattern=["F"] + ["S"] * 8), [0]),
    (dict(indexer_types=["full"] * 2 + ["shared"] * 7, index_topk_pattern="F" * 9), [0, 1]),
    (dict(indexer_types=["full"] * 2 + ["shared"] * 7 + ["full"]), [0, 1])])
def test_which_layers_have_an_indexer(fields, full):
    config = parse(num_hidden_layers=9, **fields)
    assert [i for i, kind in enumerate(config.indexer_types) if kind == "full"] == full


@pytest.mark.parametrize("fields, theta", [
    (dict(), 1e6), (dict(rope_theta=5e4), 5e4), (dict(rope_theta=5e4, rope_scaling=None), 5e4),
    (dict(rope_parameters=dict(rope_theta=8e6, rope_type="default"), rope_theta=5e4), 8e6),
    (dict(rope_parameters=dict(rope_type="default"), rope_theta=5e4), 5e4)])
def test_where_theta_stands(fields, theta):
    assert parse(**fields).rope_theta == theta


@pytest.mark.parametrize("fields, name", [
    (dict(model_type="deepseek_v3"), "model_type"), (dict(hidden_act="gelu"), "hidden_act"),
    (dict(scoring_func="softmax"), "scoring_func"), (dict(rope_parameters=dict(rope_type="yarn")), "rope_type"),
    (dict(indexer_rope_interleave=False), "indexer_rope_interleave"), (dict(hidden_size=0), "hidden_size"),
    (dict(num_hidden_layers="many"), "num_hidden_layers"), (dict(dtype="float8"), "dtype"),
    (dict(index_topk_pattern="FSX"), "index_topk_pattern"), (dict(indexer_types=["shared"] * 78), "indexer_types"),
    (dict(mlp_bias=True), "mlp_bias")])
def test_config_errors_name_the_field(fields, name):
    with pytest.raises(ConfigError, match=re.escape(name)):
        parse(**fields)
