"""`generate` against a loop without a cache, and sampling against its own stated distribution."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm5_jax as glm5
from glm5_jax.infer.sampler import log_distribution, most_likely, pick
from tests.model.reference import MICRO, random_params

distribution = jax.jit(log_distribution)
CONFIG = MICRO.replace(vocab_size=12, num_hidden_layers=1, mlp_layer_types=("sparse",), indexer_types=("full",),
                       num_nextn_predict_layers=0)
NEW, LENGTH = 6, 7
PROMPTS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, LENGTH)).astype(np.int32)
LENGTHS = np.array([7, 1, 4], np.int32)


@functools.cache
def params() -> Any:
    return random_params(CONFIG, 3)


@functools.cache
def logits_after(tokens: tuple[int, ...]) -> np.ndarray:
    """Next-token logits after `tokens`, of one forward without a cache; always of one shape."""
    row = np.zeros((1, LENGTH + NEW), np.int32)
    row[0, :len(tokens)] = tokens
    return np.asarray(glm5.forward(params(), CONFIG, row).logits[0, len(tokens) - 1])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def greedy_by_hand(prompt: np.ndarray, stop_ids: tuple[int, ...] = ()) -> tuple[list[int], list[float]]:
    tokens, new, logprobs = [int(t) for t in prompt], [], []
    for _ in range(NEW):
        logits = logits_after(tuple(tokens))
        new.append(int(logits.argmax()))
        logprobs.append(float(log_softmax(logits).max()))
        tokens.append(new[-1])
        if new[-1] in stop_ids:
            break
    return new, logprobs


def generate(**options: Any) -> Any:
    return glm5.generate(params(), CONFIG, PROMPTS, **{"prompt_lengths": LENGTHS, "max_new_tokens": NEW, **options})


def assert_rows(result: Any, rows: list[tuple[list[int], list[float]]]) -> None:
    assert result.tokens.dtype == result.lengths.dtype == jnp.int32 and result.logprobs.dtype == jnp.float32
    assert result.tokens.shape == result.logprobs.shape == (len(rows), NEW)
    for b, (tokens, logprobs) in enumerate(rows):
        blank = [0] * (NEW - len(tokens))
        assert int(result.lengths[b]) == len(tokens)
        np.testing.assert_array_equal(result.tokens[b], tokens + blank)
        np.testing.assert_allclose(result.logprobs[b], logprobs + blank, atol=1e-4)


def test_greedy_equals_a_loop_without_cache():
    """Generation crosses index_topk, and what stands behind a short prompt is never read."""
    expected = [greedy_by_hand(prompt[:n]) for prompt, n in zip(PROMPTS, LENGTHS)]
    result = generate(temperature=0.0)
    assert_rows(result, expected)
    other = PROMPTS.copy()
    other[1, 1:], other[2, 4:] = 11, 0
    again = glm5.generate(params(), CONFIG, other, prompt_lengths=LENGTHS, max_new_tokens=NEW, temperature=0.0)
    jax.tree.map(np.testing.assert_array_equal, result, again)


def test_stop_ids_end_a_row_and_count():
    free = [greedy_by_hand(prompt[:n])[0] for prompt, n in zip(PROMPTS, LENGTHS)]
    stops = (free[0][2], free[2][0])
    expected = [greedy_by_hand(prompt[:n], stops) for prompt, n in zip(PROMPTS, LENGTHS)]
    assert len(expected[2][0]) == 1 and len(expected[0][0]) <= 3
    assert_rows(generate(temperature=0.0, stop_ids=stops), expected)


def test_sampled_logprobs_are_those_of_the_distribution():
    key, temperature, top_p = jax.random.key(5), 0.7, 0.8
    result = generate(temperature=temperature, top_p=top_p, key=key)
    again = generate(temperature=temperature, top_p=top_p, key=key)
    jax.tree.map(np.testing.assert_array_equal, result, again)
    other = generate(temperature=temperature, top_p=top_p, key=jax.random.key(6))
    assert not np.array_equal(result.tokens, other.tokens)
    for b, n in enumerate(LENGTHS):
        tokens = [int(t) for t in PROMPTS[b, :n]]
        for token, logprob in zip(np.asarray(result.tokens[b]), np.asarray(result.logprobs[b])):
            expected = nucleus(log_softmax(logits_after(tuple(tokens)) / temperature), top_p)
            np.testing.assert_allclose(logprob, expected[token], atol=2e-4)
            tokens.append(int(token))


def nucleus(log_p: np.ndarray, top_p: float) -> np.ndarray:
    """By going through all sets: the smallest one whose mass reaches top_p, renormalised."""
    p = np.exp(log_p)
    for size in range(1, len(p) + 1):
        best = max(itertools.combinations(range(len(p)), size), key=lambda kept: (round(p[list(kept)].sum(), 9),
                                                                                  [-i for i in kept]))
        if p[list(best)].sum() >= top_p:
            break
    out = np.full(len(p), -np.inf)
    out[list(best)] = log_p[list(best)] - np.log(p[list(best)].sum())
    return out


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_nucleus_is_the_smallest_set(temperature):
    logits = np.random.default_rng(1).normal(size=(4, 7)).astype(np.float32) * 2
    logits[3] = [1, 1, 1, 1, 0, 0, 0]  # equal logits enter by token id
    for top_p in (0.05, 0.3, 0.6, 0.9, 0.999):
        actual = np.asarray(distribution(logits, temperature, top_p))
        for row, mine in zip(logits, actual):
            np.testing.assert_allclose(mine, nucleus(log_softmax(row / temperature), top_p), atol=1e-5)


def test_top_k_comes_before_the_nucleus():
    logits = np.random.default_rng(3).normal(size=(3, 7)).astype(np.float32) * 2
    logits[2] = [0, 1, 1, 1, 0, 1, 0]
    for top_k, top_p in itertools.product((1, 2, 6, 7, 100), (0.4, 0.9, 1.0)):
        for row, mine in zip(logits, np.asarray(distribution(logits, 0.8, top_p, top_k))):
            log_p = log_softmax(row / 0.8)
            among = np.argsort(-log_p, kind="stable")[:top_k]
            expected = np.full(7, -np.inf)
            expected[among] = nucleus(log_softmax(log_p[among]), top_p)
            np.testing.assert_allclose(mine, expected, atol=1e-5)


def test_rows_have_options_of_their_own():
    """A row is the same beside rows that are cut and beside rows that are not."""
    logits = np.random.default_rng(4).normal(size=(16, 40)).astype(np.float32)
    options = [np.tile(np.array(option), 4) for option in ([0.5, 1.0, 1.0, 2.0], [1.0, 0.7, 1.0, 0.9], [0, 0, 3, 4])]
    together = np.asarray(distribution(logits, *options))
    for b in range(16):
        alone = np.asarray(distribution(logits[b:b + 1], *(option[b] for option in options)))
        np.testing.assert_array_equal(np.isneginf(together[b]), np.isneginf(alone[0]))
        np.testing.assert_allclose(together[b], alone[0], atol=1e-6)


def test_a_whole_nucleus_is_the_plain_distribution():
    logits = np.random.default_rng(1).normal(size=(2, 7)).astype(np.float32)
    np.testing.assert_allclose(distribution(logits, 2.0, 1.0), [log_softmax(row / 2) for row in logits], atol=1e-6)


def test_frequencies_fit_the_distribution():
    """1,000 rows of one prompt, each with its own draw: chi-square of the first and of the second token."""
    rows, prompt = 1000, PROMPTS[0, :3]
    result = glm5.generate(params(), CONFIG, np.tile(prompt, (rows, 1)), max_new_tokens=2, temperature=1.5,
                           key=jax.random.key(0))
    first = np.asarray(result.tokens[:, 0])
    expected = np.exp(log_softmax(logits_after(tuple(int(t) for t in prompt)) / 1.5))
    assert chi_square(first, expected) < 31.3  # 11 degrees of freedom, one in a thousand
    common = int(np.bincount(first).argmax())
    second = np.asarray(result.tokens[first == common, 1])
    expected = np.exp(log_softmax(logits_after((*(int(t) for t in prompt), common)) / 1.5))
    assert chi_square(second, expected) < 31.3
    np.testing.assert_array_equal(result.lengths, 2)


def chi_square(drawn: np.ndarray, p: np.ndarray) -> float:
    counts = np.bincount(drawn, minlength=len(p))
    return float(((counts - p * len(drawn)) ** 2 / (p * len(drawn))).sum())


@pytest.mark.parametrize("vocabulary", [1, 63, 64, 65, 1000])
def test_pick_is_the_inverse_of_the_running_sum(vocabulary):
    """Against float64; half of the tokens have no weight, among them the first and the last, and whole blocks."""
    rng, rows = np.random.default_rng(vocabulary), 400
    weights = rng.exponential(size=(rows, vocabulary)).astype(np.float32) ** 4
    weights[:, rng.permutation(vocabulary)[vocabulary // 2 + 1:]] = 0
    if vocabulary > 1:
        weights[:, [0, -1]], weights[:, vocabulary // 2] = 0, 1
    if vocabulary > 200:
        weights[:, :130] = 0
    uniform = rng.random(rows, np.float32)
    uniform[:4] = 0, 2**-24, 1 - 2**-24, 0.5
    picked = np.asarray(jax.jit(pick)(weights, uniform))
    assert picked.dtype == np.int32 and (np.take_along_axis(weights, picked[:, None], 1) > 0).all()
    ends = np.cumsum(np.float64(weights), 1)
    ends /= ends[:, -1:]
    expected = (ends > uniform[:, None]).argmax(1)
    start, end = (np.take_along_axis(np.pad(ends, ((0, 0), (1, 0))), picked[:, None] + i, 1)[:, 0] for i in (0, 1))
    assert (picked == expected).mean() > 0.99
    assert (start <= uniform + 1e-6).all() and (uniform - 1e-6 < end).all()


def test_pick_where_rounding_leaves_nothing_to_exceed():
    """Of weights that are all alike their sum, or so small that a running sum does not see them."""
    weights = np.zeros((3, 130), np.float32)
    weights[0, 129], weights[1, [0, 100]], weights[2, 5] = 1e-30, [1, 1e-12], 3e38
    picked = jax.jit(pick)(weights, np.full(3, 1 - 2**-24, np.float32))
    np.testing.assert_array_equal(picked[jnp.array([0, 2])], [129, 5])
    assert picked[1] in (0, 100)


@pytest.mark.parametrize("vocabulary", [1, 64, 65, 1000])
def test_the_most_likely_is_the_first_of_the_largest(vocabulary):
    logits = np.random.default_rng(0).integers(-3, 3, (50, vocabulary)).astype(np.float32)
    logits[0] = -np.inf
    found = most_likely(logits)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, logits.argmax(1))


def test_one_new_token():
    result = generate(temperature=0.0, max_new_tokens=1)
    assert result.tokens.shape == (3, 1)
    np.testing.assert_array_equal(result.tokens[:, 0], [greedy_by_hand(p[:n])[0][0] for p, n in zip(PROMPTS, LENGTHS)])
    np.testing.assert_array_equal(result.lengths, [1, 1, 1])


def test_one_program_serves_all_temperatures_keys_and_lengths(caplog):
    generate(temperature=0.7, top_p=0.8, key=jax.random.key(5))
    options = [dict(temperature=t, top_p=p, key=jax.random.key(s)) for t, p, s in ((1.0, 1.0, 1), (0.2, 0.5, 2))]
    caplog.clear()
    with jax.log_compiles():
        for each in options:
            generate(**each, prompt_lengths=np.array([2, 3, 7]))
    compiled = [record.getMessage() for record in caplog.records if "Compiling" in record.getMessage()]
    assert not [message for message in compiled if "generate" in message or "forward" in message], compiled


@pytest.mark.parametrize("options, field", [
    (dict(), "key"), (dict(temperature=0.5), "key"), (dict(temperature=-1.0), "temperature"),
    (dict(temperature=0.0, top_p=0.0), "top_p"), (dict(temperature=0.0, top_p=1.5), "top_p"),
    (dict(temperature=0.0, max_new_tokens=0), "max_new_tokens"),
    (dict(temperature=0.0, prompt_lengths=np.array([0, 1, 1])), "prompt_lengths"),
    (dict(temperature=0.0, prompt_lengths=np.array([8, 1, 1])), "prompt_lengths"),
    (dict(temperature=0.0, prompt_lengths=np.array([1, 1])), "prompt_lengths")])
def test_errors_name_the_option(options, field):
    with pytest.raises(ValueError, match=field):
        generate(**options)


def test_prompts_must_be_rows():
    for wrong in (PROMPTS[0], PROMPTS[:, :0]):
        with pytest.raises(ValueError, match="prompts_BT"):
            glm5.generate(params(), CONFIG, wrong, max_new_tokens=1, temperature=0.0)
