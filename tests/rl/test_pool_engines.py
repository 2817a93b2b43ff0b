"""The pool over engines of the real model: policies from directories, and streams that outlive their engine."""

import asyncio

import pytest

from glm5_jax.infer.engine import Engine
from glm5_jax.infer.request import Result, Sampling
from glm5_jax.records import Completion, StopReason
from glm5_jax.rl import weights
from glm5_jax.rl.pool import Pool
from glm5_jax.rl.prefill import Adopting, Prefillers, Reading, Split
from glm5_jax.serve.driver import Driver
from tests.infer.replay import assert_replays, CONFIG, MAX_LEN, params

SESSIONS = [f"s{i}" for i in range(6)]
ASKED = {session: ([3, 1, 4, 1, i], Sampling(max_new_tokens=12, seed=i)) for i, session in enumerate(SESSIONS)}


async def drawn(pool: Pool | Split, session: str) -> Completion:
    whole = Completion((), (), (), StopReason.ABORT)
    async for piece in pool.stream(*ASKED[session], session=session):
        whole += piece
    return whole


def assert_drawn(found: dict[str, Completion]) -> None:
    assert_replays([ASKED[session] for session in found], [Result(0, one, one.logprobs) for one in found.values()])


def some_steps(engine: Engine) -> None:
    engine.resume()
    for _ in range(5):
        engine.step()
    engine.pause()


def test_streams_outlive_their_engine_and_damaged_weights_reach_nobody(tmp_path):
    """Invariants 4 and 10."""
    async def push(driver, number):
        _, found = weights.fetch(tmp_path, number, params())
        await driver.push(found, number)

    async def main(drivers):
        pool = Pool(drivers, beat=lambda driver: driver.call(lambda engine: engine.version), push=push)
        weights.publish(tmp_path, params(1), number=1, step=1)
        await pool.push(1)
        for driver in drivers.values():
            await driver.call(Engine.pause)
        streams = {session: asyncio.create_task(drawn(pool, session)) for session in SESSIONS}
        for name, driver in drivers.items():
            while not pool.inside[name] or await driver.call(lambda engine: engine.waiting) < pool.inside[name]:
                await asyncio.sleep(0)
            await driver.call(some_steps)
        moved = pool.inside["a"]
        drivers["a"].close()
        await drivers["b"].call(Engine.resume)
        found = {session: await stream for session, stream in streams.items()}
        assert moved and pool.inside == {"b": 6}
        assert_drawn(found)
        assert {version for one in found.values() for version in one.versions} == {1}

        weights.publish(tmp_path, params(2), number=2, step=2)
        file = tmp_path / "policy-00000002" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")
        with pytest.raises(weights.WeightsError, match="expected policy 2 with checksum"):
            await pool.push(2)
        assert pool.version == 1 and set((await drawn(pool, "s0")).versions) == {1}
        weights.publish(tmp_path, params(3), number=3, step=3)
        await pool.push(3)
        found = {session: await drawn(pool, session) for session in SESSIONS[:2]}
        assert_drawn(found)
        assert {version for one in found.values() for version in one.versions} == {3}

    options = {"slots": 3, "max_len": MAX_LEN, "chunk": 4, "block": 2}
    with Driver(Engine(params(), CONFIG, **options)) as one, Driver(Engine(params(), CONFIG, **options)) as other:
        asyncio.run(main({"a": one, "b": other}))


def test_a_prompt_is_read_by_one_engine_and_drawn_by_another():
    """The engine that draws finds all but the newest token in its cache; other weights are not mixed."""
    async def main(reader, drawer):
        split = Split(Adopting(drawer), Prefillers({"r": Reading(reader)}), least=1)
        found = {session: await drawn(split, session) for session in SESSIONS[:2]}
        assert_drawn(found)
        fed, read = [await driver.call(lambda engine: engine.counts.fed) for driver in (drawer, reader)]
        assert (split.adopted, split.refused, fed, read) == (2, 0, 0, 8)
        await reader.push(params(1), 1)
        found = {"s2": await drawn(split, "s2")}
        assert_drawn(found)
        assert (split.adopted, split.refused, found["s2"].versions[0]) == (2, 1, 0)

    with Driver(engine()) as reader, Driver(engine()) as drawer:
        asyncio.run(main(reader, drawer))


def engine() -> Engine:
    return Engine(params(), CONFIG, slots=3, max_len=MAX_LEN, chunk=4, block=3)
