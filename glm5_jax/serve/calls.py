"""One request of an API as calls of the gateway, and what comes back: choice by choice, while it is drawn.

Neither API is known here. Both shape their answers, whole or streamed, from the same `Part`s, so that a streamed answer
says what the whole one says.
"""

import asyncio
import contextlib
import dataclasses
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from glm5_jax.records import Completion, Message, StopReason
from glm5_jax.serve.gateway import Gateway, Options, Stream
from glm5_jax.serve.refusals import Refused
from glm5_jax.text import tools as text_tools
from glm5_jax.text import values
from glm5_jax.text.grammar import Event, Kind, collect
from glm5_jax.text.reading import EMPTY_THOUGHT


@dataclasses.dataclass(frozen=True)
class Chat:
    """A conversation that a choice continues."""

    messages: tuple[Message, ...]
    tools: tuple[Message, ...] = ()


@dataclasses.dataclass(frozen=True)
class Choice:
    """One answer that is asked for: to a conversation, or behind raw text or token ids."""

    prompt: Chat | str | tuple[int, ...]
    options: Options


class Delta(NamedTuple):
    """What is new in an answer: more of the thought or of the text, or a whole call, `text` being its name.

    A call comes as a whole because until its end it may turn out to be none.
    """

    kind: Literal["thought", "text", "call"]
    text: str
    arguments: str = ""  # JSON


@dataclasses.dataclass(frozen=True)
class Said:
    """A whole answer; deltas of one kind that follow each other are joined."""

    prompt: tuple[int, ...]
    deltas: tuple[Delta, ...]
    completion: Completion
    stop_string: str | None  # the one that ended it; it is no part of the deltas

    def text(self, kind: str) -> str:
        """All of the thought, or of the text."""
        return "".join(delta.text for delta in self.deltas if delta.kind == kind)

    @property
    def calls(self) -> tuple[Delta, ...]:
        return tuple(delta for delta in self.deltas if delta.kind == "call")

    @property
    def end(self) -> Literal["length", "stop_string", "calls", "stop"]:
        """Why it ended."""
        if self.completion.stop is StopReason.LENGTH:
            return "length"
        if self.stop_string is not None:
            return "stop_string"
        return "calls" if self.calls else "stop"


class Part(NamedTuple):
    """What arrived of one choice; `said` is there in its last part."""

    choice: int
    prompt: tuple[int, ...]
    deltas: tuple[Delta, ...]
    completion: Completion | None = None
    said: Said | None = None


class Reader:
    """Turns the events of one answer into deltas."""

    def __init__(self, tools: Sequence[Message]):
        self._tools = tuple(tools) or None
        self._thought = False
        self._call: list[Event] = []

    def read(self, events: Iterable[Event]) -> list[Delta]:
        found: list[Delta] = []
        for event in events:
            match event.kind:
                case Kind.REASONING if event.text:
                    self._thought = True
                    found.append(Delta("thought", event.text))
                case Kind.THOUGHT_END if not self._thought:
                    found.append(Delta("thought", EMPTY_THOUGHT))
                case Kind.CONTENT if event.text:
                    found.append(Delta("text", event.text))
                case Kind.CALL:
                    self._call = [event]
                case Kind.ARGUMENT | Kind.VALUE:
                    self._call.append(event)
                case Kind.CALL_END:
                    found.append(self._called([*self._call, event]))
        return found

    def _called(self, events: Sequence[Event]) -> Delta:
        message, _ = text_tools.understand(collect(events), self._tools)
        function = message["tool_calls"][0]["function"]
        return Delta("call", function["name"], values.dump(function["arguments"]))


@contextlib.asynccontextmanager
async def started(gateway: Gateway, session: str, choices: Sequence[Choice]) -> AsyncIterator[AsyncIterator[Part]]:
    """Calls the gateway once for each choice, as forks of one session; at the end all are called back that still run.

    Iterating raises what the gateway raises, and Refused for a call that was called back by others.
    """
    async with contextlib.AsyncExitStack() as stack:
        streams = []
        for choice in choices:
            streams.append(_stream(gateway, session, choice))
            stack.push_async_callback(streams[-1].aclose)
        single = [_parts(index, stream, choice) for index, (stream, choice) in enumerate(zip(streams, choices))]
        yield await stack.enter_async_context(contextlib.aclosing(_merged(single)))


async def gathered(parts: AsyncIterator[Part]) -> list[Said]:
    """The whole answers, in the order of the choices."""
    ended = {part.choice: part.said async for part in parts if part.said}
    return [ended[index] for index in sorted(ended)]


def _stream(gateway: Gateway, session: str, choice: Choice) -> Stream:
    if isinstance(choice.prompt, Chat):
        return gateway.chat(session, choice.prompt.messages, choice.prompt.tools, choice.options)
    return gateway.text(session, choice.prompt, choice.options)


async def _parts(index: int, stream: Stream, choice: Choice) -> AsyncGenerator[Part, None]:
    reader = Reader(choice.prompt.tools if isinstance(choice.prompt, Chat) else ())
    whole: list[Delta] = []
    async for piece in stream:
        deltas = tuple(_joined(reader.read(piece.events)))
        whole += deltas
        yield Part(index, stream.prompt, deltas, piece.completion)
    answer = await stream.answer()
    if answer.completion.stop is StopReason.ABORT:
        raise Refused(503, "the call was called back before its end", code="called_back", retry_after=1)
    yield Part(index, stream.prompt, (), None,
               Said(stream.prompt, tuple(_joined(whole)), answer.completion, answer.stopped_by))


def _joined(deltas: Iterable[Delta]) -> Iterator[Delta]:
    for kind, run in itertools.groupby(deltas, key=lambda delta: delta.kind):
        if kind == "call":
            yield from run
        else:
            yield Delta(kind, "".join(delta.text for delta in run))


async def _merged(iterators: Sequence[AsyncIterator[Part]]) -> AsyncGenerator[Part, None]:
    """The items of all iterators as they come."""
    waiting: dict[asyncio.Task[Part], AsyncIterator[Part]] = {}

    def wait_for(iterator: Any) -> None:
        waiting[asyncio.ensure_future(anext(iterator))] = iterator

    try:
        for iterator in iterators:
            wait_for(iterator)
        while waiting:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in [task for task in waiting if task.done()]:
                iterator = waiting.pop(task)
                if not isinstance(task.exception(), StopAsyncIteration):
                    part = task.result()
                    wait_for(iterator)
                    yield part
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
