"""Sizes without allocating anything, and errors that name the field."""

import dataclasses

import jax
import pytest

import glm5_jax as glm5
from glm5_jax.core.params import count, ParamSpec
from tests.model.reference import MICRO


def leaves(config: glm5.ModelConfig) -> list[tuple[str, ParamSpec]]:
    flat = jax.tree_util.tree_flatten_with_path(glm5.param_specs(config), is_leaf=lambda x: isinstance(x, ParamSpec))[0]
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), spec) for path, spec in flat]


def billions(config: glm5.ModelConfig, *, mtp: bool = False) -> float:
    specs = glm5.param_specs(config)
    part = specs["mtp"] if mtp else {name: value for name, value in specs.items() if name != "mtp"}
    return count(part) / 1e9


def test_sizes_of_the_released_models():
    assert round(billions(glm5.glm5()), 1) == 743.9
    assert round(billions(glm5.glm5_2()), 1) == 743.4
    assert round(billions(glm5.glm5(), mtp=True), 2) == 9.95


def test_active_parameters():
    config = glm5.glm5()
    active = sum(spec.size * (config.num_experts_per_tok / config.n_routed_experts if "expert" in spec.tags else 1)
                 for name, spec in leaves(config) if not spec.tags & {"mtp", "embedding", "output_head"})
    assert round(active / 1e9, 1) == 39.9


def test_parts_of_a_layer():
    """Attention 165.0M, indexer 9.37M, dense 226.5M, mixture 9.703B, each once per layer that has it."""
    sizes: dict[str, int] = {}
    for name, spec in leaves(glm5.glm5()):
        if name.startswith("layers/"):
            part = name.split("/")[2]
            sizes[part] = sizes.get(part, 0) + spec.size
    assert [round(size / 1e6, digits) for size, digits in (
        (sizes["attention"] / 78, 1), (sizes["indexer"] / 78, 2), (sizes["mlp"] / 3, 1), (sizes["moe"] / 75, 0))
    ] == [165.0, 9.37, 226.5, 9703.0]


def test_small_sizes():
    assert 0.08 < billions(glm5.small()) < 0.12
    tiny = glm5.tiny()
    assert 0.8e6 < count(glm5.param_specs(tiny)) < 1.3e6
    assert (tiny.vocab_size, tiny.index_topk, tiny.num_nextn_predict_layers) == (4096, 32, 1)
    for name in ("glm5", "glm5_2", "small", "tiny"):
        assert "sparse" in getattr(glm5, name)().mlp_layer_types and "dense" in getattr(glm5, name)().mlp_layer_types


def test_index_sharing_of_glm5_2():
    types = glm5.glm5_2().indexer_types
    assert [i for i, kind in enumerate(types) if kind == "full"] == [0, 1, *range(2, 78, 4)]
    assert set(glm5.glm5().indexer_types) == {"full"}


def test_released_values():
    config = glm5.glm5()
    assert (config.rope_theta, config.max_position_embeddings, glm5.glm5_2().rope_theta) == (1e6, 202752, 8e6)
    assert (config.index_topk, config.routed_scaling_factor, config.rms_norm_eps) == (2048, 2.5, 1e-5)
    assert config.latent_norm_eps == config.rms_norm_eps
    assert config.mlp_layer_types == ("dense",) * 3 + ("sparse",) * 75


def test_every_parameter_has_what_sharding_and_optimisers_read():
    for name, spec in leaves(glm5.glm5_2(attention_bias=True)):
        assert len(spec.axes) == len(spec.shape), name
        assert spec.tags, name
        assert ("mtp" in spec.tags) == name.startswith("mtp/"), name
        assert ("indexer" in spec.tags) == ("/indexer/" in name), name
        assert ("expert" in spec.tags) == ("/experts/" in name), name
        assert ("router_bias" in spec.tags) == name.endswith("router_bias"), name
        assert spec.dtype == "float32", name


@pytest.mark.parametrize("field, value", [
    ("vocab_size", 0), ("hidden_size", -1), ("num_hidden_layers", 0), ("index_topk", 0), ("num_attention_heads", 2.0),
    ("qk_rope_head_dim", 3), ("index_head_dim", 2), ("n_group", 3), ("n_group", 4), ("topk_group", 2),
    ("num_experts_per_tok", 5), ("mlp_layer_types", ("dense",)), ("mlp_layer_types", ("dense", "sparse", "moe")),
    ("indexer_types", ("shared", "full", "full")), ("indexer_types", ("full", "full")), ("num_nextn_predict_layers", 2),
    ("remat", "some"), ("dtype", "float16"), ("dtype", "no such type"), ("param_dtype", "int32"), ("query_chunk", 0),
    ("rms_norm_eps", 0.0), ("rope_theta", -1.0), ("rope_theta", "1e6"), ("first_k_dense_replace", -1),
    ("dense_attention_max_len", -1)])
def test_errors_name_the_field(field, value):
    with pytest.raises(ValueError, match=rf"\b{field}\b"):
        MICRO.replace(**{field: value})


def test_config_is_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MICRO.hidden_size = 3
    assert hash(MICRO.replace()) == hash(MICRO) and MICRO.replace() == MICRO
    listed = MICRO.replace(indexer_types=["full", "shared", "full"])
    assert listed.indexer_types == ("full", "shared", "full") and hash(listed)
