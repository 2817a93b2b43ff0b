"""`forward` as a whole, against the NumPy model of `reference.py` and against what must hold of any causal model."""

from collections.abc import Iterator
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm5_jax as glm5
from glm5_jax.core.params import abstract
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
    ("plain", "dense", "dense", True), ("plain", "gathered", "sparse", False), ("rich", "dense", "sparse", False),
    ("rich", "gathered", "dense", True), ("one", "gathered", None, True)])
def test_forward_equals_the_reference(name, path, indexer_loss, default_positions):
    config = CONFIGS[name] if path == "dense" else gathered(CONFIGS[name])
    steps = 2 * config.num_nextn_predict_layers
    out = glm5.forward(random_params(config), config, TOKENS, segment_ids=SEGMENTS, mtp_steps=steps, collect=COLLECT,
                       positions=None if default_positions else POSITIONS, indexer_loss=indexer_loss)
    rows = truth(name, indexer_loss, default_positions)
    assert out.logits.dtype == jnp.float32 and (out.mtp_logits is None) == (steps == 0)
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
    moe_layers = [i for i, kind in enumerate(config.mlp_layer_types) if kind == "sparse"]
    np.testing.assert_array_equal(out.aux["expert_load"], [sum(r.found[f"load/{i}"] for r in rows) for i in moe_layers])
    balance = [[row.found[f"balance/{i}"] for row in rows[:3]] for i in moe_layers]  # the fourth row is empty
    close(out.aux["balance_loss"], np.mean(balance), "balance")
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


# What must hold of gradients, of the compiled program and of the interface, on the smallest model that has every part.
PAIR = MICRO.replace(num_hidden_layers=2, mlp_layer_types=("dense", "sparse"), indexer_types=("full", "shared"))
WAYS = {"dense": PAIR, "gathered": gathered(PAIR).replace(remat="full"), "dots": PAIR.replace(remat="dots")}
LENGTH = 24
DISTINCT = np.random.default_rng(0).permutation(MICRO.vocab_size)[None, :LENGTH].astype(np.int32)


@functools.cache
def pair_params() -> Any:
    return random_params(PAIR, 5)


@functools.cache
def gradient_of(way: str) -> Any:
    """Compiled (params, weights) -> (value, gradient) of a weighted sum of all logits and of the balance loss."""
    def objective(params, weights):
        out = glm5.forward(params, WAYS[way], DISTINCT, mtp_steps=1)
        return (out.logits * weights[0]).sum() + (out.mtp_logits * weights[1]).sum() + out.aux["balance_loss"]

    return jax.jit(jax.value_and_grad(objective))


@functools.cache
def language_gradient(way: str) -> Any:
    weights = np.random.default_rng(1).normal(size=(2, LENGTH, MICRO.vocab_size)).astype(np.float32)
    weights[1, LENGTH - 1] = 0  # the MTP layer's last row means nothing
    return gradient_of(way)(pair_params(), weights)


def leaves(tree: Any) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


@pytest.mark.parametrize("way", ["gathered", "dots"])
def test_paths_and_remat_policies_agree_in_values_and_gradients(way):
    (value, gradient), (true_value, truth) = language_gradient(way), language_gradient("dense")
    np.testing.assert_allclose(value, true_value, rtol=1e-5)
    for (name, a), b in zip(leaves(gradient).items(), leaves(truth).values()):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(np.abs(b).max(), 1), err_msg=name)


@pytest.mark.parametrize("way", ["dense", "gathered"])
def test_language_model_loss_leaves_indexer_and_correction_bias_alone(way):
    for name, gradient in leaves(language_gradient(way)[1]).items():
        untouched = "/indexer/" in name or name.endswith("router_bias")
        assert gradient.any() != untouched, name


@pytest.mark.parametrize("way", ["dense", "gathered"])
def test_causality_by_gradient(way):
    """Logits of rows up to t read no later token; the MTP step reads one more. Every token is another table row."""
    weights = np.zeros((2, LENGTH, MICRO.vocab_size), np.float32)
    for t in (0, 9, 20):
        for which, ahead in ((0, 0), (1, 1)):
            mine = weights.copy()
            mine[which, t] = np.random.default_rng(t).normal(size=MICRO.vocab_size)
            table = np.asarray(gradient_of(way)(pair_params(), mine)[1]["embedding"]) - balance_only(way)
            read = np.abs(table[DISTINCT[0]]).max(-1)
            assert read[t + ahead] > 1e-3
            assert (read[t + ahead + 1:] < 1e-6).all(), (t, which)


@functools.cache
def balance_only(way: str) -> np.ndarray:
    """What the balance loss, which reads every token, gives the table."""
    nothing = np.zeros((2, LENGTH, MICRO.vocab_size), np.float32)
    return np.asarray(gradient_of(way)(pair_params(), nothing)[1]["embedding"])


def indexer_kl(config: Any, kind: str) -> Any:
    def loss(params):
        return sum(glm5.forward(params, config, DISTINCT, mtp_steps=1, indexer_loss=kind).collected.values())

    return jax.jit(jax.grad(loss))


@pytest.mark.parametrize("kind, way", [("dense", "dense"), ("sparse", "gathered")])
def test_indexer_loss_trains_the_indexer_alone(kind, way):
    gradient = indexer_kl(WAYS[way], kind)(pair_params())
    for name, leaf in leaves(gradient).items():
        assert leaf.any() == ("/indexer/" in name), name

    # Finite differences of the NumPy model in float64, both layers that share the indexer and the MTP layer's own.
    tensors = {name: np.asarray(value, np.float64) for name, value in glm5.to_hf(PAIR, pair_params()).items()}
    ours = glm5.to_hf(PAIR, gradient)

    def loss(name, index, step):
        moved = tensors | {name: tensors[name].copy()}
        moved[name][index] += step
        (row,) = reference.rows(PAIR, moved, DISTINCT, indexer_loss=kind)
        own = sum(row.found[f"indexer_kl/{i}"][0].mean() for i in range(2))
        (known, _, kl), = row.mtp(1)
        return own + kl[0][known].mean()

    for layer, what, index in ((0, "wq_b.weight", (3, 4)), (0, "wk.weight", (2, 5)), (0, "k_norm.bias", (1,)),
                               (0, "k_norm.weight", (6,)), (0, "weights_proj.weight", (1, 3)), (2, "wk.weight", (0, 0)),
                               (2, "weights_proj.weight", (0, 9))):
        name = f"model.layers.{layer}.self_attn.indexer.{what}"
        slope = (loss(name, index, 1e-6) - loss(name, index, -1e-6)) / 2e-6
        np.testing.assert_allclose(ours[name][index], slope, rtol=2e-3, atol=2e-5, err_msg=name)


def shapes_in(text: str) -> list[tuple[int, ...]]:
    """Every array shape named in the text of a compiled program."""
    return [tuple(map(int, dims.split(","))) for dims in re.findall(r"\w\d+\[([\d,]+)\]", text)]


def test_logits_nobody_reads_are_not_computed():
    config = PAIR.replace(vocab_size=1009, num_nextn_predict_layers=0)
    params = abstract(glm5.param_specs(config))

    def vocabulary_arrays(fn):
        text = jax.jit(fn).lower(params).compile().as_text()
        return {shape for shape in shapes_in(text) if 1009 in shape and set(shape) - {1, 1009, config.hidden_size}}

    forward = lambda params: glm5.forward(params, config, DISTINCT)
    assert vocabulary_arrays(lambda params: forward(params).logits)
    assert not vocabulary_arrays(lambda params: forward(params).hidden)
    assert not vocabulary_arrays(jax.grad(lambda params: forward(params).hidden.sum()))


@functools.cache
def long_gradient(length: int) -> Any:
    config = gathered(MICRO).replace(num_hidden_layers=1, mlp_layer_types=("sparse",), indexer_types=("full",),
                                     remat="full", query_chunk=64, num_nextn_predict_layers=0)
    params = abstract(glm5.param_specs(config))
    loss = lambda params, tokens: (lambda out: out.hidden.sum() + sum(out.collected.values()))(
        glm5.forward(params, config, tokens, indexer_loss="sparse"))
    return jax.jit(jax.grad(loss)).lower(params, jax.ShapeDtypeStruct((1, length), jnp.int32)).compile()


def test_memory_of_the_sparse_path_grows_with_the_length():
    """Forward and backward, indexer loss included, hold O(T k + chunk (S + k (heads + latent))), never T x S."""
    short, long = 2048, 4096
    temporary = [long_gradient(length).memory_analysis().temp_size_in_bytes for length in (short, long)]
    assert temporary[1] < 2.5 * temporary[0]
    assert temporary[1] < 4 * long * long / 2  # half of a single float32 [T, S] array
    largest = max(int(np.prod(shape)) for shape in shapes_in(long_gradient(long).as_text()))
    assert largest < long * long / 8


def equations(jaxpr: Any) -> Iterator[Any]:
    """The equations of a jaxpr and of all within."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("released", [glm5.glm5, glm5.glm5_2])
@pytest.mark.parametrize("what", ["forward", "gradient", "indexer loss", "cache"])
def test_program_size_does_not_depend_on_the_depth(released, what):
    narrow = {name: getattr(MICRO, name) for name in (
        "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "n_routed_experts",
        "num_experts_per_tok", "num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim",
        "qk_rope_head_dim", "v_head_dim", "index_n_heads", "index_head_dim", "index_topk")}
    sizes = []
    for depth in (8, 78):
        config = released(**narrow, num_hidden_layers=depth, mlp_layer_types=released().mlp_layer_types[:depth],
                          indexer_types=released().indexer_types[:depth])
        params = abstract(glm5.param_specs(config))
        run = {
            "forward": lambda p: glm5.forward(p, config, DISTINCT, mtp_steps=3),
            "gradient": jax.grad(lambda p: glm5.forward(p, config, DISTINCT, mtp_steps=1).mtp_logits.sum()),
            "indexer loss": lambda p: glm5.forward(p, config, DISTINCT, indexer_loss="sparse"),
            "cache": lambda p: glm5.forward(p, config, DISTINCT, cache=glm5.init_cache(config, 1, 30))}[what]
        jaxpr = jax.make_jaxpr(run)(params)
        sizes.append((len(str(jaxpr)), sum(1 for _ in equations(jaxpr.jaxpr))))
    assert sizes[0][1] > 300
    assert sizes[1][0] <= 1.5 * sizes[0][0] and sizes[1][1] <= 1.5 * sizes[0][1], sizes


@pytest.mark.parametrize("way", ["dense", "gathered"])
def test_bfloat16_model_keeps_norms_softmax_router_and_scores_in_float32(way):
    config = WAYS[way].replace(dtype="bfloat16")
    run = lambda params: glm5.forward(params, config, DISTINCT, mtp_steps=1, indexer_loss="sparse", collect=COLLECT)
    by_name: dict[str, set[str]] = {}
    for equation in equations(jax.make_jaxpr(run)(pair_params()).jaxpr):
        by_name.setdefault(equation.primitive.name, set()).update(
            str(x.aval.dtype) for x in equation.invars if jnp.issubdtype(x.aval.dtype, jnp.floating))
    for name in ("exp", "log", "rsqrt", "top_k", "cos", "sin"):
        assert by_name[name] == {"float32"}, name
    assert "float32" in by_name["logistic"]
    assert "bfloat16" in by_name["dot_general"]
    shapes = jax.eval_shape(run, pair_params())
    assert {str(shapes.logits.dtype), str(shapes.collected["index_scores/0"].dtype),
            str(shapes.collected["router/1/weights"].dtype)} == {"float32"}
    assert shapes.hidden.dtype == jnp.bfloat16


def test_bfloat16_model_is_near_the_float32_model():
    short = DISTINCT[:, :PAIR.index_topk]  # every key is selected, whatever the rounding
    low, high = (glm5.forward(pair_params(), PAIR.replace(dtype=dtype), short) for dtype in ("bfloat16", "float32"))
    scale = float(jnp.abs(high.logits).max())
    np.testing.assert_allclose(low.logits, high.logits, rtol=0, atol=0.05 * scale)


def test_collected_keys_and_shapes():
    run = lambda **options: jax.eval_shape(lambda: glm5.forward(pair_params(), PAIR, TOKENS, **options)).collected
    B, T = TOKENS.shape
    K, A = PAIR.index_topk, PAIR.num_experts_per_tok
    hidden = {"hidden/0": (B, T, 16), "hidden/1": (B, T, 16), "hidden/final_norm": (B, T, 16)}
    scores, selected = {"index_scores/0": (B, T, T)}, {"selected/0": (B, T, K), "selected/1": (B, T, K)}
    router = {"router/1/experts": (B * T, A), "router/1/weights": (B * T, A)}
    shapes = lambda found: {name: value.shape for name, value in found.items()}
    assert run() == {}
    assert shapes(run(collect=("hidden",))) == hidden
    assert shapes(run(collect=["index_scores"])) == scores
    assert shapes(run(collect={"selected"})) == selected
    assert shapes(run(collect=("router", "router"))) == router
    assert shapes(run(collect=COLLECT, indexer_loss="sparse")) == (
        hidden | scores | selected | router | {"indexer_kl/0": (), "indexer_kl/1": ()})
    assert shapes(run(indexer_loss="dense", mtp_steps=2)) == {f"indexer_kl/{i}": () for i in range(3)}


def test_holes_and_interleaved_documents_change_nothing():
    """The rank within the segment is the position, wherever in the row the segment's tokens stand."""
    segments = np.array([[int(i) for i in "1110111111100111111101111111"],
                         [int(i) for i in "7737330337737733377707337337"]], np.int32)
    row, straight, alone = np.full((2, 28), 5, np.int32), np.full((2, 28), 9, np.int32), np.zeros((2, 28), np.int32)
    for b, ids in ((0, (1,)), (1, (3, 7))):
        start = 0
        for i in ids:
            size = (segments[b] == i).sum()
            row[b, segments[b] == i] = straight[b, start:start + size] = DISTINCT[0, :size] + i
            alone[b, start:start + size] = i
            start += size
    row, straight = row % MICRO.vocab_size, straight % MICRO.vocab_size
    mixed = glm5.forward(pair_params(), PAIR, row, segment_ids=segments).logits
    apart = glm5.forward(pair_params(), PAIR, straight, segment_ids=alone).logits
    for b, i in ((0, 1), (1, 3), (1, 7)):
        np.testing.assert_allclose(mixed[b][segments[b] == i], apart[b][alone[b] == i], rtol=1e-4, atol=5e-5)


def test_dense_attention_needs_no_indexer():
    params = random_params(MICRO)
    run = lambda config, params=params, **options: np.asarray(glm5.forward(
        params, config, TOKENS[:1], segment_ids=SEGMENTS[:1], **options).logits)
    dense = run(MICRO, attention="dense")
    close(dense, reference.rows(MICRO, glm5.to_hf(MICRO, params), TOKENS[:1], segments=SEGMENTS[:1],
                                indexer_loss="dense")[0].logits[None], "logits")
    assert np.abs(run(MICRO) - dense).max() > 1e-3  # the selection leaves keys out
    np.testing.assert_array_equal(run(gathered(MICRO).replace(query_chunk=MICRO.query_chunk), attention="dense"), dense)
    spoiled = jax.tree_util.tree_map_with_path(
        lambda path, x: x * np.nan if "indexer" in jax.tree_util.keystr(path) else x, params)
    np.testing.assert_array_equal(run(MICRO, spoiled, attention="dense"), dense)


def test_dense_attention_with_a_cache_leaves_its_index_keys():
    params, tokens = random_params(MICRO), TOKENS[:1]
    cache = glm5.init_cache(MICRO, 1, 17)
    whole = glm5.forward(params, MICRO, tokens, cache=cache, attention="dense").cache
    sparse = glm5.forward(params, MICRO, tokens, cache=cache).cache
    assert np.abs(sparse.index_keys_NBSC[0]).max() > 0.1
    # Two programs: a compiler may round the same keys differently.
    np.testing.assert_allclose(whole.index_keys_NBSC[0], sparse.index_keys_NBSC[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("indexer_loss", ["dense", "sparse"])
def test_nan_scores_are_counted_and_not_visible(indexer_loss):
    params = jax.tree.map(lambda x: x, pair_params())
    planted = params["layers"]["0"]["indexer"]["weights"]
    params["layers"]["0"]["indexer"]["weights"] = planted.at[..., 0, 0].set(jnp.nan)
    out = glm5.forward(params, PAIR, DISTINCT, collect=("selected",), indexer_loss=indexer_loss)
    assert out.aux["index_nan"] == LENGTH * (LENGTH + 1) // 2  # every visible pair of the one indexer
    assert (out.collected["selected/0"] == -1).all() and (out.collected["selected/1"] == -1).all()
    assert jnp.isfinite(out.logits).all()
    assert out.collected["indexer_kl/0"] == out.collected["indexer_kl/1"] == 0


def test_unembed_gives_the_logits():
    for config in (MICRO, RICH):
        params = random_params(config)
        hidden = np.random.default_rng(0).normal(size=(2, 3, config.hidden_size)).astype(np.float32)
        table = params["embedding"].T if config.tie_word_embeddings else params["head"]
        logits = glm5.unembed(params, config, hidden)
        np.testing.assert_allclose(logits, hidden @ np.asarray(table), rtol=1e-4, atol=1e-5)
    out = glm5.forward(pair_params(), PAIR, DISTINCT)
    np.testing.assert_allclose(glm5.unembed(pair_params(), PAIR, out.hidden), out.logits, rtol=1e-5, atol=1e-5)


def test_a_second_call_compiles_nothing(caplog):
    def compiled(**options):
        caplog.clear()
        with jax.log_compiles():
            glm5.forward(pair_params(), PAIR, DISTINCT, **options)
        return [record.getMessage() for record in caplog.records if "Compiling" in record.getMessage()]

    glm5.forward(pair_params(), PAIR, DISTINCT)
    assert not compiled() and not compiled(collect=[])
    assert compiled(segment_ids=np.ones((1, LENGTH), np.int32))
    assert not compiled(segment_ids=np.full((1, LENGTH), 2, np.int32))


def test_init_follows_the_specs_and_the_key():
    params = glm5.init(PAIR, jax.random.key(0))
    specs = glm5.param_specs(PAIR)
    jax.tree.map(lambda x, s: (x.shape, str(x.dtype)) == (s.shape, s.dtype) or pytest.fail(str(s)), params, specs)
    table = np.asarray(params["embedding"])
    assert abs(table.std() - PAIR.initializer_range) < 0.1 * PAIR.initializer_range and abs(table.mean()) < 2e-3
    assert (params["norm"] == 1).all() and not params["layers"]["1"]["moe"]["router_bias"].any()
    other = glm5.init(PAIR, jax.random.key(1))
    assert not np.array_equal(other["embedding"], table)


@pytest.mark.parametrize("options, message", [
    (dict(tokens=np.zeros(3, np.int32)), "tokens"), (dict(tokens=np.zeros((1, 3))), "tokens"),
    (dict(tokens=np.full((1, 24), PAIR.vocab_size, np.int32)), "tokens"),
    (dict(tokens=np.full((1, 24), -1, np.int32)), "tokens"), (dict(tokens=np.zeros((1, 0), np.int32)), "tokens"),
    (dict(positions=np.zeros((1, 3), np.int32)), "positions"), (dict(positions=np.zeros((1, 24))), "positions"),
    (dict(segment_ids=np.zeros(24, np.int32)), "segment_ids"), (dict(indexer_loss="both"), "indexer_loss"),
    (dict(attention="both"), "attention"), (dict(attention="dense", indexer_loss="sparse"), "indexer_loss"),
    (dict(collect=("logits",)), "collect"), (dict(mtp_steps=-1), "mtp_steps")])
def test_errors_name_the_argument(options, message):
    with pytest.raises(ValueError, match=f"^{message}:"):
        glm5.forward(pair_params(), PAIR, **{"tokens": DISTINCT, **options})
