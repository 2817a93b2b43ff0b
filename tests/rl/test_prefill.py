"""Prompts read elsewhere: the same tokens, less work for those that draw, and nothing wrong when something is lost."""

import asyncio

from glm5_jax.infer.request import Sampling
from glm5_jax.records import Completion, StopReason
from glm5_jax.rl.pool import Pool
from glm5_jax.rl.prefill import Prefillers, Prefix, Split
from glm5_jax.serve.generator import EngineLost
from tests.rl.harness import run
from tests.serve.fakes import ScriptedGenerator

SIX = Sampling(max_new_tokens=6)


def script(ids, sampling, session):
    return [(sum(ids) + n) % 100 for n in range(6)]


class Reader:
    """Reads a token a second; its caches are the tuples of what was read."""

    def __init__(self, version=0):
        self.version, self.read, self.error = version, [], None

    async def prefill(self, ids, *, session):
        version = self.version
        await asyncio.sleep(len(ids))
        if self.error is not None:
            raise self.error
        self.read.append(len(ids))
        return Prefix(tuple(ids), version, ("cache", version, *ids))


class Drawer(ScriptedGenerator):
    """Counts the tokens that it has to read itself; what it adopts is looked into."""

    def __init__(self):
        super().__init__(script)
        self.held, self.own = {}, 0

    async def adopt(self, prefix, *, session):
        if prefix.version != self.version:
            return False
        assert prefix.cache == ("cache", self.version, *prefix.ids)
        self.held[session] = prefix.ids
        return True

    async def stream(self, ids, sampling, *, session, drawn=0):
        held = self.held.get(session, ())
        self.own += len(ids) - (len(held) if tuple(ids[:len(held)]) == held else 0)
        whole = tuple(ids)
        async for piece in super().stream(ids, sampling, session=session, drawn=drawn):
            whole += piece.ids
            yield piece
        self.held[session] = whole


async def drawn(generator, ids, session, drawn=0):
    whole = Completion((), (), (), StopReason.ABORT)
    async for piece in generator.stream(ids, SIX, session=session, drawn=drawn):
        whole += piece
    return whole


def test_a_long_prompt_is_read_elsewhere_and_a_short_rest_is_not():
    async def main():
        reader, drawer = Reader(), Drawer()
        split = Split(drawer, Prefillers({"p": reader}), least=8)
        first = await drawn(split, range(20), "a")
        assert list(first.ids) == script(range(20), SIX, "a") and reader.read == [20] and drawer.own == 0
        await drawn(split, (*range(20), *first.ids, 1, 2, 3), "a")
        assert reader.read == [20] and drawer.own == 3
        await drawn(split, (1, 2), "b")
        assert reader.read == [20] and drawer.own == 5
        split.release("a")
        assert drawer.released == ["a"]
        await drawn(split, range(20), "a")
        assert reader.read == [20, 20] and (split.adopted, split.refused, split.alone) == (2, 0, 0)

    run(main)


def test_what_other_weights_have_read_is_never_used():
    async def main():
        reader, drawer = Reader(), Drawer()
        split = Split(drawer, Prefillers({"p": reader}), least=8)
        one = asyncio.create_task(drawn(split, range(20), "a"))
        await asyncio.sleep(5)
        drawer.version = reader.version = 1
        found = await one
        assert list(found.ids) == script(range(20), SIX, "a") and drawer.own == 20 and split.refused == 1

    run(main)


def test_readers_share_the_prompts_and_stand_in_for_each_other():
    async def main():
        readers, drawer = {"p": Reader(), "q": Reader()}, Drawer()
        split = Split(drawer, Prefillers(readers), least=8)
        await asyncio.gather(*(drawn(split, range(20), f"s{i}") for i in range(6)))
        assert [len(reader.read) for reader in readers.values()] == [3, 3]
        readers["p"].error = EngineLost("gone")
        await drawn(split, range(20), "a")
        assert [len(reader.read) for reader in readers.values()] == [3, 4] and drawer.own == 0
        readers["q"].error = EngineLost("gone")
        found = await drawn(split, range(20), "b")
        assert list(found.ids) == script(range(20), SIX, "b") and drawer.own == 20 and split.alone == 1

    run(main)


def test_a_stream_whose_prompt_is_read_can_be_called_back_and_given_up():
    async def main():
        reader, drawer = Reader(), Drawer()
        split = Split(drawer, Prefillers({"p": reader}), least=8)
        one = asyncio.create_task(drawn(split, range(20), "a"))
        await asyncio.sleep(5)
        split.abort("a")
        assert await one == Completion((), (), (), StopReason.ABORT) and not drawer.asked
        assert await drawn(split, range(20), "a") == await drawn(split, range(20), "b")
        one = asyncio.create_task(drawn(split, range(20), "c"))
        await asyncio.sleep(5)
        one.cancel()
        await asyncio.wait([one])
        assert one.cancelled() and split._prefillers.reading == {"p": 0} and not split._reading

    run(main)


def test_a_pool_of_decode_engines_with_the_same_readers():
    async def main():
        readers, drawers = Prefillers({"p": Reader()}), [Drawer(), Drawer()]
        pool = Pool({f"d{i}": Split(drawer, readers, least=8) for i, drawer in enumerate(drawers)}, beat=None,
                    push=None)
        one = asyncio.create_task(drawn(pool, range(20), "a"))
        await asyncio.sleep(5)
        for drawer in drawers:
            drawer.delay = None
        first = next(iter(pool._calls["a"])).member.engine.decoder
        first.error = EngineLost("gone")
        assert list((await one).ids) == script(range(20), SIX, "a")
        other, = (drawer for drawer in drawers if drawer is not first)
        assert len(readers.engines["p"].read) == 2 and (first.own, other.own) == (0, 0)

    run(main)
