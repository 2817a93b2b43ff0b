"""Invariants 4, 10 and 11 of many engines behind one door: streams survive losses, and no half-pushed engine serves."""

import asyncio
import contextlib
import random

import numpy as np
import pytest

from glm5_jax.infer.request import Sampling
from glm5_jax.records import Completion, StopReason
from glm5_jax.rl import weights
from glm5_jax.rl.pool import Pool
from glm5_jax.serve.generator import Closed, EngineLost, Overloaded
from tests.rl.harness import run
from tests.serve.fakes import ScriptedGenerator

TEN = Sampling(max_new_tokens=10)


def script(ids, sampling, session):
    """Ten tokens that only the prompt and the seed decide."""
    rng = random.Random(f"{ids} {sampling.seed}")
    return [rng.randrange(1000) for _ in range(10)]


class Engine(ScriptedGenerator):
    """One that can be lost, be deaf, or be handed half of its weights."""

    def __init__(self, **fields):
        super().__init__(script, delay=lambda session: 1.0, **fields)
        self.refuses = self.deaf = self.late = self.lazy = False
        self.push_s, self.pushed = 1.0, []

    async def beat(self) -> int:
        if self.deaf:
            await asyncio.sleep(1e9)
        if self.error is not None:
            raise self.error
        return self.version

    async def push(self, version: int) -> None:
        if self.deaf:
            await asyncio.sleep(1e9)
        await asyncio.sleep(self.push_s)
        if self.refuses:
            raise OSError("disk full")
        if not self.lazy:
            self.version = version
            self.pushed.append(version)
        if self.late:
            raise TimeoutError("the answer was lost")

    def hang(self) -> None:
        self.deaf = True
        self.gate.clear()

    def recover(self) -> None:
        self.deaf, self.error = False, None
        self.gate.set()


def pool_of(count: int, **options) -> Pool[Engine]:
    return Pool({f"e{i}": Engine() for i in range(count)}, **({"beat": Engine.beat, "push": Engine.push} | options))


def engines(pool: Pool[Engine]) -> dict[str, Engine]:
    return {name: member.engine for name, member in sorted((pool._inside | pool._outside).items())}


async def drawn(pool: Pool, ids, session: str, sampling: Sampling = TEN, drawn: int = 0) -> Completion:
    whole = Completion((), (), (), StopReason.ABORT)
    async for piece in pool.stream(ids, sampling, session=session, drawn=drawn):
        whole += piece
    return whole


def serving(pool: Pool[Engine], session: str) -> Engine:
    one, = (engine for engine in engines(pool).values() if session in engine.running)
    return one


def watched(scenario, pool: Pool[Engine]):
    async def main():
        watch = asyncio.create_task(pool.watch())
        await scenario(pool, engines(pool))
        assert not watch.done() and not any(engine.running for engine in engines(pool).values())
        watch.cancel()
        await asyncio.wait([watch])

    run(main)


def test_a_session_stays_with_its_engine_and_engines_share_the_load():
    """Invariant 11."""
    async def scenario(pool, all):
        for turn in range(3):
            await asyncio.gather(*(drawn(pool, (turn, i), f"s{i}") for i in range(40)))
        of = {name: {session for _, _, session in engine.asked} for name, engine in all.items()}
        assert sum(map(len, of.values())) == 40 and pool.inside == {name: len(own) for name, own in of.items()}
        assert max(map(len, of.values())) <= 1.25 * 40 / 4 + 1
        pool.release("s0")
        assert sum(pool.inside.values()) == 39 and sum((engine.released for engine in all.values()), []) == ["s0"]

    watched(scenario, pool_of(4))


@pytest.mark.parametrize("moves", [False, True])
def test_a_session_that_is_released_under_its_stream_is_forgotten_with_it(moves):
    async def scenario(pool, all):
        one = asyncio.create_task(drawn(pool, (1,), "a"))
        await asyncio.sleep(1.5)
        pool.release("a")
        if moves:
            serving(pool, "a").error = EngineLost("gone")
        assert list((await one).ids) == script((1,), TEN, "a")
        assert not pool._newest and not sum(pool.inside.values()) and not pool._released
        assert sum((engine.released for engine in all.values()), []) == ["a"]

    watched(scenario, pool_of(2))


def test_a_session_that_is_asked_again_after_its_release_is_kept():
    async def scenario(pool, all):
        one = asyncio.create_task(drawn(pool, (1,), "a"))
        await asyncio.sleep(1.5)
        pool.release("a")
        other = asyncio.create_task(drawn(pool, (2,), "a"))
        await asyncio.gather(one, other)
        assert sum(pool.inside.values()) == 1

    watched(scenario, pool_of(2))


@pytest.mark.parametrize("gone", [EngineLost("gone"), Closed("closed")])
def test_what_a_lost_engine_had_drawn_is_gone_on_with_elsewhere(gone):
    """Invariant 4: the sum is what one engine alone would have drawn, and nothing is drawn again."""
    async def scenario(pool, all):
        one = asyncio.create_task(drawn(pool, (1, 2), "a"))
        await asyncio.sleep(1.5)  # three tokens
        first = serving(pool, "a")
        first.error = gone
        found = await one
        assert found == await drawn(pool, (1, 2), "b") and found.stop is StopReason.LENGTH
        second, = (engine for engine in all.values() if engine.asked and engine is not first)
        assert second.asked[0][0] == (1, 2, *found.ids[:3])
        assert len(pool.inside) == 1 and first not in (member.engine for member in pool._inside.values())
        await asyncio.sleep(60)
        assert len(pool.inside) == 1  # it does not answer
        first.recover()
        await asyncio.sleep(20)
        assert len(pool.inside) == 2

    watched(scenario, pool_of(2))


def test_an_engine_that_does_not_answer_is_found_by_its_heartbeat():
    async def scenario(pool, all):
        calls = {f"s{i}": asyncio.create_task(drawn(pool, (i,), f"s{i}")) for i in range(9)}
        await asyncio.sleep(1.5)
        moved = [session for session in calls if serving(pool, session) is all["e1"]]
        assert moved
        all["e1"].hang()
        found = dict(zip(calls, await asyncio.gather(*calls.values())))
        assert asyncio.get_running_loop().time() > 3 * 10
        assert set(pool.inside) == {"e0", "e2"}
        for i, session in enumerate(calls):
            assert list(found[session].ids) == script((i,), TEN, session)
            asked = sum(session == other for engine in all.values() for _, _, other in engine.asked)
            assert asked == (2 if session in moved else 1)
        all["e1"].recover()
        await asyncio.sleep(20)
        assert set(pool.inside) == set(all)

    watched(scenario, pool_of(3))


def test_a_single_missed_beat_costs_nothing():
    async def scenario(pool, all):
        all["e0"].deaf = True
        await asyncio.sleep(25 + 1)  # two beats, and their waits
        all["e0"].recover()
        await asyncio.sleep(100)
        assert set(pool.inside) == set(all)

    watched(scenario, pool_of(2))


def test_a_stream_does_not_move_for_ever():
    """A request that no engine survives leaves some alive."""
    async def scenario(pool, all):
        for engine in all.values():
            engine.error = EngineLost("gone")
        with pytest.raises(EngineLost, match="gone"):
            await drawn(pool, (1,), "a")
        assert len(pool.inside) == 5 - 3 and sum(len(engine.asked) for engine in all.values()) == 3

    watched(scenario, pool_of(5))


def test_a_stream_waits_for_an_engine_so_long_and_no_longer():
    async def scenario(pool, all):
        all["e0"].hang()
        await asyncio.sleep(50)
        assert not pool.inside
        with pytest.raises(EngineLost, match="session 'a': expected an engine that serves within 60 s, found none of"):
            await drawn(pool, (1,), "a")
        one = asyncio.create_task(drawn(pool, (1,), "a"))
        await asyncio.sleep(1)
        all["e0"].recover()
        assert list((await one).ids) == script((1,), TEN, "a")

    watched(scenario, pool_of(1))


def test_an_engine_that_is_lost_after_the_last_token_loses_nothing():
    class Hasty(Engine):
        async def stream(self, ids, sampling, *, session, drawn=0):
            async with contextlib.aclosing(super().stream(ids, sampling, session=session, drawn=drawn)) as pieces:
                async for piece in pieces:
                    yield piece
            raise EngineLost("the connection was reset")

    async def scenario(pool, all):
        assert list((await drawn(pool, (1,), "a")).ids) == script((1,), TEN, "a")
        assert len(all["e0"].asked) == 1 and pool.inside

    watched(scenario, Pool({"e0": Hasty()}, beat=Engine.beat, push=Engine.push))


def test_other_errors_pass_and_cost_no_engine():
    async def scenario(pool, all):
        all["e0"].error = Overloaded("full")
        with pytest.raises(Overloaded, match="full"):
            await drawn(pool, (1,), "a")
        assert len(pool.inside) == 1

    watched(scenario, pool_of(1))


def test_a_stream_that_is_given_up_frees_its_slot():
    async def scenario(pool, all):
        stream = pool.stream((1,), TEN, session="a")
        assert (await anext(stream)).ids
        assert all["e0"].running == ["a"]
        await stream.aclose()
        assert all["e0"].running == []
        task = asyncio.create_task(drawn(pool, (1,), "a"))
        await asyncio.sleep(1.5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert all["e0"].running == [] and not pool._calls

    watched(scenario, pool_of(1))


def test_a_stream_is_called_back_and_goes_on():
    async def scenario(pool, all):
        one = asyncio.create_task(drawn(pool, (1,), "a"))
        await asyncio.sleep(1.5)
        pool.abort("a")
        part = await one
        assert part.stop is StopReason.ABORT and 0 < len(part.ids) < 10
        rest = await drawn(pool, (1, *part.ids), "a", drawn=len(part.ids))
        assert part + rest == await drawn(pool, (1,), "b")
        pool.abort("nobody")

    watched(scenario, pool_of(2))


def test_a_stream_that_is_called_back_while_it_waits_for_an_engine():
    async def scenario(pool, all):
        all["e0"].hang()
        one = asyncio.create_task(drawn(pool, (1,), "a"))
        await asyncio.sleep(45)  # lost at the third beat
        pool.abort("a")
        assert (await one) == Completion((), (), (), StopReason.ABORT) and not pool.inside

    watched(scenario, pool_of(1))


def test_all_engines_get_the_weights_under_their_streams():
    async def scenario(pool, all):
        calls = [asyncio.create_task(drawn(pool, (i,), f"s{i}")) for i in range(12)]
        await asyncio.sleep(1.5)
        await pool.push(3)
        assert pool.version == 3 and {engine.version for engine in all.values()} == {3}
        for i, found in enumerate(await asyncio.gather(*calls)):
            assert list(found.ids) == script((i,), TEN, "") and set(found.versions) == {0, 3}
        for version in (3, 2):
            with pytest.raises(ValueError, match=f"version: expected above 3, the present one, found {version}"):
                await pool.push(version)
        assert {tuple(engine.pushed) for engine in all.values()} == {(3,)}

    watched(scenario, pool_of(3))


@pytest.mark.parametrize("how", ["refuses", "deaf"])
def test_a_half_pushed_engine_never_serves(how):
    """Invariant 10: outside until it has the weights; its streams go on with those that have."""
    async def scenario(pool, all):
        calls = [asyncio.create_task(drawn(pool, (i,), f"s{i}")) for i in range(12)]
        await asyncio.sleep(1.5)
        setattr(all["e1"], how, True)
        all["e1"].gate.clear()  # it draws nothing more before the push is over
        await pool.push(3)
        assert set(pool.inside) == {"e0", "e2"}
        for i, found in enumerate(await asyncio.gather(*calls)):
            assert list(found.ids) == script((i,), TEN, "")
        asked = len(all["e1"].asked)
        assert {version for i in range(12) for version in (await drawn(pool, (i,), f"s{i}")).versions} == {3}
        await asyncio.sleep(40)
        assert len(all["e1"].asked) == asked and set(pool.inside) == {"e0", "e2"}
        all["e1"].refuses = False
        all["e1"].recover()
        await asyncio.sleep(20)
        assert set(pool.inside) == set(all) and all["e1"].version == 3

    watched(scenario, pool_of(3, push_s=5))


def test_a_push_waits_for_an_engine_and_needs_one():
    async def scenario(pool, all):
        all["e0"].error = EngineLost("gone")
        with pytest.raises(EngineLost):
            await drawn(pool, (1,), "a", TEN)
        push = asyncio.create_task(pool.push(3))
        await asyncio.sleep(20)
        all["e0"].recover()
        await push
        assert all["e0"].pushed == [3]
        all["e0"].hang()
        await asyncio.sleep(40)
        with pytest.raises(EngineLost, match=r"a push of version 4: expected an engine .*found none of \['e0'\]"):
            await pool.push(4)

    watched(scenario, pool_of(1, moves=0))


def test_an_engine_that_takes_long_to_come_back_holds_nobody_up():
    async def scenario(pool, all):
        await pool.push(3)
        all["e0"].version, all["e0"].push_s = 0, 400.0
        await asyncio.sleep(30)  # found at the first beat, told at the second
        assert set(pool.inside) == {"e1", "e2"}
        all["e1"].hang()
        await asyncio.sleep(40)
        assert set(pool.inside) == {"e2"}
        await pool.push(4)
        await asyncio.sleep(800)
        assert all["e0"].pushed == [3, 3, 4] and set(pool.inside) == {"e0", "e2"}

    watched(scenario, pool_of(3))


def test_an_engine_that_takes_long_to_load_is_not_lost_for_that():
    async def scenario(pool, all):
        async def load(engine):
            engine.deaf = True
            await asyncio.sleep(200)
            engine.recover()
            await Engine.push(engine, 3)

        all["e0"].push = lambda version: load(all["e0"])
        await pool.push(3)
        assert set(pool.inside) == set(all)

    watched(scenario, pool_of(2, push=lambda engine, version: engine.push(version)))


def test_a_push_that_was_late_but_done_counts():
    async def scenario(pool, all):
        for engine in all.values():
            engine.late = True
        await pool.push(3)
        assert set(pool.inside) == set(all) and pool.version == 3

    watched(scenario, pool_of(2))


def test_a_push_that_was_not_done_does_not_count():
    async def scenario(pool, all):
        for engine in all.values():
            engine.lazy = True
        with pytest.raises(EngineLost, match="engine 'e0': expected version 3 after the push, found 0"):
            await pool.push(3)
        assert pool.version == 0 and set(pool.inside) == set(all)

    watched(scenario, pool_of(2))


def test_an_engine_that_reads_a_damaged_policy_serves_the_old_one(tmp_path):
    """Invariant 10, with real directories: half-written, changed, then whole."""
    params = {"w": np.arange(6, dtype=np.float32)}

    async def fetched(engine, number):
        policy, found = weights.fetch(tmp_path, number, params)
        assert (found["w"] == params["w"] + number).all()
        await engine.push(policy.number)

    async def scenario(pool, all):
        for number, damage in [(1, lambda data: data[:-3]), (2, lambda data: data[:-1] + b"x"), (3, bytes)]:
            weights.publish(tmp_path, {"w": params["w"] + number}, number=number, step=number)
            file = tmp_path / f"policy-{number:08d}" / "model.safetensors"
            file.write_bytes(damage(file.read_bytes()))
            if number < 3:
                with pytest.raises(weights.WeightsError, match="cannot be read|expected policy 2 with checksum"):
                    await pool.push(number)
                assert pool.version == 0 and set(pool.inside) == set(all)
                assert set((await drawn(pool, (1,), "a")).versions) == {0}
        await pool.push(3)
        assert set((await drawn(pool, (1,), "a")).versions) == {3}

    watched(scenario, pool_of(2, push=fetched))


def test_an_engine_that_was_started_anew_gets_the_weights_before_it_serves():
    async def scenario(pool, all):
        await pool.push(3)
        all["e0"].version = 0
        await asyncio.sleep(15)
        assert set(pool.inside) == {"e1"}
        await asyncio.sleep(15)
        assert set(pool.inside) == {"e0", "e1"} and all["e0"].pushed == [3, 3]

    watched(scenario, pool_of(2))


def test_an_engine_that_was_started_anew_between_two_beats_is_found_by_its_first_tokens():
    """Invariant 10: what the base weights have drawn reaches nobody."""
    async def scenario(pool, all):
        await pool.push(3)
        all["e0"].version = 0
        for i, found in enumerate(await asyncio.gather(*(drawn(pool, (i,), f"s{i}") for i in range(12)))):
            assert list(found.ids) == script((i,), TEN, "") and set(found.versions) == {3}
        assert all["e0"].asked and set(pool.inside) == {"e1"}  # before any beat
        await asyncio.sleep(20)
        assert set(pool.inside) == set(all) and all["e0"].pushed == [3, 3]

    watched(scenario, pool_of(2))


def test_tokens_that_are_under_way_during_a_push_are_no_sign_of_that():
    class Far(Engine):
        async def stream(self, ids, sampling, *, session, drawn=0):
            async with contextlib.aclosing(super().stream(ids, sampling, session=session, drawn=drawn)) as pieces:
                async for piece in pieces:
                    await asyncio.sleep(3)
                    yield piece

    async def scenario(pool, all):
        one = asyncio.create_task(drawn(pool, (1,), "a"))
        await asyncio.sleep(1.5)
        await pool.push(3)
        assert pool.inside and not pool._newest  # nothing has arrived
        assert (await one).versions == (0,) * 3 + (3,) * 7 and len(all["e0"].asked) == 1

    watched(scenario, Pool({"e0": Far()}, beat=Engine.beat, push=Engine.push))


def test_versions_of_a_session_never_fall():
    """The first engine has the new weights and is lost while the second still waits for them."""
    async def scenario(pool, all):
        one = asyncio.create_task(drawn(pool, (1,), "a"))
        await asyncio.sleep(1.5)
        first = serving(pool, "a")
        for engine in all.values():
            engine.push_s = 0.1 if engine is first else 9.0
        push = asyncio.create_task(pool.push(3))
        await asyncio.sleep(1)
        first.error = EngineLost("gone")
        found = await one
        assert found.versions == (0,) * 3 + (3,) * 7 or found.versions == (0,) * 6 + (3,) * 4
        assert list(found.ids) == script((1,), TEN, "a")
        await push

    watched(scenario, pool_of(2))


def test_engines_come_and_go():
    async def scenario(pool, all):
        await pool.push(3)
        new = Engine(version=0)
        await pool.add("e9", new)
        assert new.version == 3 and set(pool.inside) == {"e0", "e1", "e9"}
        with pytest.raises(ValueError, match="engine 'e9': expected a new name"):
            await pool.add("e9", new)
        with pytest.raises(ValueError, match="engine 'e8': max_len: expected at least 4096, found 8"):
            await pool.add("e8", Engine(max_len=8))
        one = asyncio.create_task(drawn(pool, (1,), "a"))
        await asyncio.sleep(1.5)
        name = next(name for name, engine in engines(pool).items() if "a" in engine.running)
        pool.remove(name)
        assert list((await one).ids) == script((1,), TEN, "a") and name not in pool.inside
        with pytest.raises(LookupError, match=f"engine '{name}': expected one of"):
            pool.remove(name)
        broken = Engine()
        broken.refuses = True
        with pytest.raises(OSError, match="disk full"):
            await pool.add("e7", broken)
        broken.refuses = False
        await asyncio.sleep(20)
        assert "e7" in pool.inside
        silent = Engine()
        silent.deaf = True
        with pytest.raises(TimeoutError):
            await pool.add("e6", silent)

    watched(scenario, pool_of(2))
    with pytest.raises(ValueError, match="engines: expected at least one"):
        pool_of(0)


@pytest.mark.parametrize("seed", range(8))
def test_streams_under_losses_and_pushes_of_any_order(seed):
    """Invariants 4, 8 and 10 together."""
    rng = random.Random(seed)

    async def trouble(pool, all):
        for version in range(1, 8):
            await asyncio.sleep(rng.uniform(1, 20))
            for engine in all.values():
                engine.refuses, engine.push_s = rng.random() < 0.2, rng.uniform(0.1, 5)
            one = rng.choice(list(all.values()))
            if rng.random() < 0.5:
                one.hang()
            else:
                one.error = EngineLost("gone")
            try:
                await pool.push(version)
            except (EngineLost, OSError):
                pass
            await asyncio.sleep(rng.uniform(1, 60))
            for engine in all.values():
                engine.refuses = False
                engine.recover()

    async def session(pool, name):
        newest = 0
        for turn in range(6):
            sampling = Sampling(max_new_tokens=10, seed=turn)
            found = await drawn(pool, (turn,), name, sampling)
            assert list(found.ids) == script((turn,), sampling, name)
            assert newest <= found.versions[0]
            newest = found.versions[-1]
            await asyncio.sleep(rng.uniform(0, 30))

    async def scenario(pool, all):
        await asyncio.gather(trouble(pool, all), *(session(pool, f"s{i}") for i in range(16)))

    watched(scenario, pool_of(4, moves=20, patience_s=1e4, push_s=30))
