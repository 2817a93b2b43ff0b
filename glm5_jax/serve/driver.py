"""An engine in a thread of its own, that any event loop may ask.

    driver = Driver(Engine(params, config, slots=8, max_len=4096))
    async for piece in driver.stream(ids, Sampling(64), session="a"): ...
    await driver.push(params, version=1)
    driver.close()

The thread alone touches the engine. Between two steps it does what it was sent, in that order; where there is nothing
to do it sleeps until something is sent.
"""

import asyncio
import dataclasses
import itertools
import math
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from typing import Any, Literal, TypeVar

from glm5_jax.infer.engine import Engine
from glm5_jax.infer.request import Result, Sampling
from glm5_jax.records import Completion
from glm5_jax.serve.generator import Closed, EngineLost, Totals

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Gauges:
    """How an engine stands after a step."""

    waiting: int = 0  # requests without a slot
    running: int = 0
    tokens: int = 0  # drawn since the start
    version: int = 0  # of the weights
    accept_length: float = math.nan  # tokens drawn in a round of a slot


@dataclasses.dataclass(eq=False)
class _Ticket:
    """A stream as the thread sees it. `deliver` takes a piece and whether it is the last, or what went wrong."""

    session: str
    loop: asyncio.AbstractEventLoop
    inbox: asyncio.Queue
    told: int = 0  # tokens delivered

    def deliver(self, piece: Completion, last: bool) -> None:
        self.told += len(piece.ids)
        self._put((piece, last))

    def fail(self, error: Exception) -> None:
        self._put(error)

    def _put(self, item: Any) -> None:
        try:
            self.loop.call_soon_threadsafe(self.inbox.put_nowait, item)
        except RuntimeError:
            pass  # its loop is closed: nobody reads it any more


@dataclasses.dataclass(frozen=True)
class _Command:
    """What the thread is to do, or `refuse` where it has ended instead."""

    run: Callable[[], None]
    refuse: Callable[[Exception], None] = lambda error: None


class Driver:
    """A `Generator` over one engine, which is the driver's from now on. Close it, or leave the `with`, in the end."""

    def __init__(self, engine: Engine):
        self.max_len, self.gauges = engine.max_len, Gauges(version=engine.version)
        self._engine = engine
        self._commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._tickets: dict[int, _Ticket] = {}  # by the engine's number, in the order of their coming
        self._tokens = 0
        self._began, self._busy = time.perf_counter(), 0.0  # the latter in seconds
        self._closed, self._door = False, threading.Lock()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def closed(self) -> bool:
        """Whether it takes nothing more."""
        return self._closed

    async def stream(self, ids: Sequence[int], sampling: Sampling, *, session: str,
                     drawn: int = 0) -> AsyncGenerator[Completion, None]:
        """See `Generator.stream`. A step of the engine that fails raises EngineLost in the streams that hold a slot."""
        ticket, ended = _Ticket(session, asyncio.get_running_loop(), asyncio.Queue()), False
        self._send(_Command(lambda: self._begin(ticket, ids, sampling, drawn), ticket.fail))
        try:
            while not ended:
                item = await ticket.inbox.get()
                if isinstance(item, Exception):
                    ended = True
                    raise item
                piece, ended = item
                yield piece
        finally:
            if not ended:
                self._send(_Command(lambda: self._recall(lambda other: other is ticket)), late=True)

    def abort(self, session: str) -> None:
        """See `Generator.abort`."""
        self._send(_Command(lambda: self._recall(lambda ticket: ticket.session == session)), late=True)

    def release(self, session: str) -> None:
        """Nothing is to be done: a row of the engine's cache goes to whoever needs it."""

    async def call(self, function: Callable[[Engine], T]) -> T:
        """What `function(engine)` returns, called between two steps on the engine's thread. Raises what it raises, and
        Closed."""
        future: Future[T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(self._engine))
                except BaseException as error:
                    future.set_exception(error)

        def refuse(error: Exception) -> None:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)

        self._send(_Command(run, refuse))
        return await asyncio.wrap_future(future)

    async def push(self, params: Any, version: int, cache: Literal["keep", "recompute"] = "recompute") -> None:
        """Hands new weights to the engine between two steps, under the streams that go on. Arguments and errors as of
        `Engine.push_weights`, after which the engine goes on with the weights it had, and of `Engine.resume`, after
        which it goes on with the new ones, and the next step tries again to make the cache."""
        if cache not in ("keep", "recompute"):
            raise ValueError(f"cache: expected 'keep' or 'recompute', found {cache!r}")

        def swap(engine: Engine) -> None:
            engine.pause()
            try:
                engine.push_weights(params, version)
            finally:
                engine.resume(cache)

        await self.call(swap)

    def totals(self) -> Totals:
        """What the engine has done since it is the driver's."""
        counts = self._engine.counts
        return Totals(time.perf_counter() - self._began, self._busy, counts.drawn, counts.fed, counts.reused,
                      counts.again)

    def close(self) -> None:
        """Ends the thread after the step it is in, and after what was sent before; streams under way raise Closed."""
        with self._door:
            if not self._closed:
                self._closed = True
                self._commands.put(None)
        self._thread.join()

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _send(self, command: _Command, late: bool = False) -> None:
        """Nothing is sent to a driver that is closed; `late` is what has no point then."""
        with self._door:
            if not self._closed:
                self._commands.put(command)
            elif not late:
                raise Closed("this driver: it has been closed")

    def _run(self) -> None:
        busy = False
        try:
            while self._obey(wait=not busy):
                began = time.perf_counter()
                try:
                    busy = self._engine.step()
                except Exception as error:
                    self._deliver()
                    self._fail(error)
                    busy = bool(self._tickets)
                self._busy += time.perf_counter() - began
                self._deliver()
        finally:  # also of an error of its own, which is not to leave anybody waiting
            with self._door:
                self._closed = True
            for ticket in self._tickets.values():
                ticket.fail(Closed("this driver: it was closed under the stream"))
            while not self._commands.empty():
                if (command := self._commands.get()) is not None:
                    command.refuse(Closed("this driver: it was closed before it came to this"))

    def _obey(self, wait: bool) -> bool:
        """Does what has been sent, after waiting for the first of it; False where that was to close."""
        try:
            while True:
                command = self._commands.get(block=wait)
                if command is None:
                    return False
                command.run()
                wait = False
        except queue.Empty:
            return True

    def _begin(self, ticket: _Ticket, ids: Sequence[int], sampling: Sampling, drawn: int) -> None:
        try:
            number = self._engine.submit(ids, sampling, session=ticket.session, drawn=drawn)
        except Exception as error:
            ticket.fail(error)
        else:
            self._tickets[number] = ticket

    def _recall(self, which: Callable[[_Ticket], bool]) -> None:
        for number in [number for number, ticket in self._tickets.items() if which(ticket)]:
            self._last(number, self._engine.abort(number))

    def _deliver(self) -> None:
        for result in self._engine.results():
            self._last(result.request, result)
        for number, ticket in itertools.islice(self._tickets.items(), self._engine.running):  # they came first
            piece = self._engine.progress(number, since=ticket.told).completion
            if piece.ids:
                self._tokens += len(piece.ids)
                ticket.deliver(piece, last=False)
        self.gauges = Gauges(self._engine.waiting, self._engine.running, self._tokens, self._engine.version,
                             self._engine.accept_length)

    def _last(self, number: int, result: Result) -> None:
        ticket, whole = self._tickets.pop(number), result.completion
        piece = Completion(whole.ids[ticket.told:], whole.logprobs[ticket.told:], whole.versions[ticket.told:],
                           whole.stop)
        self._tokens += len(piece.ids)
        ticket.deliver(piece, last=True)

    def _fail(self, error: Exception) -> None:
        """The requests that hold a slot are those that came first: they are called back, and their streams fail. Where
        none holds one, the first fails, so that no step fails for nobody."""
        for number in list(self._tickets)[:max(self._engine.running, 1)]:
            self._engine.abort(number)
            lost = EngineLost(f"a step of the engine failed: {type(error).__name__}: {error}")
            lost.__cause__ = error
            self._tickets.pop(number).fail(lost)
