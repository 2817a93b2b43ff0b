"""An engine of another process or host, as the loop sees it: a `Generator` over HTTP; `rl.worker` is its server.

A stream is one request whose answer is a line of JSON for each piece. Where it is given up the connection closes, and
the worker frees the slot. Needs httpx (extra `serve`).
"""

import asyncio
import dataclasses
import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import httpx

from glm5_jax.infer.request import RequestTooLong, Sampling
from glm5_jax.records import Completion, PolicyVersion, from_json
from glm5_jax.rl.weights import WeightsError
from glm5_jax.serve.generator import Closed, EngineLost, Overloaded

ERRORS: dict[str, type[Exception]] = {kind.__name__: kind for kind in (
    Closed, EngineLost, Overloaded, RequestTooLong, ValueError, WeightsError)}
CONNECT_S = 10.0
KEEP_S = 2.0  # less than the worker keeps a connection: one that it is just closing would lose a call


class Remote:
    """The engine at `url`, for calls of one event loop; make it with `Remote.connect`."""

    def __init__(self, client: httpx.AsyncClient, max_len: int):
        self._client, self.max_len = client, max_len
        self._aborts: set[asyncio.Task[Any]] = set()

    @classmethod
    async def connect(cls, url: str, token: str, *, transport: httpx.AsyncBaseTransport | None = None) -> "Remote":
        """Raises EngineLost where no worker answers."""
        client = httpx.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {token}"}, transport=transport,
                                   timeout=httpx.Timeout(None, connect=CONNECT_S),
                                   limits=httpx.Limits(max_connections=None, keepalive_expiry=KEEP_S))
        one = cls(client, 0)
        try:
            one.max_len = (await one.health())["max_len"]
        except BaseException:
            await client.aclose()
            raise
        return one

    async def health(self) -> dict[str, Any]:
        """What the worker says of itself: `max_len`, `version`, `running`, `waiting`, `tokens`. Its engine answers
        between two steps; raises Closed or EngineLost where it cannot."""
        return await self._post("health", {})

    async def stream(self, ids: Sequence[int], sampling: Sampling, *, session: str,
                     drawn: int = 0) -> AsyncGenerator[Completion, None]:
        """The pieces of a completion, as of `Generator.stream`."""
        asked = {"ids": list(map(int, ids)), "sampling": dataclasses.asdict(sampling), "session": session,
                 "drawn": drawn}
        try:
            async with self._client.stream("POST", "/stream", json=asked) as answer:
                if answer.status_code != 200:
                    raise _error(answer.status_code, await answer.aread())
                async for line in answer.aiter_lines():
                    if line.startswith('{"error"'):
                        raise _error(answer.status_code, line.encode())
                    yield from_json(Completion, line)
        except httpx.TransportError as error:
            raise EngineLost(f"{self._client.base_url}: {type(error).__name__}: {error}") from error

    def abort(self, session: str) -> None:
        """Calls the running stream of a session back; it ends with what it has."""
        task = asyncio.get_running_loop().create_task(self._post("abort", {"session": session}))
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)

    def release(self, session: str) -> None:
        """Nothing to forget: the worker's cache of a session goes when its slot is needed."""

    async def push(self, number: int, *, cache: str = "recompute") -> PolicyVersion:
        """Has the worker serve policy `number` of its folder. Raises WeightsError, and the worker serves on what it
        had, where that policy is not whole."""
        return PolicyVersion(**await self._post("push", {"number": number, "cache": cache}))

    async def aclose(self) -> None:
        await asyncio.gather(*self._aborts, return_exceptions=True)
        await self._client.aclose()

    async def _post(self, what: str, asked: dict[str, Any]) -> dict[str, Any]:
        try:
            answer = await self._client.post("/" + what, json=asked)
        except httpx.TransportError as error:
            raise EngineLost(f"{self._client.base_url}: {type(error).__name__}: {error}") from error
        if answer.status_code != 200:
            raise _error(answer.status_code, answer.content)
        return answer.json()


def _error(status: int, body: bytes) -> Exception:
    """The exception that the worker named, EngineLost for an answer that is none of its."""
    try:
        told = json.loads(body)
        return ERRORS[told["error"]](told["message"])
    except (ValueError, KeyError, TypeError):
        return EngineLost(f"expected an answer of a worker, found status {status}: {body[:200]!r}")
