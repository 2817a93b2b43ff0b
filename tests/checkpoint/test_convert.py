"""The command line: every kind of checkpoint in and out, compared, and described from headers alone."""

import json
import os

import jax
import numpy as np
import pytest
import tokenizers

import glm5_jax as glm5
from glm5_jax.checkpoint import convert, hf_config, hf_names, inventory, safetensors_io, sources, verify
from glm5_jax.checkpoint.errors import CheckpointError
from glm5_jax.checkpoint.store import Store
from glm5_jax.core import params as core_params
from tests.checkpoint.directories import assert_same_bits, edit_config, rewrite, tensors_of
from tests.model.reference import MICRO, random_params

CONFIG = MICRO.replace(latent_norm_eps=None)
TEXT = list(range(3, 40))


def run(*arguments):
    return convert.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A released checkpoint with what a user finds in one: a tokenizer, fields that only others read."""
    directory = tmp_path_factory.mktemp("released") / "GLM"
    glm5.save_hf(directory, CONFIG, random_params(CONFIG), fields={"eos_token_id": [7, 8], "pad_token_id": 7,
                                                                   "their_own": {"a": [1]}, "torch_dtype": "float16"})
    (directory / "generation_config.json").write_text("{}")
    return directory


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A tokenizer with one token a letter, and a text of it."""
    directory = tmp_path_factory.mktemp("text")
    vocabulary = {chr(97 + i) if i < 26 else f"<{i}>": i for i in range(64)}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="<63>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "text.txt").write_text("thequickbrownfoxjumpsoverthelazydog" * 3)
    return ["--text", directory / "text.txt", "--tokenizer", directory / "tokenizer.json", "--tokens", 48]


@pytest.fixture(scope="module")
def store(released, tmp_path_factory):
    directory = tmp_path_factory.mktemp("store") / "store"
    assert run("import", released, directory) == 0
    return directory


def test_in_and_out_of_orbax_nothing_is_lost(released, store, tmp_path):
    assert run("export", store, tmp_path / "out") == 0
    for name in os.listdir(released):
        assert (tmp_path / "out" / name).read_bytes() == (released / name).read_bytes(), name
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(released))
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["eos_token_id"] == [7, 8] and fields["their_own"] == {"a": [1]} and "torch_dtype" not in fields


def test_converted_on_the_way(store, tmp_path):
    assert run("export", store, tmp_path / "half", "--dtype", "bfloat16", "--shard-gb", "0.000005") == 0
    assert len(list((tmp_path / "half").glob("*.safetensors"))) > 3
    assert {str(x.dtype) for name, x in tensors_of(tmp_path / "half").items() if "bias" not in name} == {"bfloat16"}
    assert run("import", tmp_path / "half", tmp_path / "full", "--dtype", "float32") == 0
    exact, rounded = (sources.open_source(path).load() for path in (store, tmp_path / "full"))
    bias = lambda path: "router_bias" in jax.tree_util.keystr(path)
    assert_same_bits(rounded, jax.tree_util.tree_map_with_path(
        lambda path, x: x if bias(path) else x.astype("bfloat16").astype("float32"), exact))


def test_fp8_out_reports_what_it_cost(released, tmp_path, capsys):
    assert run("export", released, tmp_path / "fp8", "--fp8") == 0
    printed = capsys.readouterr().out
    assert "FP8 error" in printed and "tensors quantised, mean error 2." in printed
    assert run("export", tmp_path / "fp8", tmp_path / "back", "--dtype", "float32") == 0
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())


def test_a_run_is_a_checkpoint_too(released, tmp_path):
    """Parameters are taken without the optimiser's state; the newest step, or the one asked for."""
    early, late = (random_params(CONFIG, seed) for seed in (1, 2))
    with Store(tmp_path / "run" / "checkpoints", about=hf_config.about(CONFIG)) as store:
        for step, params in ((5, early), (9, late)):
            store.save(step, {"params": params, "opt_state": {"mu": params}, "step": np.int32(step)}, None)
    for options, expected in (((), late), (("--step", 5), early)):
        assert run("export", tmp_path / "run", tmp_path / "out", *options) == 0
        assert_same_bits(glm5.load_hf(tmp_path / "out")[1], expected)


def test_the_same_weights_are_verified(released, store, text, capsys):
    assert run("verify", released, store, *text) == 0
    printed = capsys.readouterr().out
    assert "the same, every value" in printed and "no layer differs" in printed and "verified" in printed
    assert "top-1 100.00%, top-5 100.00%" in printed and "at most 0.000e+00" in printed


def test_a_difference_is_found_where_it_is(released, text, tmp_path, capsys):
    assert run("export", released, tmp_path / "other") == 0
    name = "model.layers.1.mlp.shared_experts.up_proj.weight"
    rewrite(tmp_path / "other", lambda tensors: tensors.update({name: tensors[name] * np.float32(1.5)}))
    capsys.readouterr()
    assert run("verify", released, tmp_path / "other", *text) == 1
    printed = capsys.readouterr().out
    assert f"{name}: differs by at most" in printed and "5.00e-01 relative" in printed
    assert "1 tensors differ" in printed and "not the same" in printed
    assert "the output of 2 layers is the first to differ" in printed
    assert run("verify", released, tmp_path / "other", *text, "--max-kl", 100) == 1
    assert run("verify", released, tmp_path / "other", *text, "--max-kl", 100, "--max-weight-error", 0.6) == 0


def test_a_difference_that_the_text_does_not_reach_is_found_too(released, text, tmp_path, capsys):
    """The answers of the trunk do not depend on the MTP layer."""
    assert run("export", released, tmp_path / "other") == 0
    name = f"model.layers.{CONFIG.num_hidden_layers}.self_attn.o_proj.weight"
    rewrite(tmp_path / "other", lambda tensors: tensors.update({name: tensors[name] + np.float32(1)}))
    assert run("verify", released, tmp_path / "other", *text) == 1
    assert "a tensor off by" in capsys.readouterr().out


def test_a_nan_is_the_same_as_itself(released, text, tmp_path, capsys):
    assert run("export", released, tmp_path / "one") == 0
    rewrite(tmp_path / "one", lambda tensors: tensors["model.norm.weight"].__setitem__(0, np.nan))
    assert run("export", tmp_path / "one", tmp_path / "other") == 0
    assert run("verify", tmp_path / "one", tmp_path / "other", *text) == 0
    assert "the same, every value" in capsys.readouterr().out


def test_a_number_beside_a_released_checkpoint_makes_it_no_store(released, tmp_path):
    assert run("export", released, tmp_path / "it") == 0
    (tmp_path / "it" / "1").mkdir()
    assert run("inspect", tmp_path / "it") == 0


def test_what_verify_measures_of_answers(released, tmp_path):
    """Against sums written out here."""
    assert run("export", released, tmp_path / "other", "--fp8") == 0
    one, other = sources.open_source(released), sources.open_source(tmp_path / "other")
    found = verify.answers(one, other, np.array(TEXT), top=(1, 3))
    logits = []
    for source in (one, other):
        output = glm5.forward(source.load(), source.config.replace(dtype="float32"), np.array([TEXT]))
        logits.append(np.asarray(output.logits[0], np.float64))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in logits)
    kl = (p * np.log(p / q)).sum(-1)
    assert found.mean_kl == pytest.approx(kl.mean(), rel=1e-3) and found.max_kl == pytest.approx(kl.max(), rel=1e-3)
    assert found.max_error == pytest.approx(np.abs(logits[0] - logits[1]).max(), rel=1e-4)
    for k, share in found.top_agreement.items():
        tops = [[set(np.argsort(-row)[:k]) for row in x] for x in logits]
        assert share == pytest.approx(np.mean([len(a & b) / k for a, b in zip(*tops)]))
    assert found.first_layer == 0 and len(found.layer_errors) == CONFIG.num_hidden_layers + 1


def test_other_models_are_not_compared(released, tmp_path, capsys):
    assert run("export", released, tmp_path / "other") == 0
    edit_config(tmp_path / "other", index_topk=3)
    assert run("verify", released, tmp_path / "other") == 2
    assert f"index_topk: {CONFIG.index_topk} and 3" in capsys.readouterr().err


def test_a_text_of_another_vocabulary_is_refused(released, capsys):
    assert run("verify", released, released) == 2
    assert "token ids below vocab_size = 64" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, message", [
    (("import", "{nothing}", "{out}"), "expected the directory of a checkpoint, found nothing"),
    (("import", "{released}", "{released}"), "expected a new or empty directory, found files"),
    (("export", "{empty}", "{out}"), "config.json: expected a file, found none"),
    (("export", "{store}", "{out}", "--step", "3"), "expected a checkpoint 3, found none"),
    (("export", "{store}", "{full}"), "choose another place"),
    (("inspect", "{nothing}"), "found nothing"),
    (("export", "{released}", "{out}", "--step", "3"), "expected a store of checkpoints to take number 3 from"),
    (("export", "{released}", "{out}", "--shard-gb", "nan"), "--shard-gb: expected more than 0, found nan"),
    (("verify", "{released}", "{released}", "--text", "{released}/model.safetensors"), "decode"),
    (("verify", "{released}", "{empty}"), "config.json")])
def test_faults_are_one_line_and_write_nothing(arguments, message, released, store, tmp_path, capsys):
    (tmp_path / "empty").mkdir(), (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    names = {"nothing": tmp_path / "nothing", "out": tmp_path / "out", "empty": tmp_path / "empty",
             "full": tmp_path / "full", "released": released, "store": store}
    before = sorted(os.listdir(released))
    assert run(*(argument.format(**names) for argument in arguments)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"{arguments[0]}: ") and message in error
    assert sorted(os.listdir(tmp_path)) == ["empty", "full"] and sorted(os.listdir(released)) == before


def test_a_store_that_does_not_name_its_model(tmp_path):
    with Store(tmp_path) as store:
        store.save(1, {"params": random_params(CONFIG)}, None)
    with pytest.raises(CheckpointError, match="expected a checkpoint that names its config"):
        sources.open_source(tmp_path)


def test_the_table_counts_everything_once(released, store, capsys):
    total = core_params.count(glm5.param_specs(CONFIG))
    for path in (released, store):
        assert run("inspect", path) == 0
        printed = capsys.readouterr().out.splitlines()
        assert f"{total:,}" in printed[-1] and printed[-1].startswith("total")
        rows = {line.split("  ")[0] for line in printed[2:]}
        assert {"attention", "indexer", "routed experts", "shared experts", "router", "dense feed-forward", "embedding",
                "output head", "norms", "multi-token prediction"} <= rows and "other" not in rows


def test_the_table_of_glm5_from_headers_alone(tmp_path, capsys):
    """A checkpoint of 1.5 TB that is headers and holes: nothing of it can have been read."""
    config = glm5.glm5(dtype="bfloat16", param_dtype="bfloat16")
    (tmp_path / "config.json").write_text(json.dumps(hf_config.to_json(config, "bfloat16")))
    weight_map, shard, begin = {}, 0, 0
    header: dict = {}

    def finish():
        nonlocal header, shard, begin
        text = json.dumps(header).encode()
        with open(tmp_path / f"{shard}.safetensors", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + begin)
        header, shard, begin = {}, shard + 1, 0

    for entry in hf_names.entries(config):
        bias = entry.name.endswith("e_score_correction_bias")
        size = int(np.prod(entry.shape)) * (4 if bias else 2)
        header[entry.name] = {"dtype": "F32" if bias else "BF16", "shape": entry.shape,
                              "data_offsets": [begin, begin + size]}
        weight_map[entry.name] = f"{shard}.safetensors"
        begin += size
        if begin > 5e9:
            finish()
    finish()
    (tmp_path / safetensors_io.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert run("inspect", tmp_path) == 0
    printed = capsys.readouterr().out
    routed = next(line for line in printed.splitlines() if line.startswith("routed experts"))
    assert f"{75 * 256 * 3 * 2048 * 6144:,}" in routed and "1.45 TB" in routed and "57,600" in routed
    assert f"{core_params.count(glm5.param_specs(config)):,}" in printed.splitlines()[-1]
    assert shard > 250


def test_rows_are_sums():
    arrays = {"model.layers.0.self_attn.o_proj.weight": jax.ShapeDtypeStruct((2, 3), np.dtype("float32")),
              "model.layers.1.self_attn.o_proj.weight": jax.ShapeDtypeStruct((2, 3), np.dtype("float32")),
              "model.norm.weight": jax.ShapeDtypeStruct((4,), np.dtype("float16"))}
    assert inventory.rows(arrays) == [inventory.Row("attention", "float32", 2, 12, 48),
                                      inventory.Row("norms", "float16", 1, 4, 8)]
