"""A server in a thread, on a free port of this machine, for clients that know nothing of it."""

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from typing import Any

import anthropic
import httpx
import openai

from glm5_jax.infer.request import Sampling
from glm5_jax.records import Completion
from glm5_jax.serve import http
from glm5_jax.serve.gateway import Gateway
from glm5_jax.serve.generator import Generator
from glm5_jax.text.tokenizer import Tokenizer
from tests.serve.fakes import ScriptedGenerator

TOKEN = "the administrator's"
TOKENIZER = Tokenizer.packaged()
PATIENCE = 60  # seconds until a test that waits for what never comes is lost


def spelled(text: str) -> list[int]:
    """Token ids in which markers are markers."""
    return TOKENIZER.encode(text, specials=True)


class Halting:
    """A generator that says "Hm" and then waits to be called back, or raises `error`."""

    max_len = 4096
    said = Completion(spelled("Hm"), (-1.0, -2.0), (0, 0), "abort")

    def __init__(self, error: Exception | None = None):
        self._error = error
        self._recalled: dict[str, asyncio.Event] = {}

    async def stream(self, ids: Sequence[int], sampling: Sampling, *, session: str,
                     drawn: int = 0) -> AsyncGenerator[Completion, None]:
        recalled = self._recalled.setdefault(session, asyncio.Event())
        yield self.said
        if self._error is not None:
            raise self._error
        await recalled.wait()
        yield Completion((), (), (), "abort")

    def abort(self, session: str) -> None:
        self._recalled[session].set()

    def release(self, session: str) -> None:
        self._recalled.pop(session, None)


CALLED = "<tool_call>ls<arg_key>path</arg_key><arg_value>/tmp</arg_value><arg_key>depth</arg_key><arg_value>1" \
         "</arg_value></tool_call>"
# What the model of `saying` says to each seed.
SAID = [
    "I think.</think>Hello, wörld! 🦆<|user|>",
    f"Look.</think>Let me see.{CALLED}{CALLED}<|observation|>",
    "</think>No thought.<|endoftext|>",
    "A thought without an end",
    f"</think><tool_call>ls<arg_value>1</tool_call>{CALLED} and more<|user|>",
    "<|user|>",
]
SEEDS = range(len(SAID))


class Watched:
    """A generator that counts the streams under way, and says when there is one and when there are none."""

    def __init__(self, generator: Generator):
        self._generator, self.max_len = generator, generator.max_len
        self.running = 0
        self.busy, self.idle = threading.Event(), threading.Event()
        self.idle.set()

    async def stream(self, ids: Sequence[int], sampling: Sampling, *, session: str,
                     drawn: int = 0) -> AsyncGenerator[Completion, None]:
        self.running += 1
        self.idle.clear()
        self.busy.set()
        try:
            async with contextlib.aclosing(self._generator.stream(ids, sampling, session=session, drawn=drawn)) as own:
                async for piece in own:
                    yield piece
        finally:
            self.running -= 1
            if not self.running:
                self.busy.clear()
                self.idle.set()

    def abort(self, session: str) -> None:
        self._generator.abort(session)

    def release(self, session: str) -> None:
        self._generator.release(session)


@dataclasses.dataclass
class Live:
    """A server that answers at `url`."""

    url: str
    gateway: Gateway
    server: http.Server
    loop: asyncio.AbstractEventLoop
    thread: threading.Thread
    left: list[str]  # what was still under way in the server's loop when it had stopped

    def openai(self, token: str = TOKEN) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=token, max_retries=0)

    def anthropic(self, token: str = TOKEN) -> anthropic.Anthropic:
        return anthropic.Anthropic(base_url=self.url, api_key=token, max_retries=0)

    def plain(self, token: str | None = TOKEN) -> httpx.Client:
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=PATIENCE)

    def within(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What `function` returns, called in the server's loop."""
        async def call() -> Any:
            return function(*arguments)
        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(PATIENCE)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()


@contextlib.contextmanager
def serving(gateway: Gateway, gauges: Callable[[], Mapping[str, float]] = dict) -> Iterator[Live]:
    listening = http.listening("127.0.0.1", 0)
    server = http.Server(gateway, TOKEN, gauges)
    loops: list[asyncio.AbstractEventLoop] = []
    left: list[str] = []
    begun = threading.Event()

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        begun.set()
        await server.serve(sockets=[listening])
        left.extend(map(repr, asyncio.all_tasks() - {asyncio.current_task()}))

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert begun.wait(PATIENCE)
    live = Live("http://127.0.0.1:%d" % listening.getsockname()[1], gateway, server, loops[0], thread, left)
    try:
        yield live
    finally:
        live.stop()


@contextlib.contextmanager
def saying() -> Iterator[Live]:
    """A server whose model says what `SAID` has for the seed."""
    generator = ScriptedGenerator(lambda ids, sampling, session: spelled(SAID[sampling.seed % len(SAID)]))
    with serving(Gateway(generator, TOKENIZER)) as live:
        yield live
