"""A task of another process or host: the `play` and `reward` of a service whose workers are behind HTTP.

    task = TaskClient("search", ["http://10.0.0.7:8500", "http://10.0.0.8:8500"], token)
    watch = asyncio.create_task(task.watch())
    orchestrator.register(Service("search", 1.0, 32, 8, seeds, task.play, task.reward, alive=task.alive))

A worker that cannot be reached, or misses its beats, is outside: what it had is played again by another one (see
`rl.orchestrator`), and it is inside again once it answers. Needs the extra `serve`; `rl.task_server` is the other end.
"""

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import Iterable
from typing import Any

import httpx

from glm5_jax.records import Trajectory, from_json, to_json
from glm5_jax.rl.executors import CallFailed, WorkerLost
from glm5_jax.rl.heartbeat import Heartbeat, Pace
from glm5_jax.rl.ledger import Order

CONNECT_S = 10.0
AGAIN_S = 1.0  # between the times that a rollout is called back
LONGEST = 2**28  # bytes of one answer


@dataclasses.dataclass(eq=False)
class _Worker:
    url: str
    busy: int = 0
    lost: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)


class TaskClient:
    """The workers of one task, for calls of one event loop. A call goes to the one with the fewest, and waits
    `patience_s` seconds where none is inside. An answer may have `longest` bytes."""

    def __init__(self, task: str, urls: Iterable[str], token: str, *, patience_s: float = 60.0, pace: Pace = Pace(),
                 longest: int = LONGEST, transport: httpx.AsyncBaseTransport | None = None):
        self.task, self._patience_s, self._longest = task, patience_s, longest
        self._inside = {url: _Worker(url) for url in urls}
        self._outside: set[str] = set()
        self._changed = asyncio.Event()
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {token}"}, transport=transport, timeout=httpx.Timeout(
                None, connect=CONNECT_S), limits=httpx.Limits(max_connections=None, max_keepalive_connections=64))
        self._heartbeat = Heartbeat(self._ask, pace, lost=lambda url: self._lose(self._inside.get(url)),
                                    back=self._admit)

    @property
    def inside(self) -> dict[str, int]:
        """The calls of each worker that serves."""
        return {url: worker.busy for url, worker in self._inside.items()}

    def alive(self) -> bool:
        """Whether a worker is inside."""
        return bool(self._inside)

    async def watch(self) -> None:
        """Beats until it is cancelled; without it nobody who is outside comes back."""
        await self._heartbeat.run(lambda: (tuple(self._inside), tuple(self._outside)))

    async def close(self) -> None:
        """Closes the connections; calls under way fail."""
        await self._client.aclose()

    async def play(self, order: Order, id: str, so_far: Trajectory | None, called_back: asyncio.Event) -> Trajectory:
        """See `orchestrator.Service`. Raises WorkerLost, TimeoutError, and CallFailed with what the task raised."""
        asked = {"order": dataclasses.asdict(order), "id": id, "so_far": so_far and json.loads(to_json(so_far))}
        worker = await self._worker()
        watch = asyncio.ensure_future(self._call_back(worker, id, called_back))
        try:
            return from_json(Trajectory, (await self._call(worker, "play", json.dumps(asked))).decode())
        finally:
            watch.cancel()
            await asyncio.wait({watch})

    async def reward(self, trajectory: Trajectory) -> float:
        """The task's own reward; raises as `play`."""
        answer = await self._call(await self._worker(), "reward", to_json(trajectory))
        return json.loads(answer)["reward"]

    async def _worker(self) -> _Worker:
        try:
            async with asyncio.timeout(self._patience_s):
                while not self._inside:
                    await self._changed.wait()
        except TimeoutError:
            raise WorkerLost(f"task {self.task!r}: expected a worker within {self._patience_s:g} s, found none of "
                             f"{sorted(self._outside)}") from None
        return min(self._inside.values(), key=lambda worker: worker.busy)

    async def _call(self, worker: _Worker, what: str, body: str) -> bytes:
        """One request; raises WorkerLost also where the heartbeat has found the worker to be lost meanwhile."""
        worker.busy += 1
        lost = asyncio.ensure_future(worker.lost.wait())
        request = asyncio.ensure_future(self._post(worker, what, body))
        both: set[asyncio.Future[Any]] = {request, lost}
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not request.done():
                raise WorkerLost(f"{worker.url}: it does not answer")
            return request.result()
        except httpx.TransportError as error:
            self._lose(worker)
            raise WorkerLost(f"{worker.url}: {type(error).__name__}: {error}") from error
        finally:
            worker.busy -= 1
            for task in both:
                task.cancel()
            await asyncio.wait(both)

    async def _post(self, worker: _Worker, what: str, body: str) -> bytes:
        async with self._client.stream("POST", f"{worker.url}/{what}", content=body,
                                       headers={"Content-Type": "application/json"}) as answer:
            found = bytearray()
            async for chunk in answer.aiter_bytes():
                found += chunk
                if len(found) > self._longest:
                    raise CallFailed(f"{worker.url}: expected an answer of at most {self._longest} bytes, found more")
        if answer.status_code == 200:
            return bytes(found)
        kind: type[Exception] = {502: WorkerLost, 503: WorkerLost, 504: TimeoutError}.get(
            answer.status_code, CallFailed)
        raise kind(f"{worker.url}: status {answer.status_code}: {found[:2000].decode(errors='replace')}")

    async def _call_back(self, worker: _Worker, id: str, called_back: asyncio.Event) -> None:
        """Until it is cancelled, whatever the answer: one may come from before the worker has begun the rollout."""
        await called_back.wait()
        while True:
            with contextlib.suppress(httpx.RequestError):
                await self._client.post(f"{worker.url}/call_back", json={"id": id})
            await asyncio.sleep(AGAIN_S)

    async def _ask(self, url: str) -> None:
        answer = await self._client.get(f"{url}/health")
        told: Any = answer.json() if answer.status_code == 200 else {}
        if told.get("task") != self.task:
            raise CallFailed(f"{url}: expected a worker of task {self.task!r}, found status {answer.status_code} and "
                             f"{told}")

    async def _admit(self, url: str) -> None:
        self._outside.remove(url)
        self._inside[url] = _Worker(url)
        self._changed.set()
        self._changed = asyncio.Event()

    def _lose(self, worker: _Worker | None) -> None:
        """Takes a worker out, unless it is out already."""
        if worker is not None and self._inside.get(worker.url) is worker:
            del self._inside[worker.url]
            self._outside.add(worker.url)
            worker.lost.set()
