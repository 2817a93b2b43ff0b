"""Names, shapes and layouts: every element of every parameter once, in the place the release has it."""

from typing import Any

import jax
import numpy as np
import pytest

import glm5_jax as glm5
from glm5_jax.checkpoint import hf_names
from tests.checkpoint.directories import assert_same_bits, BIAS, CONFIGS
from tests.model.reference import MICRO, random_params, RICH


def test_names_and_shapes_of_the_released_layout():
    """Of GLM-5 and GLM-5.2, without allocating: 59,079 tensors, 5 fewer for each shared layer, 791 of MTP."""
    shapes = {entry.name: entry.shape for entry in hf_names.entries(glm5.glm5())}
    mtp = {name for name in shapes if name.startswith("model.layers.78.")}
    assert (len(shapes) - len(mtp), len(mtp)) == (59_079, 791)
    assert hf_names.count(glm5.glm5()) == len(shapes)
    assert len(hf_names.entries(glm5.glm5_2())) == len(shapes) - 5 * glm5.glm5_2().indexer_types.count("shared")
    attention, expert = "model.layers.7.self_attn.", "model.layers.77.mlp.experts.255."
    assert {name: shapes[name] for name in (
        "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", attention + "q_a_proj.weight",
        attention + "q_b_proj.weight", attention + "kv_a_proj_with_mqa.weight", attention + "kv_b_proj.weight",
        attention + "o_proj.weight", attention + "indexer.wq_b.weight", attention + "indexer.wk.weight",
        attention + "indexer.k_norm.bias", attention + "indexer.weights_proj.weight",
        "model.layers.2.mlp.gate_proj.weight", "model.layers.2.mlp.down_proj.weight", "model.layers.3.mlp.gate.weight",
        "model.layers.3." + BIAS, expert + "up_proj.weight", expert + "down_proj.weight",
        "model.layers.3.mlp.shared_experts.gate_proj.weight", "model.layers.78.eh_proj.weight",
        "model.layers.78.shared_head.norm.weight")
    } == {
        "model.embed_tokens.weight": (154880, 6144), "model.norm.weight": (6144,), "lm_head.weight": (154880, 6144),
        attention + "q_a_proj.weight": (2048, 6144), attention + "q_b_proj.weight": (16384, 2048),
        attention + "kv_a_proj_with_mqa.weight": (576, 6144), attention + "kv_b_proj.weight": (28672, 512),
        attention + "o_proj.weight": (6144, 16384), attention + "indexer.wq_b.weight": (4096, 2048),
        attention + "indexer.wk.weight": (128, 6144), attention + "indexer.k_norm.bias": (128,),
        attention + "indexer.weights_proj.weight": (32, 6144), "model.layers.2.mlp.gate_proj.weight": (12288, 6144),
        "model.layers.2.mlp.down_proj.weight": (6144, 12288), "model.layers.3.mlp.gate.weight": (256, 6144),
        "model.layers.3." + BIAS: (256,), expert + "up_proj.weight": (2048, 6144),
        expert + "down_proj.weight": (6144, 2048), "model.layers.3.mlp.shared_experts.gate_proj.weight": (2048, 6144),
        "model.layers.78.eh_proj.weight": (6144, 12288), "model.layers.78.shared_head.norm.weight": (6144,)}


def numbered(config: Any) -> Any:
    """Parameters whose every element is another integer."""
    start = 0

    def leaf(spec: Any) -> np.ndarray:
        nonlocal start
        start += spec.size
        return np.arange(start - spec.size, start, dtype=np.int64).reshape(spec.shape)

    return jax.tree.map(leaf, glm5.param_specs(config), is_leaf=lambda x: hasattr(x, "axes"))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_element_is_written_once(name):
    tree = {path: np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(numbered(CONFIGS[name]))[0]}
    total = sum(leaf.size for leaf in tree.values())
    host = numbered(CONFIGS[name])
    written = [entry.op.to_hf(*(hf_names.leaf_at(host, path)[index] for path, index in entry.slices))
               for entry in hf_names.entries(CONFIGS[name])]
    assert [x.shape for x in written] == [entry.shape for entry in hf_names.entries(CONFIGS[name])]
    np.testing.assert_array_equal(np.sort(np.concatenate([x.reshape(-1) for x in written])), np.arange(total))
    back = jax.tree.map(np.zeros_like, host)
    by_name = {entry.name: x for entry, x in zip(hf_names.entries(CONFIGS[name]), written)}
    for path, pieces in hf_names.pieces(CONFIGS[name]).items():
        for entry, part, at in pieces:
            hf_names.leaf_at(back, path)[at] = entry.op.from_hf(by_name[entry.name])[part]
    assert_same_bits(back, host)
    assert hf_names.count(CONFIGS[name]) == len(written)


def test_layouts_of_the_tensors_with_heads():
    """Rows of a head stay together: kv_b holds [keys; values] of each head, the output reads heads in order."""
    tensors = glm5.to_hf(RICH, numbered(RICH))
    attention = numbered(RICH)["layers"]["0"]["attention"]
    one = {name: leaf[0, 0] for name, leaf in attention.items()}
    heads, nope = RICH.num_attention_heads, RICH.qk_nope_head_dim
    prefix = "model.layers.0.self_attn."
    kv_b = tensors[prefix + "kv_b_proj.weight"].reshape(heads, nope + RICH.v_head_dim, RICH.kv_lora_rank)
    q_b = tensors[prefix + "q_b_proj.weight"].reshape(heads, RICH.qk_head_dim, RICH.q_lora_rank)
    o = tensors[prefix + "o_proj.weight"].reshape(RICH.hidden_size, heads, RICH.v_head_dim)
    for h in range(heads):
        np.testing.assert_array_equal(kv_b[h, :nope], one["k_b"][:, h].T)
        np.testing.assert_array_equal(kv_b[h, nope:], one["v_b"][:, h].T)
        np.testing.assert_array_equal(q_b[h], one["q_b"][:, h].T)
        np.testing.assert_array_equal(o[:, h], one["o"][h].T)
    expert = numbered(RICH)["layers"]["2"]["moe"]["experts"]["down"][0, 0, 4]
    np.testing.assert_array_equal(tensors["model.layers.2.mlp.experts.4.down_proj.weight"], expert.T)


def test_gradients_have_names_too():
    params = random_params(MICRO)
    gradient = jax.jit(jax.grad(lambda p: sum((leaf ** 2).sum() for leaf in jax.tree.leaves(p))))(params)
    ours, twice = glm5.to_hf(MICRO, gradient), glm5.to_hf(MICRO, params)
    assert ours.keys() == twice.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, 2 * twice[name], err_msg=name)
        assert type(value) is np.ndarray


def test_a_tree_of_another_config_is_refused():
    params = random_params(MICRO, 0)
    with pytest.raises(ValueError, match=r"norm: expected \(\d+,\), found \(3,\)"):
        glm5.to_hf(MICRO, {**params, "norm": np.ones(3)})
    with pytest.raises(ValueError, match="embedding: expected .*, found nothing"):
        glm5.to_hf(MICRO, {name: leaf for name, leaf in params.items() if name != "embedding"})
