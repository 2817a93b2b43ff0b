"""The only door between agents and the engine: messages in, messages out, and the tokens of both on record.

    gateway = Gateway(Driver(engine), tokenizer)
    session = gateway.open()
    answer = await gateway.chat(session, [{"role": "user", "content": "1 + 1?"}]).answer()
    gateway.turns(session)

What was sent and sampled is kept as ids and never made from text again; see `sessions`. The calls of a session may
overlap: each can continue any that ended before it began. For one event loop.
"""

import asyncio
import copy
import dataclasses
import hashlib
import itertools
from collections.abc import Sequence

from glm5_jax.infer.request import RequestTooLong, Sampling
from glm5_jax.records import Completion, Message, StopReason, Turn
from glm5_jax.serve import sessions
from glm5_jax.serve.generator import Closed, Generator, Overloaded, UnknownSession
from glm5_jax.serve.reader import ChatReader, StoppedReader, TextReader
from glm5_jax.serve.sessions import Call, Question
from glm5_jax.serve.stream import Answer, Piece, Stream
from glm5_jax.text import tools as definitions
from glm5_jax.text.tokenizer import Tokenizer

__all__ = ["Answer", "Gateway", "Options", "Piece", "Stream"]


@dataclasses.dataclass(frozen=True)
class Options:
    """How a call is sampled and rendered; one that makes no sense raises ValueError when the call is made."""

    max_new_tokens: int | None = None  # None: all the room that is left
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None  # None: made of the session and the number of the call in it
    stop: tuple[str, ...] = ()  # looked for in the answer, not in the thought nor in calls
    thinking: bool = True  # the template's enable_thinking
    clear_thinking: bool = True  # the template's


@dataclasses.dataclass
class _Session:
    name: str
    calls: list[Call]
    turns: list[Turn]
    started: int  # calls so far, ended or not
    extended: set[int]  # the calls that others continue

    def record(self, call: Call, resumed: Call | None) -> int:
        """Puts a call on record and returns its index: that of the aborted one which it resumes, unless a call
        continues that one as it was."""
        turn, last = sessions.turn(self.calls, call), len(self.calls)
        index = next((i for i, one in enumerate(self.calls) if one is resumed and i not in self.extended), last)
        self.calls[index:index + 1], self.turns[index:index + 1] = [call], [turn]
        return index


class Gateway:
    """Sessions of calls over one generator; `limit` calls at once."""

    def __init__(self, generator: Generator, tokenizer: Tokenizer, *, model: str = "glm5", limit: int = 1024):
        if limit < 1:
            raise ValueError(f"limit: expected room for at least 1 call, found {limit}")
        self.generator, self.tokenizer, self.model, self.limit = generator, tokenizer, model, limit
        self._sessions: dict[str, _Session] = {}
        self._names = (f"session-{n}" for n in itertools.count())
        self._streams: dict[Stream, None] = {}  # in the order of their begin
        self._closed = False
        self._left = asyncio.Event()

    @property
    def running(self) -> int:
        """Calls under way."""
        return len(self._streams)

    def open(self, session: str | None = None, *, turns: Sequence[Turn] = ()) -> str:
        """A new session; returns its name. `turns` are the record of an earlier run, which it goes on from.

        Raises ValueError for a name that is taken and for turns without tokens; Closed.
        """
        self._require_open()
        name = session if session is not None else next(name for name in self._names if name not in self._sessions)
        if name in self._sessions:
            raise ValueError(f"session: expected a name that is free, found {name!r}; close it first")
        extended = {turn.extends for turn in turns if turn.extends is not None}
        self._sessions[name] = _Session(name, sessions.restored(turns), list(turns), len(turns), extended)
        return name

    def chat(self, session: str, messages: Sequence[Message], tools: Sequence[Message] = (),
             options: Options = Options(), *, resume: Completion | None = None) -> Stream:
        """The next reply of an assistant; nothing is drawn before the stream is read.

        `resume` is the completion of an aborted call of the same messages: it is gone on with, and takes the place of
        that call on record. Raises ChatError for messages that cannot be rendered, RequestTooLong where prompt and new
        tokens exceed a context, ValueError for other options, tools or messages that cannot be; Overloaded,
        UnknownSession, Closed. Reading the stream raises EngineLost, Overloaded, Closed.
        """
        one = self._admit(session)
        definitions.check(tools)
        tools = copy.deepcopy(tuple(tools))
        question = sessions.ask(self.tokenizer, one.calls, messages, tools, enable_thinking=options.thinking,
                                clear_thinking=options.clear_thinking)
        reader = ChatReader(self.tokenizer, tools, thinking=options.thinking)
        return self._begin(one, question, StoppedReader(reader, options.stop), options, resume)

    def text(self, session: str, prompt: str | Sequence[int], options: Options = Options(), *,
             resume: Completion | None = None) -> Stream:
        """The text behind a prompt, without the template: ids, or a text in which spelled markers are markers.

        Its events are CONTENT and STOP. Errors as of `chat`.
        """
        one = self._admit(session)
        question = sessions.ask_text(self.tokenizer, one.calls, prompt)
        return self._begin(one, question, StoppedReader(TextReader(self.tokenizer), options.stop), options, resume)

    def turns(self, session: str) -> tuple[Turn, ...]:
        """The calls that have ended, in the order of their end. Raises UnknownSession."""
        return tuple(self._known(session).turns)

    def abort(self, session: str) -> None:
        """Calls back what is under way in a session: it ends soon, with stop ABORT. Raises UnknownSession."""
        self._known(session)
        self._call_back([stream for stream in self._streams if stream.session == session])

    def close(self, session: str) -> tuple[Turn, ...]:
        """Forgets a session, and returns its turns; what is under way is called back and not among them. Raises
        UnknownSession."""
        self.abort(session)
        self.generator.release(session)
        return tuple(self._sessions.pop(session).turns)

    async def shutdown(self) -> None:
        """Takes no more calls, calls back those under way and waits until their readers have seen the end."""
        self._closed = True
        self._call_back(list(self._streams))
        while any(stream.started for stream in self._streams):
            self._left.clear()
            await self._left.wait()

    def _call_back(self, streams: Sequence[Stream]) -> None:
        for stream in streams:
            stream.call_back()
        for session in dict.fromkeys(stream.session for stream in streams if stream.started):
            self.generator.abort(session)

    def _begin(self, session: _Session, question: Question, reader: StoppedReader, options: Options,
               resume: Completion | None) -> Stream:
        resumed = None
        if resume is not None:
            if resume.stop is not StopReason.ABORT:
                raise ValueError(f"resume: expected a completion with stop 'abort', found '{resume.stop}'")
            resumed = next((call for call in session.calls
                            if call.completion == resume and call.question.ids == question.ids), None)
            reader.read(resume)
        number = resumed.number if resumed else session.started
        sampling = self._sampling(session, number, options, len(question.ids))
        drawn = resume.ids if resume else ()
        if len(drawn) >= sampling.max_new_tokens:
            raise ValueError(f"resume: expected fewer than max_new_tokens = {sampling.max_new_tokens} tokens, found "
                             f"{len(drawn)}")

        def record(completion: Completion) -> Answer:
            reply, errors = reader.reply()
            turn = session.record(Call(question, reply, completion, number), resumed)
            return Answer(copy.deepcopy(reply), completion, question.ids, self.model, turn, reader.found, tuple(errors))

        stream = Stream(session.name, question.ids, reader, resume, record=record, leave=self._leave,
                        begin=lambda: self.generator.stream(question.ids + drawn, sampling, session=session.name,
                                                            drawn=len(drawn)))
        session.started += resumed is None
        if question.extends is not None:
            session.extended.add(question.extends)
        self._streams[stream] = None
        return stream

    def _sampling(self, session: _Session, number: int, options: Options, prompt: int) -> Sampling:
        if isinstance(options.stop, str) or not all(options.stop):
            raise ValueError(f"Options.stop: expected some strings, none of them empty, found {options.stop!r}")
        room = self.generator.max_len - prompt
        wanted = max(room, 1) if options.max_new_tokens is None else options.max_new_tokens
        seed = _seed(session.name, number) if options.seed is None else options.seed
        sampling = Sampling(wanted, options.temperature, options.top_p, options.top_k, self.tokenizer.stop_ids, seed)
        if wanted > room:
            raise RequestTooLong(f"messages and max_new_tokens: expected at most {self.generator.max_len} tokens in "
                                 f"all, found {prompt} + {wanted}; send less or ask for fewer new tokens")
        return sampling

    def _leave(self, stream: Stream) -> None:
        self._streams.pop(stream, None)
        self._left.set()

    def _admit(self, session: str) -> _Session:
        self._require_open()
        found = self._known(session)
        if self.running >= self.limit:
            raise Overloaded(f"calls at once: expected at most {self.limit}, found another; try again later")
        return found

    def _known(self, session: str) -> _Session:
        if session not in self._sessions:
            raise UnknownSession(f"session: expected one that is open, found {session!r}")
        return self._sessions[session]

    def _require_open(self) -> None:
        if self._closed:
            raise Closed("this gateway: it has been shut down")


def _seed(session: str, number: int) -> int:
    """32 bits, another for each call of each session; the same in every run."""
    return int.from_bytes(hashlib.sha256(f"{number} {session}".encode()).digest()[:4], "big")
