"""What an engine has to answer, from one forward pass over whole sequences: no cache, no batch, no schedule.

Token n of a request is drawn from the logits before it by a number made of the seed and n; this module makes the same
draw in NumPy from the logits of `forward` over all ids at once, and takes nothing from `glm5_jax.infer`.
"""

import functools
from typing import Any, Sequence

import jax
import numpy as np

import glm5_jax as glm5
from tests.model.reference import MICRO, random_params

CONFIG = MICRO.replace(vocab_size=16, num_hidden_layers=2, mlp_layer_types=("sparse", "sparse"),
                       indexer_types=("full", "full"))
MAX_LEN, ROWS, MODELS = 24, 32, 5
NEAR = 1e-5  # differences that rounding may turn


def params(version: int = 0) -> Any:
    """The weights of a version: one of a few models by turns."""
    return model(version % MODELS)


@functools.cache
def model(number: int) -> Any:
    return random_params(CONFIG, 50 + number)


@functools.cache
def shares(seed: int) -> np.ndarray:
    """By which every token of a request is drawn, [MAX_LEN]: where the running sum of the probabilities exceeds it."""
    draw = lambda n: jax.random.uniform(jax.random.fold_in(jax.random.key(seed), n))
    return np.asarray(jax.jit(jax.vmap(draw))(np.arange(MAX_LEN)))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def cut(log_p: np.ndarray, top_p: float, top_k: int) -> np.ndarray:
    """Token by token, the most likely first: none after the first top_k, none once the mass of these reaches top_p."""
    order = sorted(range(len(log_p)), key=lambda token: (-log_p[token], token))[:top_k or None]
    total, reached, kept = np.exp(log_p[order]).sum(), 0.0, []
    for token in order:
        if kept and top_p < 1 and reached >= top_p * total:
            break
        kept.append(token)
        reached += np.exp(log_p[token])
    out = np.full(len(log_p), -np.inf)
    out[kept] = log_softmax(log_p[kept])
    return out


def logits_of(weights: Any, rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Logits [rows, MAX_LEN, V] of whole sequences, and where rounding may decide which keys are selected [rows,
    MAX_LEN]: in some layer the last selected score and the first left out are nearer than NEAR."""
    found, close = [], []
    for start in range(0, len(rows), ROWS):
        tokens = np.zeros((ROWS, MAX_LEN), np.int32)
        for row, ids in zip(tokens, rows[start:start + ROWS]):
            row[:len(ids)] = ids
        out = glm5.forward(weights, CONFIG, tokens, collect=("index_scores",))
        found.append(np.asarray(out.logits))
        ranked = [np.sort(np.asarray(scores), -1)[..., ::-1] for scores in out.collected.values()]
        last, first_out = (np.stack([x[..., CONFIG.index_topk - 1 + i] for x in ranked]) for i in (0, 1))
        gaps = np.where(np.isneginf(first_out), np.inf, last - np.where(np.isneginf(first_out), 0, first_out))
        close.append(((gaps < NEAR) & (gaps > 0)).any(0))
    return np.concatenate(found)[:len(rows)], np.concatenate(close)[:len(rows)]


def assert_replays(asked: Sequence[tuple[Sequence[int], Any]], answered: Sequence[Any]) -> None:
    """Every token of every completion is the one that its stamped weights draw after all ids before it.

    `asked` are pairs of ids and sampling, `answered` the records `Result` in the same order. Where rounding may decide,
    between two tokens or between two keys of an indexer, a completion is followed no further; that is to be rare.
    """
    followed = dropped = 0
    rows = [(*ids, *result.completion.ids) for (ids, _), result in zip(asked, answered)]
    numbers = {version % MODELS for result in answered for version in result.completion.versions}
    logits, close = {}, {}
    for number in sorted(numbers):
        logits[number], close[number] = logits_of(model(number), rows)
    for i, ((ids, sampling), result) in enumerate(zip(asked, answered)):
        done = result.completion
        for n, (token, version) in enumerate(zip(done.ids, done.versions)):
            place = len(ids) + n - 1
            plain = log_softmax(logits[version % MODELS][i, place])
            if close[version % MODELS][i, :place + 1].any():
                dropped += 1
                break
            if sampling.temperature == 0:
                log_p, expected = plain, int(plain.argmax())
            else:
                log_p = cut(log_softmax(plain / sampling.temperature), sampling.top_p, sampling.top_k)
                ends, share = np.cumsum(np.exp(log_p)), shares(sampling.seed)[n]
                near = log_p[token] > -np.inf and (np.abs(ends[max(token - 1, 0):token + 1] - share) < NEAR).any()
                expected = token if near else int((ends > share).argmax())
            assert token == expected, (ids, sampling, done, n)
            np.testing.assert_allclose(done.logprobs[n], log_p[token], atol=1e-5)
            np.testing.assert_allclose(result.model_logprobs[n], plain[token], atol=1e-5)
            followed += 1
    assert dropped <= 1 + len(rows) // 10 and followed > 0


def assert_ended(sampling: Any, completion: Any) -> None:
    """Its end is the first stop id, or the limit."""
    stops = [n for n, token in enumerate(completion.ids) if token in sampling.stop_ids]
    if completion.stop == "stop":
        assert stops == [len(completion.ids) - 1]
    else:
        assert completion.stop == "length" and not stops and len(completion.ids) == sampling.max_new_tokens
