"""Generators without a model: scripted tokens that come when a test says so."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence

from glm5_jax.infer.request import Sampling
from glm5_jax.records import Completion, StopReason

Script = Callable[[Sequence[int], Sampling, str], Sequence[int]]  # ids, sampling, session -> what a model would draw


class ScriptedGenerator:
    """Draws what `script(prompt, sampling, session)` says, up to the first stop id or the limit, `block` tokens a time.

    `script` is given the prompt without the `drawn` ids, so that an aborted stream resumes where it was. A piece comes
    at once, or `delay(session)` seconds of the loop's clock after the one before, or, while `gate` is not set, when it
    is. `error`, if set, is raised instead of the next piece. `running` are the sessions with a stream under way, and
    `asked` the ids, samplings and sessions so far, `released` the sessions that were.
    """

    def __init__(self, script: Script, *, max_len: int = 4096, block: int = 3, version: int = 0,
                 delay: Callable[[str], float] | None = None):
        self.max_len, self.version, self.block = max_len, version, block
        self._script, self._delay = script, delay
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.running: list[str] = []
        self.asked: list[tuple[tuple[int, ...], Sampling, str]] = []
        self.released: list[str] = []
        self._recalled: dict[str, asyncio.Event] = {}

    async def stream(self, ids: Sequence[int], sampling: Sampling, *, session: str,
                     drawn: int = 0) -> AsyncGenerator[Completion, None]:
        self.asked.append((tuple(ids), sampling, session))
        recalled = self._recalled.setdefault(session, asyncio.Event())
        whole = list(self._script(tuple(ids[:len(ids) - drawn]), sampling, session))[:sampling.max_new_tokens]
        ends = [n for n, id in enumerate(whole) if id in sampling.stop_ids]
        whole = whole[:ends[0] + 1] if ends else whole
        stop = StopReason.STOP if ends else StopReason.LENGTH
        self.running.append(session)
        try:
            at = drawn
            while True:
                await self._next(session, recalled)
                if recalled.is_set():
                    yield self._piece([], at, StopReason.ABORT)
                    return
                if self.error is not None:
                    raise self.error
                part = whole[at:at + self.block]
                at += len(part)
                yield self._piece(part, at - len(part), stop if at >= len(whole) else StopReason.ABORT)
                if at >= len(whole):
                    return
        finally:
            self.running.remove(session)
            if session not in self.running:
                self._recalled.pop(session, None)

    def abort(self, session: str) -> None:
        if session in self._recalled:
            self._recalled[session].set()

    def release(self, session: str) -> None:
        self.released.append(session)

    async def _next(self, session: str, recalled: asyncio.Event) -> None:
        if self._delay is not None:
            await asyncio.sleep(self._delay(session))
        waits = [asyncio.ensure_future(event.wait()) for event in (self.gate, recalled)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def _piece(self, ids: Sequence[int], at: int, stop: StopReason) -> Completion:
        """Log-probs that tell the place of a token, so that a token in the wrong place shows."""
        return Completion(tuple(ids), tuple(-(at + n + 1) / 1024 for n in range(len(ids))),
                          (self.version,) * len(ids), stop)
