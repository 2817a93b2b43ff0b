"""Several engines as one: a `serve.generator.Generator` that keeps sessions where their caches are and survives losses.

    async def version(engine): return (await engine.health())["version"]
    pool = Pool({"a": remote, "b": other}, beat=version, push=Remote.push)
    watch = asyncio.create_task(pool.watch())
    await pool.push(3)

An engine is inside or outside. One that is lost, or did not take the newest weights, is outside and serves nobody; its
streams go on with another engine, from the tokens that had come. At each beat it is asked again: once it answers, it is
given the newest weights and is inside.
"""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from glm5_jax.infer.request import Sampling
from glm5_jax.records import Completion, StopReason
from glm5_jax.rl.affinity import Affinity
from glm5_jax.rl.heartbeat import Heartbeat, Pace
from glm5_jax.serve.generator import Closed, EngineLost, Generator

GRACE_S = 5.0  # for a stream of a lost engine to end
E = TypeVar("E", bound=Generator)
T = TypeVar("T")
ABORTED = Completion((), (), (), StopReason.ABORT)


@dataclasses.dataclass(eq=False)
class _Member(Generic[E]):
    """An engine, and the version of the weights that it is known to serve."""

    name: str
    engine: E
    version: int
    lost: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)


@dataclasses.dataclass(eq=False)
class _Call:
    """A stream under way, and who serves it now."""

    member: _Member | None = None
    aborted: bool = False


class Pool(Generic[E]):
    """`engines` by name, all at `version` of the weights; for one event loop.

    `beat(engine)` answers with the version it serves, and `push(engine, version)` has it serve another one, in no more
    than `push_s` seconds. No engine holds more than `slack` times its even share of the sessions. A stream moves at
    most `moves` times; streams and pushes wait `patience_s` seconds where no engine is inside, and raise EngineLost.
    An engine that answers between its steps alone needs a `pace` for its longest step, compilation included.
    """

    def __init__(self, engines: Mapping[str, E], *, beat: Callable[[E], Awaitable[int]],
                 push: Callable[[E, int], Awaitable[Any]], version: int = 0, slack: float = 1.25, moves: int = 2,
                 patience_s: float = 60.0, push_s: float = 600.0, pace: Pace = Pace()):
        if not engines:
            raise ValueError("engines: expected at least one, found none")
        self.version, self.max_len = version, min(engine.max_len for engine in engines.values())
        self._beat, self._push, self._push_s, self._wait_s = beat, push, push_s, pace.wait_s
        self._moves, self._patience_s = moves, patience_s
        self._inside = {name: _Member(name, engine, version) for name, engine in engines.items()}
        self._outside: dict[str, _Member[E]] = {}
        self._affinity = Affinity(engines, slack=slack)
        self._newest: dict[str, int] = {}  # version that a session has seen tokens of
        self._calls: dict[str, set[_Call]] = {}
        self._released: set[str] = set()  # sessions that are to be forgotten with their last call
        self._handed: set[str] = set()  # engines that are just being given weights
        self._pushing, self._changed = asyncio.Lock(), asyncio.Event()
        self._heartbeat = Heartbeat(self._ask, pace, lost=lambda name: self._lose(self._inside.get(name)),
                                    back=self._admit)

    @property
    def inside(self) -> dict[str, int]:
        """The sessions of each engine that serves."""
        return self._affinity.loads

    async def watch(self) -> None:
        """Beats until it is cancelled; without it nobody who is outside comes back."""
        await self._heartbeat.run(lambda: (self._inside.keys() - self._handed, self._outside))

    async def add(self, name: str, engine: E) -> None:
        """Takes an engine in, at the newest weights. Raises ValueError for a name that is taken, and what the engine
        raises, or TimeoutError where it does not answer; then it is outside."""
        if name in self._inside or name in self._outside:
            raise ValueError(f"engine {name!r}: expected a new name")
        if engine.max_len < self.max_len:
            raise ValueError(f"engine {name!r}: max_len: expected at least {self.max_len}, found {engine.max_len}")
        self._outside[name] = _Member(name, engine, -1)
        await self._admit(name)

    def remove(self, name: str) -> None:
        """Takes an engine out for good; its streams move. Raises LookupError if unknown."""
        self._lose(self._inside.get(name))
        if name not in self._outside:
            raise LookupError(f"engine {name!r}: expected one of {sorted(self._inside | self._outside)}")
        del self._outside[name]

    async def push(self, version: int) -> None:
        """Has every engine serve the weights `version`; those that do not take them are outside until they do.

        Raises ValueError for a version that is not above the present one. Where no engine takes it, raises what the
        first raised, and those that still answer serve the present version on.
        """
        async with self._pushing:
            if version <= self.version:
                raise ValueError(f"version: expected above {self.version}, the present one, found {version}")
            members = await self._when(lambda: list(self._inside.values()), f"a push of version {version}")
            errors = await asyncio.gather(*(self._hand(member, version) for member in members))
            if not any(member.version == version for member in members):
                raise next(error for error in errors if error)
            self.version = version
            for member in list(self._inside.values()):  # one that came in meanwhile among them
                if member.version != version:
                    self._lose(member)

    async def stream(self, ids: Sequence[int], sampling: Sampling, *, session: str,
                     drawn: int = 0) -> AsyncGenerator[Completion, None]:
        """See `Generator.stream`. What an engine had drawn before it was lost is not drawn again."""
        ids, call = list(ids), _Call()
        self._calls.setdefault(session, set()).add(call)
        self._released.discard(session)
        try:
            for moved in range(self._moves + 1):
                member: bool | _Member[E] = await self._when(lambda: call.aborted or self._member(session),
                                                             f"session {session!r}")
                if isinstance(member, bool):
                    yield ABORTED
                    return
                call.member, least = member, member.version  # what was drawn before a push may come after it
                try:
                    async with contextlib.aclosing(_pieces(member, ids, sampling, session, drawn)) as pieces:
                        async for piece in pieces:
                            if piece.versions and piece.versions[0] < least:
                                raise _started_anew(member, least, piece.versions[0])
                            ids += piece.ids
                            drawn += len(piece.ids)
                            self._newest[session] = max((self._newest.get(session, 0), *piece.versions[-1:]))
                            yield piece
                            if piece.stop is not StopReason.ABORT:
                                return
                    return
                except (EngineLost, Closed):
                    self._lose(member)
                    if moved == self._moves:
                        raise
        finally:
            self._calls[session].remove(call)
            if not self._calls[session]:
                del self._calls[session]
                if session in self._released:
                    self.release(session)

    def abort(self, session: str) -> None:
        """See `Generator.abort`."""
        for call in self._calls.get(session, ()):
            call.aborted = True
            if call.member is not None:
                call.member.engine.abort(session)
        self._tell()

    def release(self, session: str) -> None:
        """See `Generator.release`; a session with streams under way is kept until the last of them ends."""
        if session in self._calls:
            self._released.add(session)
            return
        self._released.discard(session)
        if self._inside:
            self._inside[self._affinity.route(session)].engine.release(session)
        self._affinity.release(session)
        self._newest.pop(session, None)

    def _member(self, session: str) -> _Member[E] | None:
        """The session's engine, if it serves weights no older than what the session has seen."""
        if not self._inside:
            return None
        member = self._inside[self._affinity.route(session)]
        return member if member.version >= self._newest.get(session, 0) else None

    async def _when(self, found: Callable[[], T | None], whom: str) -> T:
        """What `found` gives, once it is true."""
        try:
            async with asyncio.timeout(self._patience_s):
                while not (one := found()):
                    await self._changed.wait()
                return one
        except TimeoutError:
            raise EngineLost(f"{whom}: expected an engine that serves within {self._patience_s:g} s, found none "
                             f"of {sorted(self._inside | self._outside)}") from None

    async def _hand(self, member: _Member[E], version: int) -> Exception | None:
        """One engine's part of a push; returns what went wrong. The engine's own word counts: a push that raised may
        have been done, and an engine that does not say which weights it has may hold half of them."""
        error: Exception | None = None
        self._handed.add(member.name)
        try:
            async with asyncio.timeout(self._push_s):
                await self._push(member.engine, version)
        except Exception as raised:
            error = raised
        finally:
            self._handed.discard(member.name)
        try:
            await self._look(member)
        except Exception as raised:
            self._lose(member)
            return error or raised
        self._tell()
        if member.version == version:
            return None
        return error or EngineLost(f"engine {member.name!r}: expected version {version} after the push, found "
                                   f"{member.version}")

    async def _ask(self, name: str) -> None:
        member = self._inside.get(name)
        if member is None:
            await self._beat(self._outside[name].engine)
            return
        least = member.version
        if (found := await self._beat(member.engine)) < least:
            self._lose(member)
            raise _started_anew(member, least, found)

    async def _admit(self, name: str) -> None:
        """Takes an engine in that is outside, or raises why it cannot be."""
        member = self._outside[name]
        await self._look(member)
        if member.version < self.version and (error := await self._hand(member, self.version)):
            raise error
        if member.version != self.version:
            raise EngineLost(f"engine {name!r}: expected version {self.version}, found {member.version}")
        if self._outside.get(name) is member:
            del self._outside[name]
            self._inside[name] = dataclasses.replace(member, lost=asyncio.Event())
            self._affinity.add(name)
            self._tell()

    async def _look(self, member: _Member[E]) -> None:
        """Asks an engine which weights it serves."""
        async with asyncio.timeout(self._wait_s):
            member.version = await self._beat(member.engine)

    def _lose(self, member: _Member[E] | None) -> None:
        """Takes an engine out, unless it is out already; its streams move."""
        if member is not None and self._inside.get(member.name) is member:
            self._outside[member.name] = self._inside.pop(member.name)
            self._affinity.remove(member.name)
            member.lost.set()
            self._tell()

    def _tell(self) -> None:
        """Wakes who waits for an engine, or may have been called back."""
        self._changed.set()
        self._changed = asyncio.Event()


async def _pieces(member: _Member, ids: Sequence[int], sampling: Sampling, session: str,
                  drawn: int) -> AsyncGenerator[Completion, None]:
    """The engine's stream; raises EngineLost also where somebody else has found the engine to be lost."""
    stream = member.engine.stream(ids, sampling, session=session, drawn=drawn)
    try:
        while (piece := await _unless_lost(member, anext(stream, None))) is not None:
            yield piece
    finally:
        with contextlib.suppress(Exception):
            await stream.aclose()


def _started_anew(member: _Member, least: int, found: int) -> EngineLost:
    return EngineLost(f"engine {member.name!r}: expected version {least} at least, found {found}; it was started anew, "
                      f"say")


async def _unless_lost(member: _Member, work: Awaitable[T]) -> T:
    step, lost = asyncio.ensure_future(work), asyncio.ensure_future(member.lost.wait())
    both: set[asyncio.Future[Any]] = {step, lost}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not step.done():
            raise EngineLost(f"engine {member.name!r}: it does not answer, or has not the newest weights")
        return step.result()
    finally:
        for task in both:
            task.cancel()
        await asyncio.wait(both, timeout=GRACE_S)
