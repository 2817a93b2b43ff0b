"""Prompts read by engines of their own, so that a long one does not hold up those that draw.

A prefill engine reads a prompt and hands its cache over to the decode engine of the session, which goes on from it. The
protocol is two calls: `prefill` gives a `Prefix`, `adopt` takes it. A prefix only ever saves work: one that does not
fit, because the weights have changed meanwhile, say, is not adopted, and the decode engine reads the prompt itself.
"""

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from glm5_jax.infer.request import Sampling
from glm5_jax.records import Completion, StopReason
from glm5_jax.serve.driver import Driver
from glm5_jax.serve.generator import EngineLost, Generator


@dataclasses.dataclass(frozen=True)
class Prefix:
    """The cache of a context's first tokens."""

    ids: tuple[int, ...]
    version: int  # of the weights that made it
    cache: Any  # rows of the model's cache, as the engines have them


class Prefiller(Protocol):
    """An engine that reads."""

    async def prefill(self, ids: Sequence[int], *, session: str) -> Prefix:
        """The cache of `ids`, or of as many of the first as it has room for. Raises EngineLost."""


class Decoder(Generator, Protocol):
    """An engine that draws."""

    async def adopt(self, prefix: Prefix, *, session: str) -> bool:
        """Takes the prefix as what is held of a session's ids; False where it cannot: other weights, or no room."""


class Reading:
    """A `Prefiller`: an engine that reads prompts; it draws one token of each, which nobody sees."""

    def __init__(self, driver: Driver, *, attempts: int = 3):
        self.driver, self._attempts = driver, attempts

    async def prefill(self, ids: Sequence[int], *, session: str) -> Prefix:
        """See `Prefiller`. Raises EngineLost too where others took the place of what was read, `attempts` times."""
        for _ in range(self._attempts):
            async with aclosing(self.driver.stream(ids, Sampling(1), session=session)) as pieces:
                async for _ in pieces:
                    pass
            held, version = await self.driver.call(lambda engine: (engine.hand_over(session), engine.version))
            if held is not None:
                return Prefix(held[0], version, held[1])
        raise EngineLost(f"session {session!r}: its prompt was read, and lost to other prompts before it could be "
                         f"handed over; take more slots or fewer prompts at a time")


class Adopting:
    """A `Decoder`: an engine that draws, from prompts that others have read."""

    def __init__(self, driver: Driver):
        self.driver, self.max_len = driver, driver.max_len
        self.stream, self.abort, self.release = driver.stream, driver.abort, driver.release

    async def adopt(self, prefix: Prefix, *, session: str) -> bool:
        """See `Decoder`."""
        return await self.driver.call(
            lambda engine: engine.adopt(session, prefix.ids, prefix.cache, prefix.version))


class Split:
    """A decode engine with prefill engines before it, as one `Generator`; several may share the prefill engines.

    A context with `least` tokens that the decode engine does not hold yet goes to the prefill engine with the fewest at
    a time. `adopted` counts the prefixes that were used, `refused` those that were not, `alone` the prompts that no
    prefill engine could read.
    """

    def __init__(self, decoder: Decoder, prefillers: "Prefillers", *, least: int = 512):
        self.decoder, self.max_len = decoder, decoder.max_len
        self._prefillers, self._least = prefillers, least
        self._held: dict[str, int] = {}
        self._reading: dict[str, set[asyncio.Event]] = {}
        self.adopted = self.refused = self.alone = 0

    async def stream(self, ids: Sequence[int], sampling: Sampling, *, session: str,
                     drawn: int = 0) -> AsyncGenerator[Completion, None]:
        """See `Generator.stream`; where the prompt is being read, a call back waits until it has been."""
        if len(ids) - self._held.get(session, 0) >= self._least and await self._read(ids, session):
            yield Completion((), (), (), StopReason.ABORT)
            return
        count = len(ids)
        pieces = self.decoder.stream(ids, sampling, session=session, drawn=drawn)
        try:
            async for piece in pieces:
                count += len(piece.ids)
                self._held[session] = count
                yield piece
        finally:
            await pieces.aclose()

    def abort(self, session: str) -> None:
        """See `Generator.abort`."""
        for called_back in self._reading.get(session, ()):
            called_back.set()
        self.decoder.abort(session)

    def release(self, session: str) -> None:
        """See `Generator.release`."""
        self._held.pop(session, None)
        self.decoder.release(session)

    async def _read(self, ids: Sequence[int], session: str) -> bool:
        """Has the prompt read; returns whether it was called back meanwhile."""
        called_back = asyncio.Event()
        self._reading.setdefault(session, set()).add(called_back)
        try:
            prefix = await self._prefillers.prefill(ids, session)
            if prefix is None:
                self.alone += 1
            elif await self.decoder.adopt(prefix, session=session):
                self.adopted += 1
            else:
                self.refused += 1
        finally:
            self._reading[session].remove(called_back)
            if not self._reading[session]:
                del self._reading[session]
        return called_back.is_set()


class Prefillers:
    """The prefill engines of a fleet, by name."""

    def __init__(self, engines: dict[str, Prefiller]):
        self.engines = engines  # may change at any time
        self.reading: dict[str, int] = {}

    async def prefill(self, ids: Sequence[int], session: str) -> Prefix | None:
        """By the engine with the fewest prompts; by another one where that is lost; None where all are."""
        tried: set[str] = set()
        while left := [name for name in self.engines if name not in tried]:
            name = min(left, key=lambda name: self.reading.get(name, 0))
            tried.add(name)
            self.reading[name] = self.reading.get(name, 0) + 1
            try:
                return await self.engines[name].prefill(ids, session=session)
            except EngineLost:
                continue
            finally:
                self.reading[name] -= 1
        return None
