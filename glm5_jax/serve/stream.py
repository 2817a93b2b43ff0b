"""One call under way: the pieces of its completion as they come, and the answer in the end."""

import dataclasses
import itertools
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import NamedTuple

from glm5_jax.records import Completion, Message, StopReason
from glm5_jax.serve.generator import Closed
from glm5_jax.serve.reader import StoppedReader
from glm5_jax.text.grammar import Event
from glm5_jax.text.tools import CallError

NOTHING = Completion((), (), (), StopReason.ABORT)


class Piece(NamedTuple):
    """What arrived, as read and as tokens. A text that may yet become a stop string is read later than its tokens."""

    events: tuple[Event, ...]
    completion: Completion  # with stop ABORT in all but the last


@dataclasses.dataclass(frozen=True)
class Answer:
    """A call that has ended."""

    reply: Message  # the arguments of its calls as objects; without the stop string and what follows it
    completion: Completion  # all that was sampled, what was resumed included
    prompt: tuple[int, ...]
    model: str
    turn: int  # index in `Gateway.turns(session)`
    stopped_by: str | None = None  # the stop string that ended it
    errors: tuple[CallError, ...] = ()  # what is wrong with the calls in the reply, and with its form


class Stream:
    """Iterates over the pieces of one call. Run it to its end, or close it: `async with` does.

    When its reader is gone (closed or cancelled), or the engine, then what had come goes on record with stop ABORT, or
    not at all if nothing had.
    """

    def __init__(self, session: str, prompt: tuple[int, ...], reader: StoppedReader, resume: Completion | None, *,
                 begin: Callable[[], AsyncGenerator[Completion, None]], record: Callable[[Completion], Answer],
                 leave: Callable[["Stream"], None]):
        self.session, self.prompt = session, prompt
        self._reader, self._begin, self._record, self._leave = reader, begin, record, leave
        self._parts = [resume] if resume else []
        self._source: AsyncGenerator[Completion, None] | None = None
        self._called_back = False
        self._outcome: Answer | Exception | None = None

    @property
    def started(self) -> bool:
        """Whether somebody has begun to read."""
        return self._source is not None

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Piece:
        if self._outcome is not None:
            raise StopAsyncIteration
        try:
            piece, last = await self._next()
            if last:
                self._outcome = self._record(_joined(self._parts, piece.completion.stop))
                self._leave(self)
            return piece
        except BaseException as error:  # who waited may have been cancelled
            self._give_up(error)
            raise

    async def answer(self) -> Answer:
        """Runs to the end; also in the middle of iterating, or after it. Raises again what ended the call, Closed where
        that was its reader."""
        async for _ in self:
            pass
        assert self._outcome is not None
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome

    async def aclose(self) -> None:
        """Calls back what is still under way, and frees its slot. For who reads; others call `Gateway.abort`."""
        if self._outcome is not None:
            return
        try:
            if self._source is not None:
                await self._source.aclose()
        finally:
            self._give_up(None)

    async def __aenter__(self) -> "Stream":
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    def call_back(self) -> None:
        """One that nobody has begun to read ends at once, with stop ABORT; for others the generator has to be told."""
        self._called_back = True

    async def _next(self) -> tuple[Piece, bool]:
        if self._source is None and not self._called_back:
            self._source = self._begin()
        part = None if self._source is None else await anext(self._source, None)
        events, kept = self._reader.read(part or NOTHING)
        self._parts.append(kept)
        last = part is None or kept.stop is not StopReason.ABORT
        if last:
            events += self._reader.close()
            if self._source is not None:
                await self._source.aclose()
        return Piece(tuple(events), kept), last

    def _give_up(self, error: BaseException | None) -> None:
        self._outcome = error if isinstance(error, Exception) else Closed("this call: its reader closed it")
        self._leave(self)
        if any(part.ids for part in self._parts):
            self._reader.close()
            self._record(_joined(self._parts, StopReason.ABORT))


def _joined(parts: Sequence[Completion], stop: StopReason) -> Completion:
    """The sum of all parts, at a cost that does not grow with their number."""
    ids, logprobs, versions = (tuple(itertools.chain(*(getattr(part, name) for part in parts)))
                               for name in ("ids", "logprobs", "versions"))
    return Completion(ids, logprobs, versions, stop)
