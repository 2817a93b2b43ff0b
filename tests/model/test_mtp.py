"""Multi-token prediction: the steps through a cache, and what they may look at."""

import functools
from typing import Any

import jax
import numpy as np
import pytest

import glm5_jax as glm5
from tests.model.reference import MICRO as BASE, random_params

LENGTH, CHUNK, ROOM, STEPS = 24, 8, 26, 3
MICRO = BASE.replace(num_hidden_layers=1, mlp_layer_types=("dense",), indexer_types=("full",))
GATHERED = MICRO.replace(dense_attention_max_len=0, query_chunk=5)
TOKENS = np.random.default_rng(2).integers(0, MICRO.vocab_size, (2, LENGTH)).astype(np.int32)


@functools.cache
def params() -> Any:
    return random_params(MICRO, 4)


def run(tokens: np.ndarray, cache: Any = None, segments: np.ndarray | None = None, steps: int = STEPS,
        config: Any = MICRO) -> Any:
    segments = np.ones(tokens.shape, np.int32) if segments is None else segments
    return glm5.forward(params(), config, tokens, segment_ids=segments, cache=cache, mtp_steps=steps)


@functools.cache
def full() -> Any:
    return run(TOKENS)


def assert_rows(out: Any, start: int, stop: int, steps: int = STEPS, expected: Any = None) -> None:
    """Positions start..stop of the full run, those of each step whose lookahead lies before stop."""
    expected = full() if expected is None else expected
    for k in range(1, steps + 1):
        rows = max(stop - start - k, 0)
        for field in ("mtp_hidden", "mtp_logits"):
            np.testing.assert_allclose(getattr(out, field)[k - 1, :, :rows],
                                       getattr(expected, field)[k - 1, :, start:start + rows], rtol=1e-4, atol=5e-5,
                                       err_msg=f"{field} of step {k}, rows {start} to {start + rows}")


@pytest.mark.parametrize("config", [MICRO, GATHERED], ids=["dense", "gathered"])
def test_later_calls_complete_the_rows(config):
    """A chunk's first rows attend to keys of the step that only this chunk's tokens could complete."""
    cache, start = glm5.init_cache(config, 2, ROOM), 0
    for size in (CHUNK, 1, 1, CHUNK):
        out = run(TOKENS[:, start:start + size], cache, config=config)
        assert_rows(out, start, start + size)
        cache, start = out.cache, start + size


def test_a_call_without_steps_loses_only_what_is_no_longer_remembered():
    """One token came in without MTP: of three remembered ones, the first two steps miss nothing."""
    cache = run(TOKENS[:, :CHUNK], glm5.init_cache(MICRO, 2, ROOM)).cache
    out = run(TOKENS[:, CHUNK:CHUNK + 1], cache, steps=0)
    assert out.mtp_logits is None and out.mtp_hidden is None
    out = run(TOKENS[:, CHUNK + 1:2 * CHUNK + 1], out.cache)
    np.testing.assert_allclose(out.logits, full().logits[:, CHUNK + 1:2 * CHUNK + 1], rtol=1e-4, atol=5e-5)
    assert_rows(out, CHUNK + 1, 2 * CHUNK + 1, steps=STEPS - 1)


def test_fewer_steps_are_the_first_ones():
    out = run(TOKENS, steps=1)
    assert out.mtp_logits.shape == (1, 2, LENGTH, MICRO.vocab_size)
    np.testing.assert_allclose(out.mtp_logits[0], full().mtp_logits[0], rtol=1e-4, atol=5e-5)


def test_rows_of_different_lengths_and_holes():
    cache, done = glm5.init_cache(MICRO, 2, ROOM), np.array([0, 0])
    for pattern in ([[1] * 8, [1, 1, 1, 0, 0, 0, 0, 0]], [[0, 1, 1, 0, 1, 0, 1, 1], [1, 0, 1, 1, 1, 1, 0, 1]],
                    [[0, 0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0]]):
        segments = np.array(pattern, np.int32)
        block = np.full((2, CHUNK), 9, np.int32)
        for b in range(2):
            block[b, segments[b] != 0] = TOKENS[b, done[b]:done[b] + segments[b].sum()]
        out = run(block, cache, segments)
        for b in range(2):
            mine, size = segments[b] != 0, segments[b].sum()
            for k in range(1, STEPS + 1):
                rows = max(size - k, 0)
                np.testing.assert_allclose(
                    np.asarray(out.mtp_hidden)[k - 1, b, mine][:rows],
                    full().mtp_hidden[k - 1, b, done[b]:done[b] + rows], rtol=1e-4, atol=5e-5, err_msg=f"{b} {k}")
            done[b] += size
        cache = out.cache


def test_packed_documents_never_look_into_the_next():
    row = np.stack([np.concatenate([TOKENS[0, :10], TOKENS[1, :14]]), np.concatenate([TOKENS[1, :20], TOKENS[0, :4]])])
    cuts, segments = (10, 20), np.array([[1] * 10 + [2] * 14, [3] * 20 + [4] * 4], np.int32)
    out = run(row, segments=segments)
    for b, (cut, first, second) in enumerate(zip(cuts, (0, 1), (1, 0))):
        for k in range(1, STEPS + 1):
            np.testing.assert_allclose(out.mtp_hidden[k - 1, b, :cut - k], full().mtp_hidden[k - 1, first, :cut - k],
                                       rtol=1e-4, atol=5e-5)
            rest = LENGTH - cut - k
            np.testing.assert_allclose(out.mtp_hidden[k - 1, b, cut:cut + rest],
                                       full().mtp_hidden[k - 1, second, :rest], rtol=1e-4, atol=5e-5)


def test_steps_without_the_layer_or_the_room_are_errors():
    with pytest.raises(ValueError, match="mtp_steps: .*num_nextn_predict_layers"):
        glm5.forward(params(), MICRO.replace(num_nextn_predict_layers=0), TOKENS, mtp_steps=1)
    with pytest.raises(ValueError, match="mtp_steps: .* 3, found 4"):
        run(TOKENS, glm5.init_cache(MICRO, 2, ROOM), steps=4)
    with pytest.raises(ValueError, match="mtp_steps"):
        run(TOKENS, steps=-1)


def test_any_number_of_steps_shares_the_parameters():
    specs = glm5.param_specs(MICRO)["mtp"]
    shapes = jax.eval_shape(lambda: glm5.forward(params(), MICRO, TOKENS, mtp_steps=7))
    assert shapes.mtp_logits.shape == (7, 2, LENGTH, MICRO.vocab_size)
    assert shapes.mtp_hidden.shape == (7, 2, LENGTH, MICRO.hidden_size)
    assert specs["layer"]["input_norm"].shape == (MICRO.hidden_size,)  # not stacked by steps
