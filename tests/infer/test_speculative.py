"""Speculation changes the number of rounds and nothing else."""

import collections
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm5_jax as glm5
from glm5_jax.infer import slots as device
from glm5_jax.infer.engine import Engine
from glm5_jax.infer.request import Sampling
from tests.infer.replay import assert_ended, assert_replays, CONFIG, cut, log_softmax, logits_of, MAX_LEN, params
from tests.infer.test_engine import engine, finish, finish_one, IDS, OPTIONS, random_request


def test_mixed_requests_replay():
    """Token for token what plain decoding draws, greedy or sampled, with the log-probs of the model."""
    one, rng = engine(drafts=3), np.random.default_rng(3)
    asked = [random_request(rng) for _ in range(40)]
    numbers = [one.submit(*request, session=int(rng.integers(4))) for request in asked]
    results = finish(one)
    assert_replays(asked, [results[number] for number in numbers])
    for number, (_, sampling) in zip(numbers, asked):
        assert_ended(sampling, results[number].completion)
    assert 1 < one.accept_length <= 4


@pytest.mark.parametrize("prompt", [IDS, IDS[:1], IDS[:5]])
def test_drafts_are_those_of_the_layer(prompt):
    """After every block, whatever was accepted in it: those of forward passes over whole sequences."""
    one, blocks = engine(drafts=3), 0
    one.submit(prompt, Sampling(13, temperature=0.0))
    while one.step():
        if one.counts.drawn:
            slot, blocks = one._slots[0], blocks + 1
            assert one._drafts[0].tolist() == guesses(slot.ids[:slot.length].tolist(), 3)
    assert blocks > 1


@pytest.mark.parametrize("kept, after", [(9, 0), (9, 1), (9, 8), (5, 3), (2, 6)])
def test_drafts_of_a_row_that_was_cut_back(kept, after):
    """A session whose next request departs from the last one: its drafts are still those of the layer."""
    one = engine(drafts=3)
    first = finish_one(one, IDS, Sampling(6, temperature=0.0), session="a")
    ids = [*IDS[:kept], (IDS[kept] + 1) % 16, *IDS[:after]]
    if kept == 5:  # one that takes the slot and leaves before it is fed
        one.submit(IDS[:8], Sampling(1), session="a")
        one._admit()
        one.abort(1)
    number = one.submit(ids, Sampling(24 - len(ids), temperature=0.0), session="a")
    while not one.progress(number).completion.ids:
        one.step()
    slot = next(slot for slot in one._slots if slot.request)
    assert first.reused == 0 and slot.request.reused == (max(kept - 3, 0) if kept != 5 else 1)
    row = one._slots.index(slot)
    assert one._drafts[row].tolist() == guesses(slot.ids[:slot.length].tolist(), 3)


def guesses(ids: list[int], steps: int) -> list[int]:
    """Each from a forward pass over all ids and the guesses before it."""
    for k in range(steps):
        tokens = np.zeros((1, MAX_LEN + steps), np.int32)
        tokens[0, :len(ids)] = ids
        logits = glm5.forward(params(), CONFIG, tokens, mtp_steps=steps).mtp_logits
        ids = [*ids, int(logits[k, 0, len(ids) - k - 2].argmax())]
    return ids[-steps:]


def perfect() -> Any:
    """A trunk that knows the last token alone, and an MTP layer that says what the trunk will."""
    plain = jax.tree.map(lambda x: jnp.ones_like(x) if x.ndim == 1 else x, params())
    mute = lambda path, x: jnp.zeros_like(x) if path[-1].key in ("o", "down") else x
    plain = jax.tree_util.tree_map_with_path(mute, plain)
    width = CONFIG.hidden_size
    return plain | {"mtp": plain["mtp"] | {"projection": jnp.eye(2 * width, width)}}


@pytest.mark.parametrize("prompt", [IDS, IDS[:1]])
def test_right_drafts_are_all_accepted(prompt):
    """One round without drafts, which draws one token, then four tokens a round."""
    known = Engine(perfect(), CONFIG, **OPTIONS)
    for new in (1, 5, 9, 13):
        sampling, guessing = Sampling(new, temperature=0.0), Engine(perfect(), CONFIG, drafts=3, **OPTIONS)
        ids = finish_one(known, prompt, sampling).completion.ids
        assert len(set(ids)) > new // 5 and ids[0] != 0  # what a fresh engine guesses first, is zeros
        assert finish_one(guessing, prompt, sampling).completion.ids == ids
        assert guessing._rounds == 1 + (new - 1) // 4


def test_abort_and_resume():
    sampling = Sampling(10, temperature=1.2, seed=3)
    whole = finish_one(engine(), IDS, sampling).completion
    for steps in (3, 4):  # the first token is drawn in the third
        one = engine(drafts=3)
        number = one.submit(IDS, sampling, session="a")
        for _ in range(steps):
            one.step()
        partial = one.abort(number).completion
        assert len(partial.ids) >= 3 * (steps - 2)
        rest = finish_one(one, [*IDS, *partial.ids], sampling, session="a", drawn=len(partial.ids))
        assert (partial + rest.completion).ids == whole.ids


def test_frequencies_fit_the_distribution():
    """Three tokens, each among three, 1,000 times: chi-square against the probability of each of the 27 outcomes.

    The most likely third token is drafted rightly, whatever the second is.
    """
    prompt = IDS[:5]
    expected: dict[tuple[int, ...], float] = {(): 1.0}
    for n in range(3):
        logits, _ = logits_of(perfect(), [[*prompt, *outcome] for outcome in expected])
        logits = logits[:, len(prompt) + n - 1]
        log_p = [cut(row, 1.0, 3) for row in log_softmax(logits / 1.3)]
        expected = {(*outcome, int(token)): p * np.exp(row[token]) for (outcome, p), row in zip(expected.items(), log_p)
                    for token in np.flatnonzero(row > -np.inf)}
    one, count = Engine(perfect(), CONFIG, drafts=3, **OPTIONS), 1000
    for seed in range(count):
        one.submit(prompt, Sampling(3, temperature=1.3, top_k=3, seed=seed))
    drawn = collections.Counter(result.completion.ids for result in finish(one).values())
    assert len(expected) == 27 and drawn.keys() <= expected.keys() and one.accept_length > 1.2
    rare = {outcome for outcome, p in expected.items() if p * count < 5}
    pools = [[outcome] for outcome in expected.keys() - rare] + ([list(rare)] if rare else [])
    pairs = [(sum(drawn[outcome] for outcome in pool), count * sum(expected[outcome] for outcome in pool))
             for pool in pools]
    assert len(pools) > 10 and sum((found - mean) ** 2 / mean for found, mean in pairs) < quantile(len(pools) - 1)


def quantile(freedom: int) -> float:
    """Of chi-square, one in a thousand lies above; Wilson and Hilferty's approximation."""
    spread = 2 / (9 * freedom)
    return freedom * (1 - spread + 3.09 * spread**0.5) ** 3


def test_drafts_take_room_for_the_layer():
    one = engine(drafts=3)
    assert device.cache_bytes(CONFIG, 3, MAX_LEN, 3) == sum(x.nbytes for x in jax.tree.leaves(one._cache))
    assert device.cache_bytes(CONFIG, 3, MAX_LEN, 3) > device.cache_bytes(CONFIG, 3, MAX_LEN)


def test_too_many_drafts():
    for config, most in ((CONFIG, 3), (CONFIG.replace(num_nextn_predict_layers=0), 0)):
        with pytest.raises(ValueError, match=f"drafts: expected 0 to {most}"):
            Engine(params(), config, slots=1, max_len=8, drafts=most + 1)
    with pytest.raises(ValueError, match="drafts"):
        engine(drafts=-1)
    with pytest.raises(ValueError, match="chunk: expected at least 3, found 2"):
        engine(drafts=3, chunk=2)
