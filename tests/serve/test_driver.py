"""An engine in its thread: streams, aborts, pushes, failures and the end, stepped by the test where order matters."""

import asyncio
import contextlib
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm5_jax as glm5
from glm5_jax.infer import slots
from glm5_jax.infer.engine import Engine
from glm5_jax.infer.request import RequestTooLong, Result, Sampling
from glm5_jax.records import Completion, StopReason, Trajectory
from glm5_jax.rl.assemble import rows
from glm5_jax.serve.driver import Driver
from glm5_jax.serve.gateway import Gateway, Options
from glm5_jax.serve.generator import Closed, EngineLost
from glm5_jax.text.tokenizer import Tokenizer
from tests.infer.replay import CONFIG, MAX_LEN, assert_replays, params
from tests.model.reference import random_params

IDS = [3, 1, 4, 1, 5]


class Counting:
    """Counts on from the last id, one token a step; the interface of `Engine`, and no model."""

    max_len, accept_length = 100, 1.0

    def __init__(self, slots: int = 2):
        self.version, self.steps, self.slots, self.paused = 0, 0, slots, False
        self.requests, self.ended, self.number = {}, [], 0
        self.error, self.looks = None, []

    def submit(self, ids, sampling, *, session=None, drawn=0):
        if len(ids) - drawn + sampling.max_new_tokens > self.max_len:
            raise RequestTooLong("too long")
        self.requests[self.number] = (ids[-1], sampling.max_new_tokens - drawn, [], [])
        self.number += 1
        return self.number - 1

    @property
    def running(self):
        return min(self.slots, len(self.requests))

    @property
    def waiting(self):
        return len(self.requests) - self.running

    def step(self):
        self.steps += 1
        if self.paused:
            return False
        for number in list(self.requests)[:self.running]:
            last, limit, new, versions = self.requests[number]
            new.append(last + len(new) + 1)
            versions.append(self.version)
            if len(new) == limit:
                self.ended.append(self._result(number, "length"))
                del self.requests[number]
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return bool(self.requests)

    def results(self):
        results, self.ended = self.ended, []
        return results

    def progress(self, number, since=0):
        result = self._result(number, "abort", since)
        self.looks.append(len(result.completion.ids))
        return result

    def abort(self, number):
        result = self._result(number, "abort")
        del self.requests[number]
        return result

    def pause(self):
        self.paused = True

    def push_weights(self, params, version):
        if version <= self.version:
            raise ValueError("an old version")
        self.version = version

    def resume(self, cache):
        self.paused = False

    def _result(self, number, stop, since=0):
        new, versions = (values[since:] for values in self.requests[number][2:])
        return Result(number, Completion(new, [-1.0] * len(new), versions, stop), [-1.0] * len(new))


def gated(engine):
    """The engine, and a semaphore: each step waits for one release of it. Steps that find nothing to do do not."""
    gate, step = threading.Semaphore(0), engine.step

    def gated_step():
        if engine.running + engine.waiting:
            gate.acquire()
        return step()

    engine.step = gated_step
    return engine, gate


@contextlib.asynccontextmanager
async def driving(engine, gate=None):
    """A driver, of which nothing is left afterwards."""
    before = threading.enumerate()
    driver = Driver(engine)
    assert len(threading.enumerate()) == len(before) + 1
    try:
        yield driver
    finally:
        for _ in range(1000 if gate else 0):
            gate.release()
        driver.close()
        assert threading.enumerate() == before


@contextlib.asynccontextmanager
async def held(driver):
    """What is sent meanwhile is done together, before the next step."""
    event = threading.Event()
    call = asyncio.create_task(driver.call(lambda engine: event.wait()))
    await asyncio.sleep(0)
    yield
    await asyncio.sleep(0)
    event.set()
    await call


async def whole(stream) -> Completion:
    found = await anext(stream)
    async for piece in stream:
        found += piece
    return found


async def standing(driver) -> tuple[int, int]:
    return await driver.call(lambda engine: (engine.running, engine.waiting))


def counted(first: int, count: int, stop: str = "length", version: int = 0) -> Completion:
    return Completion(range(first, first + count), [-1.0] * count, [version] * count, stop)


def engine(**options) -> Engine:
    return Engine(params(), CONFIG, **({"slots": 3, "max_len": MAX_LEN, "chunk": 4, "block": 3} | options))


def test_streams_of_the_engine_are_its_results():
    """More of them than slots, at once: each says what the engine alone says, and how its log-probs were drawn."""
    asked = [(IDS[:n % 5 + 1], Sampling(n % 7 + 1, seed=n)) for n in range(9)]

    async def run():
        async with driving(engine()) as driver:
            assert driver.max_len == MAX_LEN
            return await asyncio.gather(*(whole(driver.stream(ids, sampling, session=f"s{n}"))
                                          for n, (ids, sampling) in enumerate(asked)))

    streamed = asyncio.run(run())
    alone = engine()
    for ids, sampling in asked:
        alone.submit(ids, sampling)
    while alone.step():
        pass
    results = sorted(alone.results(), key=lambda result: result.request)
    for found, result in zip(streamed, results, strict=True):
        assert (found.ids, found.stop, found.versions) == (
            result.completion.ids, result.completion.stop, result.completion.versions)
        np.testing.assert_allclose(found.logprobs, result.completion.logprobs, atol=1e-6)


def test_pieces_come_step_by_step():
    async def run():
        one, gate = gated(Counting())
        async with driving(one, gate) as driver:
            stream = driver.stream([5], Sampling(3), session="a")
            for n in range(3):
                gate.release()
                assert await anext(stream) == counted(6 + n, 1, "length" if n == 2 else "abort")
            assert await anext(stream, None) is None

    asyncio.run(run())


def test_after_a_step_a_look_is_taken_at_what_is_new_in_the_slots():
    """And at nothing else: with long streams, and many that wait, that would take longer than the step."""
    async def run():
        one, gate = gated(Counting(slots=2))
        async with driving(one, gate) as driver:
            async with held(driver):
                streams = [asyncio.create_task(whole(driver.stream([10 * n], Sampling(4), session="a")))
                           for n in range(6)]
            for _ in range(12):
                gate.release()
            assert await asyncio.gather(*streams) == [counted(10 * n + 1, 4) for n in range(6)]
        assert len(one.looks) <= 12 * 2 and sum(one.looks) <= 6 * 4

    asyncio.run(run())


@pytest.mark.parametrize("way", ["aclose", "cancel"])
def test_who_is_gone_frees_the_slot(way):
    """Whether the request runs or still waits; the others go on."""
    async def run():
        one, gate = gated(Counting(slots=1))
        async with driving(one, gate) as driver:
            streams = [driver.stream([10 * n], Sampling(4), session="a") for n in range(3)]
            async with held(driver):
                first, second, third = [asyncio.create_task(anext(stream)) for stream in streams]
            gate.release()
            assert await first == counted(1, 1, "abort")
            async with held(driver):
                gate.release()  # for the step that is under way
                if way == "aclose":
                    await streams[0].aclose()
                else:
                    reading = asyncio.create_task(anext(streams[0]))
                    await asyncio.sleep(0)
                    reading.cancel()
                second.cancel()
            for _ in range(4):
                gate.release()
            assert await third + await whole(streams[2]) == counted(21, 4)
            assert await standing(driver) == (0, 0) and one.steps <= 2 + 4 + 2
            assert second.cancelled()

    asyncio.run(run())


def test_abort_ends_the_streams_of_one_session():
    async def run():
        one, gate = gated(Counting(slots=3))
        async with driving(one, gate) as driver:
            streams = [driver.stream([10 * n], Sampling(4), session=name) for n, name in enumerate("aba")]
            async with held(driver):
                tasks = [asyncio.create_task(anext(stream)) for stream in streams]
            gate.release()
            firsts = [await task for task in tasks]
            driver.abort("a")  # before the second step, or behind it where that has begun to wait
            driver.abort("nobody")
            for _ in range(4):
                gate.release()
            aborted, other, too = [first + await whole(stream) for first, stream in zip(firsts, streams)]
            assert other == counted(11, 4) and len(aborted.ids) == len(too.ids) in (1, 2)
            assert aborted == counted(1, len(aborted.ids), "abort") and too == counted(21, len(too.ids), "abort")
            assert await standing(driver) == (0, 0)

    asyncio.run(run())


def test_abort_and_resume_is_the_whole():
    """Invariant 4, with the engine's own noise."""
    async def run():
        one, gate = gated(engine())
        async with driving(one, gate) as driver:
            sampling = Sampling(9, seed=3)
            for _ in range(50):
                gate.release()
            uninterrupted = await whole(driver.stream(IDS, sampling, session="a"))
            while gate.acquire(blocking=False):
                pass
            stream = driver.stream(IDS, sampling, session="a")
            for _ in range(2):  # one step feeds the rest of the prompt
                gate.release()
            first = await anext(stream)
            driver.abort("a")
            for _ in range(50):
                gate.release()
            async for piece in stream:
                first += piece
            assert first.stop is StopReason.ABORT and 0 < len(first.ids) < 9
            rest = await whole(driver.stream([*IDS, *first.ids], sampling, session="a", drawn=len(first.ids)))
            assert (first + rest).ids == uninterrupted.ids
            np.testing.assert_allclose((first + rest).logprobs, uninterrupted.logprobs, atol=1e-5)

    asyncio.run(run())


@pytest.mark.parametrize("cache", ["keep", "recompute"])
def test_weights_are_pushed_under_streams_that_go_on(cache):
    """Invariant 8: versions never go back, and what is stamped with the new one is drawn by it."""
    async def run():
        one, gate = gated(engine())
        async with driving(one, gate) as driver:
            asked = [(IDS, Sampling(9, seed=seed)) for seed in range(2)]
            streams = [driver.stream(*each, session=f"s{n}") for n, each in enumerate(asked)]
            async with held(driver):
                tasks = [asyncio.create_task(anext(stream)) for stream in streams]
            gate.release()
            firsts = [await task for task in tasks]
            push = asyncio.create_task(driver.push(params(1), 1, cache))
            await asyncio.sleep(0)  # sent, while the second step waits for the gate
            for _ in range(50):
                gate.release()
            await push
            found = [first + await whole(stream) for first, stream in zip(firsts, streams)]
            assert await driver.call(lambda engine: engine.version) == 1 == driver.gauges.version
            return asked, found

    asked, found = asyncio.run(run())
    assert all(set(each.versions) == {0, 1} and list(each.versions) == sorted(each.versions) for each in found)
    if cache == "recompute":
        for (ids, _), each in zip(asked, found):
            start = each.versions.index(1)
            logits = glm5.forward(params(1), CONFIG, np.asarray([[*ids, *each.ids]], np.int32)).logits
            logprobs = jax.nn.log_softmax(logits.astype(jnp.float32))[0]
            for n in range(start, len(each.ids)):
                np.testing.assert_allclose(each.logprobs[n], logprobs[len(ids) + n - 1, each.ids[n]], atol=1e-4)


def test_a_push_that_is_refused_changes_nothing():
    async def run():
        async with driving(engine(version=4)) as driver:
            for version, cache, error in ((4, "keep", "version: expected above 4"), (5, "lose", "cache: expected")):
                with pytest.raises(ValueError, match=error):
                    await driver.push(params(1), version, cache)
            assert set((await whole(driver.stream(IDS, Sampling(3), session="a"))).versions) == {4}
            await driver.push(params(1), 6)
            assert set((await whole(driver.stream(IDS, Sampling(3), session="a"))).versions) == {6}

    asyncio.run(run())


def test_a_push_whose_cache_cannot_be_made_leaves_nobody_waiting(monkeypatch):
    """The weights are the new ones then, and the cache is made by the next step."""
    def no_room(*arguments):
        raise MemoryError("no room")

    async def run():
        async with driving(engine()) as driver:
            with monkeypatch.context() as patched:
                patched.setattr(slots, "empty", no_room)
                with pytest.raises(MemoryError, match="no room"):
                    await driver.push(params(1), 1)
                with pytest.raises(EngineLost, match="MemoryError: no room"):
                    await asyncio.wait_for(whole(driver.stream(IDS, Sampling(3), session="a")), 60)
            found = await whole(driver.stream(IDS, Sampling(3), session="a"))
            assert len(found.ids) == 3 and set(found.versions) == {1}

    asyncio.run(run())


def test_a_step_that_fails_fails_what_runs_and_nothing_else():
    """What ended in that step has its end; what waits gets its turn."""
    async def run():
        one, gate = gated(Counting(slots=2))
        async with driving(one, gate) as driver:
            async with held(driver):
                tasks = [asyncio.create_task(whole(driver.stream([10 * n], Sampling(limit), session="a")))
                         for n, limit in enumerate((1, 5, 5, 2))]
                one.error = RuntimeError("boom")
            for _ in range(20):
                gate.release()
            ended, second, third, fourth = await asyncio.gather(*tasks, return_exceptions=True)
            assert (ended, fourth) == (counted(1, 1), counted(31, 2))
            for lost in (second, third):  # the third got the slot of the first
                assert isinstance(lost, EngineLost) and "RuntimeError: boom" in str(lost)
            assert await standing(driver) == (0, 0)
            assert await whole(driver.stream([7], Sampling(2), session="a")) == counted(8, 2)

    asyncio.run(run())


def test_weights_that_give_no_numbers_are_told_and_can_be_replaced():
    async def run():
        async with driving(engine()) as driver:
            await driver.push(jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params()), 1)
            with pytest.raises(EngineLost, match="FloatingPointError: request 0: expected finite log-probs"):
                await whole(driver.stream(IDS, Sampling(3), session="a"))
            await driver.push(params(2), 2)
            found = await whole(driver.stream(IDS, Sampling(3), session="a"))
            assert_replays([(IDS, Sampling(3))], [Result(0, found, found.logprobs)])

    asyncio.run(run())


def test_a_step_that_fails_for_nobody_does_not_run_for_ever():
    async def run():
        one = Counting(slots=0)
        async with driving(one) as driver:
            one.error = RuntimeError("boom")
            with pytest.raises(EngineLost):
                await whole(driver.stream([1], Sampling(3), session="a"))
            failed = []

            def step():
                failed.append(len(failed))
                raise RuntimeError("always")

            one.step = step
            assert max([await driver.call(lambda engine: len(failed)) for _ in range(50)]) < 50

    asyncio.run(run())


def test_what_the_engine_refuses_is_raised_to_the_reader():
    async def run():
        async with driving(engine()) as driver:
            with pytest.raises(RequestTooLong, match="expected at most max_len = 24 in all"):
                await anext(driver.stream(IDS, Sampling(30), session="a"))
            with pytest.raises(ValueError, match="ids: expected 0 to 15"):
                await anext(driver.stream([99], Sampling(3), session="a"))
            assert await standing(driver) == (0, 0)

    asyncio.run(run())


def test_closing_ends_streams_and_calls_and_refuses_more():
    async def run():
        one, gate = gated(Counting(slots=1))
        async with driving(one, gate) as driver:
            streams = [driver.stream([10 * n], Sampling(9), session="a") for n in range(2)]
            tasks = [asyncio.create_task(whole(stream)) for stream in streams]
            await asyncio.sleep(0)
            closing = threading.Thread(target=driver.close)
            closing.start()
            while not driver.closed:
                await asyncio.sleep(0)
            gate.release()
            closing.join()
            for found in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(found, Closed)
            for use in (anext(driver.stream([1], Sampling(1), session="a")), driver.call(id), driver.push(None, 1)):
                with pytest.raises(Closed):
                    await use
            driver.abort("a")
            driver.release("a")

    asyncio.run(run())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ends_by_an_error_of_its_own_leaves_nobody_waiting():
    """Nor those whose request it had not come to."""
    async def run():
        one, entered, go = Counting(), threading.Event(), threading.Event()

        def step():
            entered.set()
            go.wait()
            one.results = None  # the driver cannot call that

        one.step = step
        driver = Driver(one)
        tasks = [asyncio.create_task(whole(driver.stream([1], Sampling(9), session="a")))]
        await asyncio.to_thread(entered.wait)
        for use in (whole(driver.stream([1], Sampling(9), session="b")), driver.call(id), driver.push(None, 1)):
            tasks.append(asyncio.create_task(use))
        await asyncio.sleep(0)  # all sent
        go.set()
        found = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)
        assert [type(each) for each in found] == [Closed] * 4 and driver.closed
        driver.close()

    asyncio.run(run())


def test_it_sleeps_where_there_is_nothing_to_do():
    """No more than one look at the engine for each thing that is sent."""
    async def run():
        one = Counting()
        async with driving(one) as driver:
            await whole(driver.stream([1], Sampling(3), session="a"))
            steps = [await driver.call(lambda engine: engine.steps) for _ in range(50)]
            assert steps[-1] - steps[0] <= 49 and steps[0] <= 5
            await driver.call(Counting.pause)
            task = asyncio.create_task(whole(driver.stream([1], Sampling(3), session="a")))
            steps = [await driver.call(lambda engine: engine.steps) for _ in range(50)]
            assert steps[-1] - steps[0] <= 49 and not task.done()
            await driver.call(lambda engine: engine.resume("keep"))
            assert await task == counted(2, 3)

    asyncio.run(run())


def test_loops_in_several_threads_lose_nothing():
    one = Counting(slots=3)
    driver, found = Driver(one), {}

    async def run(thread):
        found[thread] = await asyncio.gather(*(
            whole(driver.stream([thread * 1000 + n], Sampling(n % 4 + 1), session=f"{thread}")) for n in range(40)))

    threads = [threading.Thread(target=lambda thread=thread: asyncio.run(run(thread))) for thread in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    driver.close()
    assert found == {thread: [counted(thread * 1000 + n + 1, n % 4 + 1) for n in range(40)] for thread in range(5)}


def test_a_loop_that_ends_leaves_no_request_behind():
    one, gate = gated(Counting())
    driver = Driver(one)

    async def leave():
        stream = driver.stream([1], Sampling(9), session="a")
        gate.release()
        await anext(stream)
        return stream

    kept = asyncio.run(leave())
    for _ in range(9):
        gate.release()
    assert asyncio.run(standing(driver)) == (0, 0)
    driver.close()
    del kept


def test_calls():
    async def run():
        async with driving(Counting()) as driver:
            assert await driver.call(lambda engine: engine.max_len) == 100
            with pytest.raises(KeyError, match="x"):
                await driver.call(lambda engine: {}["x"])
            done = []
            async with held(driver):
                calls = [asyncio.create_task(driver.call(lambda engine, n=n: done.append(n))) for n in range(3)]
                await asyncio.sleep(0)
                calls[1].cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            assert done == [0, 2]

    asyncio.run(run())


def test_gauges():
    async def run():
        one, gate = gated(Counting(slots=1))
        async with driving(one, gate) as driver:
            async with held(driver):
                tasks = [asyncio.create_task(whole(driver.stream([1], Sampling(2), session="a"))) for _ in range(2)]
            for _ in range(4):
                gate.release()
            await asyncio.gather(*tasks)
            await driver.call(lambda engine: None)
            await driver.call(lambda engine: None)  # the gauges are those behind the step before
            gauges = driver.gauges
            assert (gauges.waiting, gauges.running, gauges.tokens, gauges.version, gauges.accept_length) == (
                0, 0, 4, 0, 1.0)

    asyncio.run(run())


def test_an_agent_trains_on_what_the_engine_drew():
    """The whole way: messages, prompts, sampled ids, rows; their log-probs are those of a forward pass over the rows.
    Random weights draw from the whole vocabulary, markers in any order included."""
    tokenizer = Tokenizer.packaged()
    config = CONFIG.replace(vocab_size=4224)  # padded beyond the tokenizer's
    weights = random_params(config, 7)
    one = Engine(weights, config, slots=2, max_len=160, chunk=32, block=4)
    one_id = tokenizer.id_of("</think>")

    async def run():
        async with driving(one) as driver:
            gateway = Gateway(driver, tokenizer)
            session, messages = gateway.open(), [{"role": "user", "content": "Hi."}]
            for _ in range(4):
                options = Options(max_new_tokens=8, clear_thinking=False)
                answer = await gateway.chat(session, messages, options=options).answer()
                messages += [answer.reply, {"role": "tool", "content": "So?"}]
            return gateway.close(session)

    turns = asyncio.run(run())
    assert [turn.extends for turn in turns] == [None, 0, 1, 2] and one_id
    (row,) = rows(Trajectory("r", "hi", 0, turns, "done"))
    tokens = np.asarray([row.ids], np.int32)
    logprobs = jax.nn.log_softmax(glm5.forward(weights, config, tokens).logits.astype(jnp.float32))[0]
    trained = np.flatnonzero(row.trained)
    assert len(trained) == sum(len(turn.completion.ids) for turn in turns)
    expected = np.asarray(logprobs)[trained - 1, tokens[0, trained]]
    np.testing.assert_allclose(np.asarray(row.logprobs)[trained], expected, atol=1e-4)
