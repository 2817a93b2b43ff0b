"""The public model API against transformers: tests/golden holds the checkpoints and the values (its README.md)."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

import glm5_jax as glm5

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
NAMES = sorted(path.parent.name for path in GOLDEN.glob("*/expected.npz"))
COLLECT = ("hidden", "index_scores", "selected", "router")

TOLERANCE = 2e-4           # absolute, on logits and hidden states of order 1 to 10
LOSS_TOLERANCE = 5e-5
GRADIENT_TOLERANCE = 1e-3  # of the gradient's norm, tensor by tensor
MTP_STEPS = 3
MTP_LOSS_WEIGHT = 0.3

# The gathered path by every other implementation of its kernels than the one chosen on a CPU, which is "xla".
NAMED = ("reference", "pallas_tpu", "pallas_gpu")
BY_NAME = [pytest.param(path, marks=pytest.mark.slow) for path in NAMED]
PLAIN_BY_NAME = [pytest.param("plain", path, marks=pytest.mark.slow) for path in NAMED]
ON_SOME_PATHS = [(name, "dense") for name in NAMES] + [("plain", "gathered"), ("sharing", "gathered"), *PLAIN_BY_NAME]


@dataclasses.dataclass(frozen=True)
class Golden:
    """One checkpoint as the library loads it, and what transformers computes from it."""

    directory: pathlib.Path
    config: Any
    params: Any
    expected: Mapping[str, np.ndarray]

    def under(self, prefix: str) -> dict[str, np.ndarray]:
        return {name: value for name, value in self.expected.items() if name.startswith(prefix)}

    @property
    def mtp_steps(self) -> int:
        return MTP_STEPS if self.under("mtp_logits/") else 0

    def on(self, path: str) -> Any:
        """The config for the dense path, or for the gathered one with blocks of queries that do not fill the length."""
        if path == "dense":
            return self.config
        kernels = {} if path == "gathered" else {"kernels": path, "interpret_kernels": path.startswith("pallas")}
        return dataclasses.replace(self.config, dense_attention_max_len=0, query_chunk=7, remat="full", **kernels)


@functools.cache
def load(name: str) -> Golden:
    directory = GOLDEN / name
    with np.load(directory / "expected.npz") as file:
        expected = dict(file)
    config, params = glm5.load_hf(
        directory, dtype=jnp.float32, latent_norm_eps=float(expected.pop("latent_norm_eps")))
    return Golden(directory, dataclasses.replace(config, dtype="float32", remat="none"), params, expected)


@functools.cache
def compiled(config: Any, collect: tuple[str, ...] = (), **options: Any) -> Callable[..., Any]:
    def run(params, tokens, **arrays):
        return glm5.forward(params, config, tokens, collect=collect, **options, **arrays)

    return jax.jit(run)


@functools.cache
def full_forward(name: str, path: str) -> Any:
    """Everything at once: collecting and the indexer's sparse loss may change nothing else."""
    golden = load(name)
    run = compiled(golden.on(path), COLLECT, mtp_steps=golden.mtp_steps, indexer_loss="sparse")
    return run(golden.params, golden.expected["tokens"])


@functools.cache
def mixed_rows(name: str, path: str) -> Any:
    """Row 0: 17 tokens of the first sequence, all of the second, 3 of padding. Row 1: 20 of padding, the second."""
    golden = load(name)
    first, second = golden.expected["tokens"]
    padding = np.full(20, 7, np.int32)
    rows = np.stack([np.concatenate([first[:17], second, padding[:3]]), np.concatenate([padding, second])])
    segments = np.stack([np.repeat([1, 2, 0], [17, 24, 3]), np.repeat([0, 1], [20, 24])]).astype(np.int32)
    return compiled(golden.on(path), ("selected",))(golden.params, rows, segment_ids=segments)


@pytest.fixture(autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture
def golden(name) -> Golden:
    return load(name)


@pytest.fixture(params=["dense", "gathered", *BY_NAME])
def path(request) -> str:
    return request.param


@pytest.fixture
def full(name, path) -> Any:
    return full_forward(name, path)


def assert_close(actual: jax.Array, expected: np.ndarray, what: str, atol: float = TOLERANCE) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol, err_msg=what)


def assert_same_keys(actual: jax.Array, expected: np.ndarray, what: str) -> None:
    """Equal selections; the wider one may only add -1."""
    shared = min(actual.shape[-1], expected.shape[-1])
    np.testing.assert_array_equal(actual[..., :shared], expected[..., :shared], err_msg=what)
    assert (np.asarray(actual)[..., shared:] == -1).all() and (expected[..., shared:] == -1).all(), what


def sorted_by_expert(experts: jax.Array, weights: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(experts, axis=-1)
    return np.take_along_axis(np.asarray(experts), order, -1), np.take_along_axis(np.asarray(weights), order, -1)


def test_golden_cases_are_all_there():
    assert NAMES == ["groups", "mtp", "plain", "sharing", "tied_bias", "wide"]


def test_logits_and_hidden(golden, full):
    assert full.logits.dtype == jnp.float32
    assert_close(full.logits, golden.expected["logits"], "logits")
    assert_close(full.hidden, golden.expected["hidden/final_norm"], "hidden")
    for name, expected in golden.under("hidden/").items():
        assert_close(full.collected[name], expected, name)


def test_selection(golden, full):
    assert golden.config.index_topk < golden.expected["tokens"].shape[1]
    for name, expected in golden.under("index_scores/").items():
        actual = full.collected[name]
        np.testing.assert_array_equal(jnp.isneginf(actual), np.isneginf(expected), err_msg=name)
        assert_close(actual, expected, name)
    for name, expected in golden.under("selected/").items():
        assert full.collected[name].dtype == jnp.int32
        assert_same_keys(full.collected[name], expected, name)
    own = {name for name in full.collected if name.startswith("selected/")}
    assert golden.under("selected/").keys() <= own


def test_routing(golden, full):
    layers = [name.split("/")[1] for name in golden.under("router/") if name.endswith("experts")]
    assert layers
    for layer in layers:
        experts, weights = sorted_by_expert(
            full.collected[f"router/{layer}/experts"], full.collected[f"router/{layer}/weights"])
        np.testing.assert_array_equal(experts, golden.expected[f"router/{layer}/experts"], err_msg=f"layer {layer}")
        assert_close(weights, golden.expected[f"router/{layer}/weights"], f"layer {layer}", atol=2e-5)


def test_multi_token_prediction(path):
    golden, output = load("mtp"), full_forward("mtp", path)
    assert output.mtp_logits.shape[0] == output.mtp_hidden.shape[0] == MTP_STEPS
    for step in range(1, MTP_STEPS + 1):
        expected = golden.expected[f"mtp_logits/{step}"]
        rows = expected.shape[1]  # the last `step` rows lack the token they look ahead to
        assert_close(output.mtp_logits[step - 1, :, :rows], expected, f"logits of step {step}")
        assert_close(output.mtp_hidden[step - 1, :, :rows], golden.expected[f"mtp_hidden/{step}"], f"step {step}")


def next_token_loss(logits: jax.Array, tokens: np.ndarray, ahead: int) -> jax.Array:
    rows = tokens.shape[1] - ahead
    log_p = jax.nn.log_softmax(logits[:, :rows])
    return -jnp.mean(jnp.take_along_axis(log_p, jnp.asarray(tokens)[:, ahead:, None], axis=-1))


def losses(golden: Golden, output: Any) -> dict[str, jax.Array]:
    tokens = golden.expected["tokens"]
    result = {"loss": next_token_loss(output.logits, tokens, 1)}
    if golden.mtp_steps:
        steps = [next_token_loss(output.mtp_logits[k], tokens, k + 2) for k in range(golden.mtp_steps)]
        result["mtp_loss"] = sum(steps) / golden.mtp_steps
    return result


def test_loss(golden, full):
    for what, value in losses(golden, full).items():
        assert_close(value, golden.expected[what], what, atol=LOSS_TOLERANCE)


@functools.cache
def gradients(name: str, path: str) -> dict[str, np.ndarray]:
    golden = load(name)
    config = golden.on(path)

    def objective(params):
        parts = losses(golden, glm5.forward(params, config, golden.expected["tokens"], mtp_steps=golden.mtp_steps))
        return parts["loss"] + MTP_LOSS_WEIGHT * parts.get("mtp_loss", 0.0)

    return glm5.to_hf(config, jax.jit(jax.grad(objective))(golden.params))


WITH_GRADIENTS = [(name, "dense") for name in ("groups", "mtp", "plain", "sharing", "tied_bias")] + [
    ("mtp", "gathered"), ("plain", "gathered"), *PLAIN_BY_NAME]


@pytest.mark.parametrize("name, path", WITH_GRADIENTS)
def test_gradients(name, path):
    actual = gradients(name, path)
    expected = {what.removeprefix("grad/"): value for what, value in load(name).under("grad/").items()}
    trained = {what for what in actual if not what.endswith("e_score_correction_bias")}
    assert trained == expected.keys()
    for what in sorted(trained):
        gradient, truth = np.asarray(actual[what]), expected[what]
        assert gradient.shape == truth.shape, what
        assert np.linalg.norm(gradient - truth) <= GRADIENT_TOLERANCE * np.linalg.norm(truth), what


@pytest.mark.parametrize("name, path", WITH_GRADIENTS)
def test_language_model_loss_leaves_indexers_alone(name, path):
    indexer = {what: value for what, value in gradients(name, path).items() if ".indexer." in what}
    assert indexer
    for what, gradient in indexer.items():
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient), err_msg=what)


def assert_indexer_kl(golden: Golden, output: Any, kind: str) -> None:
    expected = golden.under(f"indexer_kl/{kind}/")
    assert expected
    for name, value in expected.items():
        assert_close(output.collected[f"indexer_kl/{name.rpartition('/')[2]}"], value, name, atol=LOSS_TOLERANCE)


def test_sparse_indexer_kl(golden, full):
    assert_indexer_kl(golden, full, "sparse")


@pytest.mark.parametrize("name", ["plain", "sharing", "wide"])
def test_dense_indexer_kl(golden):
    output = compiled(golden.config, indexer_loss="dense")(golden.params, golden.expected["tokens"])
    assert_indexer_kl(golden, output, "dense")


def cached(golden: Golden, config: Any, tokens: np.ndarray, chunks: list[int]) -> Any:
    """Logits and selections of a run through a cache, chunk by chunk; the cache is longer than it must be."""
    run, cache = compiled(config, ("selected",)), glm5.init_cache(config, tokens.shape[0], tokens.shape[1] + 3)
    logits, selected = [], []
    for start, stop in zip(np.cumsum([0, *chunks[:-1]]), np.cumsum(chunks)):
        output = run(golden.params, tokens[:, start:stop], cache=cache)
        cache = output.cache
        logits.append(output.logits)
        selected.append({name: output.collected[name] for name in golden.under("selected/")})
    assert stop == tokens.shape[1]
    return np.concatenate(logits, axis=1), selected


@pytest.mark.parametrize("chunks", [[1] * 24, [11, 1, 1, 11]], ids=["token by token", "uneven chunks"])
@pytest.mark.parametrize("name, path", ON_SOME_PATHS)
def test_cache_equals_full_forward(golden, path, chunks):
    logits, selected = cached(golden, golden.on(path), golden.expected["tokens"], chunks)
    assert_close(logits, golden.expected["logits"], "logits")
    for name, expected in golden.under("selected/").items():
        start = 0
        for part in selected:
            stop = start + part[name].shape[1]
            assert_same_keys(part[name], expected[:, start:stop], f"{name} of queries {start} to {stop}")
            start = stop


@pytest.mark.parametrize("chunks", [[1] * 13 + [11], [11, 1, 1, 11]], ids=["token by token", "uneven chunks"])
@pytest.mark.parametrize("path", ["dense", "gathered"])
def test_multi_token_prediction_through_a_cache(path, chunks):
    """A row whose lookahead lies in its own chunk is complete, whatever came before through the cache."""
    golden = load("mtp")
    config = golden.on(path)
    tokens, start = golden.expected["tokens"], 0
    cache = glm5.init_cache(config, tokens.shape[0], tokens.shape[1] + 3)
    for size in chunks:
        stop = start + size
        output = compiled(config, mtp_steps=MTP_STEPS)(golden.params, tokens[:, start:stop], cache=cache)
        for step in range(1, MTP_STEPS + 1):
            complete = max(size - step, 0)
            expected = golden.expected[f"mtp_logits/{step}"][:, start:start + complete]
            assert_close(output.mtp_logits[step - 1, :, :complete], expected, f"step {step}, tokens {start} to {stop}")
        cache, start = output.cache, stop
    assert start == tokens.shape[1]


@pytest.mark.parametrize("name, path", ON_SOME_PATHS)
def test_packed_equals_unpacked(golden, path):
    output = mixed_rows(golden.directory.name, path)
    assert_close(output.logits[0, :17], golden.expected["logits"][0, :17], "first segment")
    assert_close(output.logits[0, 17:41], golden.expected["logits"][1], "second segment")
    for name, expected in golden.under("selected/").items():
        keys = np.asarray(output.collected[name][0])
        assert_same_keys(keys[:17], expected[0, :17], name)
        assert_same_keys(keys[17:41], np.where(expected[1] < 0, -1, expected[1] + 17), name)
        assert (keys[41:] == -1).all(), name


@pytest.mark.parametrize("name, path", ON_SOME_PATHS)
def test_left_padding_changes_nothing(golden, path):
    output = mixed_rows(golden.directory.name, path)
    assert_close(output.logits[1, 20:], golden.expected["logits"][1], "logits")
    for name, expected in golden.under("selected/").items():
        keys = np.asarray(output.collected[name][1])
        assert (keys[:20] == -1).all(), name
        assert_same_keys(keys[20:], np.where(expected[1] < 0, -1, expected[1] + 20), name)


@pytest.mark.parametrize("name, path", [(name, "dense") for name in NAMES] + [("sharing", "gathered")])
def test_greedy_generation(golden, path):
    expected = golden.expected["greedy"]
    result = glm5.generate(golden.params, golden.on(path), golden.expected["prompts"], temperature=0.0,
                           prompt_lengths=golden.expected["prompt_lengths"], max_new_tokens=expected.shape[1])
    np.testing.assert_array_equal(result.tokens, expected)
    np.testing.assert_array_equal(result.lengths, np.full(len(expected), expected.shape[1]))


def read_tensors(directory: pathlib.Path) -> dict[str, jax.Array]:
    tensors = {}
    for shard in sorted(directory.glob("*.safetensors")):
        with safe_open(shard, "flax") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}
    return tensors


def assert_bitwise(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        a, b = np.asarray(actual[name]), np.asarray(expected[name])
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), name


def test_saving_what_was_loaded_changes_no_bit(golden, tmp_path):
    original = read_tensors(golden.directory)
    config, params = glm5.load_hf(golden.directory)
    assert_bitwise(glm5.to_hf(config, params), original)
    glm5.save_hf(tmp_path, config, params)
    assert_bitwise(read_tensors(tmp_path), original)
    again, params_again = glm5.load_hf(tmp_path)
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, params_again, params)


def test_latent_norm_eps_defaults_to_the_training_codes(golden):
    config, _ = glm5.load_hf(golden.directory)
    assert config.latent_norm_eps == config.rms_norm_eps == 1e-5
    assert golden.config.latent_norm_eps == 1e-6
