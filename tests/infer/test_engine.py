"""The engine against forward passes over whole sequences, whatever is submitted, aborted and pushed in between."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm5_jax as glm5
from glm5_jax.infer import slots as device
from glm5_jax.infer.engine import Engine
from glm5_jax.infer.request import RequestTooLong, Result, Sampling
from tests.infer.replay import assert_ended, assert_replays, CONFIG, log_softmax, MAX_LEN, params

IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
OPTIONS = {"slots": 3, "max_len": MAX_LEN, "chunk": 4, "block": 3}


def engine(**options: Any) -> Engine:
    return Engine(params(), CONFIG, **(OPTIONS | options))


def finish(one: Engine) -> dict[int, Result]:
    while one.step():
        pass
    return {result.request: result for result in one.results()}


def random_request(rng: np.random.Generator) -> tuple[list[int], Sampling]:
    ids = rng.integers(0, CONFIG.vocab_size, rng.integers(1, 13)).tolist()
    temperature = float(rng.choice([0.0, 0.7, 1.0, 1.5]))
    return ids, Sampling(int(rng.integers(1, 9)), temperature=temperature, top_p=float(rng.choice([0.6, 0.9, 1.0])),
                         top_k=int(rng.choice([0, 0, 1, 5])), seed=int(rng.integers(8)),
                         stop_ids=rng.choice(16, rng.integers(0, 3), replace=False).tolist())


def test_mixed_requests_replay():
    one, rng = engine(), np.random.default_rng(0)
    asked = [random_request(rng) for _ in range(40)]
    numbers = [one.submit(*request) for request in asked]
    assert (one.waiting, one.running) == (40, 0)
    results = finish(one)
    assert sorted(results) == numbers and (one.waiting, one.running) == (0, 0)
    assert_replays(asked, [results[number] for number in numbers])
    for number, (_, sampling) in zip(numbers, asked):
        assert_ended(sampling, results[number].completion)
    assert {result.completion.stop.value for result in results.values()} == {"stop", "length"}


def test_greedy_equals_generate():
    prompts = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (3, 7)).astype(np.int32)
    expected = glm5.generate(params(), CONFIG, prompts, max_new_tokens=6, temperature=0.0)
    one = engine()
    for prompt in prompts:
        one.submit(prompt, Sampling(6, temperature=0.0))
    results = finish(one)
    for number in range(3):
        np.testing.assert_array_equal(results[number].completion.ids, expected.tokens[number])
        np.testing.assert_allclose(results[number].completion.logprobs, expected.logprobs[number], atol=1e-5)


def test_a_request_is_the_same_in_any_company():
    """Alone in the first slot, and in another one amid others that come and go."""
    asked = [random_request(np.random.default_rng(seed)) for seed in range(12)]
    alone = {}
    for number, request in enumerate(asked):
        one = engine()
        one.submit(*request)
        alone[number] = finish(one)[0]
    crowded, rng = engine(), np.random.default_rng(5)
    for number, request in enumerate(asked):
        crowded.submit(*request)
        for _ in range(rng.integers(0, 3)):
            crowded.step()
    for number, result in finish(crowded).items():
        done, by_itself = result.completion, alone[number].completion
        assert (done.ids, done.stop, done.versions) == (by_itself.ids, by_itself.stop, by_itself.versions)
        np.testing.assert_allclose(done.logprobs, by_itself.logprobs, atol=1e-6)
        np.testing.assert_allclose(result.model_logprobs, alone[number].model_logprobs, atol=1e-6)


@pytest.mark.parametrize("session", [None, "chat"])
def test_abort_and_resume_equals_the_uninterrupted_run(session):
    sampling = Sampling(10, temperature=1.2, seed=3)
    whole = finish_one(engine(), IDS, sampling)
    for steps in range(1, 12):  # the prompt is fed in three chunks, the last of them before the first token
        one = engine(block=1)
        number = one.submit(IDS, sampling, session=session)
        for _ in range(steps):
            one.step()
        so_far = one.progress(number)
        partial = one.abort(number).completion
        assert so_far.completion == partial
        assert partial.stop == "abort" and len(partial.ids) == max(steps - 2, 0)
        rest = finish_one(one, [*IDS, *partial.ids], sampling, session=session, drawn=len(partial.ids))
        assert rest.reused == (0 if session is None else min(4 * steps, 10) + max(steps - 2, 0))
        joined = partial + rest.completion
        assert joined.ids == whole.completion.ids and joined.stop == whole.completion.stop
        np.testing.assert_allclose(joined.logprobs, whole.completion.logprobs, atol=1e-5)


def finish_one(one: Engine, *arguments: Any, **options: Any) -> Result:
    number = one.submit(*arguments, **options)
    return finish(one)[number]


def test_counts_by_hand():
    """A prompt of 11, whose last token is fed with the first draw; then that, the answer and one more, of which the
    cache has 14; then a push, which has all of it fed again."""
    one = engine()
    first = finish_one(one, IDS, Sampling(4, temperature=0), session="chat")
    assert dataclasses.astuple(one.counts) == (4, 10, 0, 0)
    number = one.submit([*IDS, *first.completion.ids, 2], Sampling(4, temperature=0), session="chat")
    while not one.progress(number).completion.ids:
        one.step()
    drawn = one.counts.drawn - 4
    assert dataclasses.astuple(one.counts) == (4 + drawn, 10 + 1, 14, 0)
    one.pause()
    one.push_weights(params(1), version=1)
    one.resume("recompute")
    finish(one)
    assert dataclasses.astuple(one.counts) == (8, 11 + 15 + drawn, 14, 15 + drawn)


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_row_that_another_engine_read_is_as_good_as_its_own(drafts):
    """All but the last of the ids is found in the cache, and the tokens are the same."""
    sampling, ids = Sampling(9, temperature=1.2, seed=4), IDS
    expected = finish_one(engine(drafts=drafts), ids, sampling)
    reader, drawer = engine(drafts=drafts), engine(drafts=drafts)
    assert reader.hand_over("chat") is None
    finish_one(drawer, IDS[:3], Sampling(2), session="other")
    finish_one(reader, ids, Sampling(1), session="chat")
    held, row = reader.hand_over("chat")
    assert list(held) == ids
    assert drawer.adopt("chat", held, row, version=0)
    result = finish_one(drawer, ids, sampling, session="chat")
    assert result.reused == len(ids) - 1 - (drafts if result.reused < len(ids) - 1 else 0)
    assert result.completion.ids == expected.completion.ids
    np.testing.assert_allclose(result.completion.logprobs, expected.completion.logprobs, atol=1e-5)


def test_a_row_that_cannot_be_adopted():
    reader, drawer = engine(), engine(slots=1)
    finish_one(reader, IDS, Sampling(1), session="chat")
    held, row = reader.hand_over("chat")
    assert not drawer.adopt("chat", held, row, version=1)
    with pytest.raises(ValueError, match="row: expected one of an engine of this config"):
        engine(max_len=MAX_LEN - 1).adopt("chat", held, row, version=0)
    drawer.submit(IDS, Sampling(12, temperature=0))
    drawer.step()
    assert not drawer.adopt("chat", held, row, version=0)


def test_progress_since_a_token():
    one = engine(block=2)
    number = one.submit(IDS, Sampling(8, seed=1))
    while len(one.progress(number).completion.ids) < 4:
        one.step()
    whole, rest = one.progress(number), one.progress(number, since=3)
    assert rest.completion.ids == whole.completion.ids[3:] and rest.model_logprobs == whole.model_logprobs[3:]
    assert rest.completion.versions == whole.completion.versions[3:] and rest.completion.stop == "abort"


@pytest.mark.parametrize("program", ["prefill", "decode"])
def test_a_program_that_fails_takes_the_cache_along_and_no_token(monkeypatch, program):
    """What it was given is gone, as after running out of memory."""
    expected = finish_one(engine(block=2), IDS, Sampling(9, seed=2))
    one, calls, real = engine(block=2), [], getattr(device, program)

    def failing(params, config, cache, *rest):
        calls.append(None)
        if len(calls) == 2:
            jax.tree.map(lambda x: x.delete(), cache)
            raise RuntimeError("out of memory")
        return real(params, config, cache, *rest)

    monkeypatch.setattr(device, program, failing)
    number = one.submit(IDS, Sampling(9, seed=2))
    with pytest.raises(RuntimeError, match="out of memory"):
        finish(one)
    result = finish(one)[number]
    assert result.completion.ids == expected.completion.ids
    np.testing.assert_allclose(result.completion.logprobs, expected.completion.logprobs, atol=1e-5)


def test_a_waiting_request_can_be_aborted():
    one = engine(slots=1)
    first, second, third = (one.submit(IDS, Sampling(4, seed=seed)) for seed in range(3))
    one.step()
    assert one.abort(second).completion.ids == ()
    assert list(finish(one)) == [first, third]


def test_abort_of_no_such_request():
    one = engine()
    number = one.submit(IDS, Sampling(1))
    finish(one)
    for request, state in ((number, "has ended"), (number + 1, "never submitted"), (-1, "never submitted")):
        for look in (one.abort, one.progress):
            with pytest.raises(LookupError, match=f"found {request}, .*{state}"):
                look(request)


def test_a_conversation_is_fed_once():
    """Each turn extends the one before; one that departs from it starts where they part."""
    one, fresh, ids = engine(chunk=3), engine(), IDS[:4]
    held = 0
    for turn in range(3):
        sampling = Sampling(3, seed=turn)
        result = finish_one(one, ids, sampling, session="a")
        assert result.reused == held
        assert result.completion.ids == finish_one(fresh, ids, sampling).completion.ids
        assert_replays([(ids, sampling)], [result])
        held = len(ids) + 2  # the newest token is not in the cache yet
        ids = [*ids, *result.completion.ids, turn, 7]
    departed = [*ids[:6], (ids[6] + 1) % 16, 2]
    assert finish_one(one, departed, Sampling(2), session="a").reused == 6
    shorter = departed[:5]
    result = finish_one(one, shorter, Sampling(4, seed=1), session="a")
    assert result.reused == 4  # the last token is fed for its logits
    assert_replays([(shorter, Sampling(4, seed=1))], [result])
    assert finish_one(one, shorter, Sampling(2), session="b").reused == 0
    assert finish_one(one, shorter, Sampling(2)).reused == 0


def test_the_oldest_session_gives_way():
    one = engine(slots=3)
    reused = lambda session: finish_one(one, IDS, Sampling(1), session=session).reused
    assert [reused(session) for session in "abc"] == [0, 0, 0]
    assert reused("a") == 10
    assert finish_one(one, IDS, Sampling(1)).reused == 0  # in the place of b
    assert [reused(session) for session in "ac"] == [10, 10]
    assert reused("d") == 0  # in the slot that belongs to no session
    assert [reused(session) for session in "ac"] == [10, 10]
    assert reused("b") == 0  # in the place of d
    assert [reused(session) for session in "acb"] == [10, 10, 10]


def test_two_requests_of_a_session_at_once():
    one, asked = engine(), [(IDS, Sampling(4, seed=seed)) for seed in range(2)]
    numbers = [one.submit(*request, session="a") for request in asked]
    results = finish(one)
    assert_replays(asked, [results[number] for number in numbers])


def test_a_push_stamps_what_comes_after():
    sampling = Sampling(9, seed=1)
    one = engine(block=1)
    finish_one(one, IDS, Sampling(1), session="old")
    number = one.submit(IDS, sampling)
    for version, steps in ((2, 5), (5, 2), (6, 0)):
        for _ in range(steps):
            one.step()
        one.pause()
        assert not one.step() and not one.results()
        one.push_weights(params(version), version)
        one.resume("recompute")
    result = finish(one)[number]
    assert result.completion.versions == (0,) * 3 + (6,) * 6 and one.version == 6
    assert_replays([(IDS, sampling)], [result])
    assert finish_one(one, IDS, sampling, session="old").reused == 0


def test_keep_goes_on_with_the_old_cache():
    """Against calls of `forward` on a cache: keys of the old weights, queries of the new."""
    sampling, kept, drawn = Sampling(5, temperature=0.0), [], []
    one, ids = engine(block=1), IDS[:5]  # of which one chunk feeds all but the last
    number, cache = one.submit(ids, sampling, session="a"), glm5.init_cache(CONFIG, 1, MAX_LEN)
    for token in ids[:-1]:
        cache = glm5.forward(params(), CONFIG, jnp.asarray([[token]], jnp.int32), cache=cache).cache
    last = ids[-1]
    for step in range(5):
        if step == 2:
            one.pause()
            one.push_weights(params(1), 1)
            one.resume("keep")
        one.step()
        out = glm5.forward(params(int(step >= 2)), CONFIG, jnp.asarray([[last]], jnp.int32), cache=cache)
        cache, last = out.cache, int(out.logits[0, 0].argmax())
        kept.append(log_softmax(np.asarray(out.logits[0, 0])).max())
        drawn.append(last)
    result = {result.request: result for result in one.results()}[number]
    assert list(result.completion.ids) == drawn and result.completion.versions == (0, 0, 1, 1, 1)
    np.testing.assert_allclose(result.completion.logprobs, kept, atol=1e-5)
    assert finish_one(one, [*ids, *drawn], Sampling(1), session="a").reused == len(ids) + 4


def test_a_pause_without_a_push_changes_nothing():
    sampling = Sampling(6, seed=2)
    one = engine(block=1)
    expected = finish_one(one, IDS, sampling, session="a")
    one.submit(IDS, sampling, session="a")
    for _ in range(3):
        one.step()
        one.pause()
        one.resume("recompute")
    (result,) = finish(one).values()
    assert result.completion.ids == expected.completion.ids and result.reused == 10


def test_a_push_is_refused_whole():
    one = engine()
    with pytest.raises(RuntimeError, match="pause"):
        one.push_weights(params(1), 1)
    one.pause()
    one.push_weights(params(1), 3)
    for version in (3, 2):
        with pytest.raises(ValueError, match="version: expected above 3"):
            one.push_weights(params(2), version)
    halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params(2))
    with pytest.raises(ValueError, match="params: embedding: expected float32 .* found bfloat16"):
        one.push_weights(halves, 4)
    with pytest.raises(ValueError, match="params: norm: .* found none"):
        one.push_weights({name: x for name, x in params(2).items() if name != "norm"}, 4)
    with pytest.raises(ValueError, match="cache: expected 'keep' or 'recompute'"):
        one.resume("forget")
    one.resume()
    result = finish_one(one, IDS, Sampling(3))
    assert result.completion.versions == (3, 3, 3)


def test_weights_that_are_not_finite_are_reported():
    one = engine()
    one.pause()
    one.push_weights(jax.tree.map(lambda x: x * jnp.nan, params()), 1)
    one.resume()
    number = one.submit(IDS, Sampling(3), session="a")
    with pytest.raises(FloatingPointError, match=f"request {number}: .* version 1"):
        finish(one)
    assert one.abort(number).completion.ids == ()
    one.pause()
    one.push_weights(params(2), 2)
    one.resume()
    asked = (IDS[:3], Sampling(3))
    result = finish_one(one, *asked, session="a")
    assert_replays([asked], [result])


def test_a_slot_that_met_nan_is_made_anew():
    one, asked = engine(slots=1), (IDS, Sampling(3, seed=1))
    spoil = lambda x: x * jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else x
    one._cache = jax.tree.map(spoil, one._cache)
    number = one.submit(*asked, session="a")
    with pytest.raises(FloatingPointError, match=f"request {number}: "):
        finish(one)
    assert_replays([asked], [finish(one)[number]])
    assert_replays([asked], [finish_one(one, *asked, session="a")])


def test_programs_are_compiled_once(caplog):
    """A thousand requests of every kind after the first one: no program is compiled."""
    one, rng = engine(), np.random.default_rng(7)

    def serve(count: int) -> None:
        for number in range(count):
            ids, sampling = random_request(rng)
            session = int(rng.integers(6)) if rng.random() < 0.5 else None
            request = one.submit(ids, sampling, session=session)
            if rng.random() < 0.05:
                one.abort(request)
            if rng.random() < 0.01:
                one.pause()
                one.push_weights(params(one.version + 1), one.version + 1)
                one.resume(rng.choice(["keep", "recompute"]))
            if one.waiting > 4:
                one.step()
        finish(one)

    serve(1)
    sizes = device.prefill._cache_size(), device.decode._cache_size()
    with jax.log_compiles():
        caplog.clear()
        serve(1000)
        assert not compiled(caplog)
        assert (device.prefill._cache_size(), device.decode._cache_size()) == sizes
        one = engine(max_len=MAX_LEN - 1, chunk=3)  # the control: other shapes are compiled for, and that is seen
        serve(1)
    assert all(any(name in message for message in compiled(caplog)) for name in ("prefill", "decode"))
    assert (device.prefill._cache_size(), device.decode._cache_size()) == (sizes[0] + 1, sizes[1] + 1)


def compiled(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "Compiling" in record.getMessage()]


def test_memory_is_what_was_computed():
    for slots, max_len in ((1, 8), (3, MAX_LEN)):
        one = engine(slots=slots, max_len=max_len)
        held = sum(x.nbytes for x in jax.tree.leaves(one._cache))
        assert device.cache_bytes(CONFIG, slots, max_len) == held
    rows = 2 * (CONFIG.latent_dim + CONFIG.index_head_dim) * 4  # float32, two layers
    assert device.cache_bytes(CONFIG, 3, 100) - device.cache_bytes(CONFIG, 3, 99) == 3 * (rows + 2 * 4)


def test_a_full_slot():
    """Prompt and new tokens take all of `max_len`, in a cache that a longer request has left."""
    one = engine(slots=1)
    asked = [(IDS, Sampling(13, seed=1)), (IDS[:1], Sampling(23, seed=2)), (IDS[:2], Sampling(1)), (IDS, Sampling(13))]
    assert_replays(asked, [finish_one(one, *request) for request in asked])
    with pytest.raises(RequestTooLong, match="max_len = 24 .* 11 . 14 = 25"):
        one.submit(IDS, Sampling(14))
    with pytest.raises(ValueError, match="11 . 14 = 25"):
        one.submit([*IDS, 1], Sampling(14), drawn=1)


@pytest.mark.parametrize("ids, options, message", [
    ([], {}, "ids: expected a list"), ([[1, 2]], {}, "ids: expected a list"), ([1.5], {}, "ids: expected a list"),
    ([1, 16], {}, "ids: expected 0 to 15"), ([-1], {}, "ids: expected 0 to 15"),
    ([1, 2], {"drawn": 2}, "drawn"), ([1, 2, 3, 4], {"drawn": 3}, "drawn"), ([1], {"drawn": -1}, "drawn"),
    ([1], {"stop_ids": [16]}, "stop_ids"), ([1], {"stop_ids": range(9)}, "stop_ids")])
def test_a_bad_request_names_its_fault(ids, options, message):
    sampling = Sampling(3, stop_ids=options.get("stop_ids", ()))
    with pytest.raises(ValueError, match=message):
        engine().submit(ids, sampling, drawn=options.get("drawn", 0))


@pytest.mark.parametrize("field, value", [
    ("max_new_tokens", 0), ("temperature", -1.0), ("temperature", 1e-9), ("temperature", float("nan")), ("top_p", 0.0),
    ("top_p", 1.5), ("top_k", -1), ("seed", -1), ("seed", 2**32), ("stop_ids", [-1])])
def test_bad_sampling_names_its_field(field, value):
    with pytest.raises(ValueError, match=f"Sampling.{field}"):
        Sampling(**{"max_new_tokens": 1, field: value})


@pytest.mark.parametrize("option", ["slots", "max_len", "chunk", "block", "version"])
def test_a_bad_engine_names_its_option(option):
    with pytest.raises(ValueError, match=option):
        engine(**{option: -1})
