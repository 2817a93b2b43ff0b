"""A task behind HTTP: any process or host can offer one to an orchestrator. Needs the extra `serve`.

    from glm5_jax.rl import task_server
    task_server.serve(service, token, port=8500)

POST /play {"order", "id", "so_far"} answers with the trajectory, POST /reward with {"reward"} of a trajectory, POST
/call_back {"id"} has a rollout end soon, GET /health says which task this is. Every request bears the token. A rollout
whose client is gone, or that is asked for anew, is cancelled; where it takes its time to clean up, the answer is 503.
"""

import asyncio
import json
import secrets
import typing
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from glm5_jax.records import Trajectory, from_json, to_json
from glm5_jax.rl.executors import WorkerLost
from glm5_jax.rl.ledger import Order
from glm5_jax.rl.orchestrator import Service

LONGEST = 2**28  # bytes of one request: a trajectory with its tokens
GRACE_S = 5.0  # for what was cancelled to clean up
STATUS = {WorkerLost: 503, TimeoutError: 504}  # what the other end has to know by kind; anything else is a 500
T = TypeVar("T")


class Refused(Exception):
    """A request that cannot be served as it is."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def serve(service: Service, token: str, *, host: str = "127.0.0.1", port: int = 8500) -> None:
    """Serves until it is interrupted. To be reached by other hosts it has to be told so: `host`."""
    uvicorn.run(app(service, token), host=host, port=port, log_level="warning")


def app(service: Service, token: str, *, longest: int = LONGEST) -> Starlette:
    """The ASGI application of one service; its `alive` and time limits are the orchestrator's to look at."""
    if not token:
        raise ValueError("token: expected a secret, found ''")
    playing: dict[str, tuple[asyncio.Task[Trajectory], asyncio.Event]] = {}

    async def play(request: Request) -> Response:
        asked = await _body(request, longest, {"order", "id", "so_far"})
        order, id = _order(asked["order"]), asked["id"]
        if order.task != service.name or not isinstance(id, str):
            raise Refused(400, f"order.task and id: expected {service.name!r} and a string, found {order.task!r} and "
                               f"{id!r}")
        so_far = None if asked["so_far"] is None else _trajectory(asked["so_far"])
        while id in playing:  # the one who asked for it has lost sight of it
            earlier, _ = playing[id]
            _cancel(earlier)
            await asyncio.wait({earlier}, timeout=GRACE_S)
            if not earlier.done():
                raise Refused(503, f"id: expected a rollout that has ended, found that {id!r} still cleans up")
        called_back = asyncio.Event()
        work = asyncio.create_task(_awaited(service.play(order, id, so_far, called_back)))
        playing[id] = work, called_back
        work.add_done_callback(lambda _: playing.pop(id))  # and not before: what was cancelled may take its time
        ended = await _unless_gone(request, work)
        return Response(to_json(ended), media_type="application/json")

    async def reward(request: Request) -> Response:
        trajectory = _trajectory(await _body(request, longest))
        if service.reward is None:
            raise Refused(404, f"expected a task with a reward of its own, found {service.name!r}")
        value = await _unless_gone(request, asyncio.create_task(_awaited(service.reward(trajectory))))
        return JSONResponse({"reward": float(value)})

    async def call_back(request: Request) -> Response:
        asked = await _body(request, longest, {"id"})
        if asked["id"] in playing:
            playing[asked["id"]][1].set()
        return JSONResponse({})

    async def health(request: Request) -> Response:
        return JSONResponse({"task": service.name, "playing": len(playing)})

    def guarded(answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            given = request.headers.get("authorization", "")
            if not secrets.compare_digest(given.encode(), f"Bearer {token}".encode()):
                return JSONResponse({"error": "expected the token of this task"}, 401)
            try:
                return await answer(request)
            except Refused as refused:
                return JSONResponse({"error": str(refused)}, refused.status)
            except ClientDisconnect:
                return Response(status_code=499)  # for nobody
            except Exception as error:
                status = next((status for kind, status in STATUS.items() if isinstance(error, kind)), 500)
                return JSONResponse({"error": f"{type(error).__name__}: {error}"}, status)
        return endpoint

    return Starlette(routes=[Route("/health", guarded(health)), *(
        Route("/" + one.__name__, guarded(one), methods=["POST"]) for one in (play, reward, call_back))])


async def _body(request: Request, longest: int, fields: set[str] | None = None) -> dict[str, Any]:
    """The JSON object of a request, with exactly these fields where they are given."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > longest:
            raise Refused(413, f"body: expected at most {longest} bytes, found more")
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"body: expected JSON, found {error}") from None
    if not isinstance(asked, dict) or fields is not None and asked.keys() != fields:
        raise Refused(400, f"body: expected an object{f' with the fields {sorted(fields)}' if fields else ''}, found "
                           f"{sorted(asked) if isinstance(asked, dict) else type(asked).__name__}")
    return asked


def _order(asked: Any) -> Order:
    kinds = typing.get_type_hints(Order)
    if not isinstance(asked, dict) or {name: type(value) for name, value in asked.items()} != kinds:
        expected = ", ".join(f"{name}: {kind.__name__}" for name, kind in kinds.items())
        raise Refused(400, f"order: expected an object with {expected}, found {asked!r}")
    return Order(**asked)


def _trajectory(asked: Any) -> Trajectory:
    try:
        return from_json(Trajectory, json.dumps(asked))
    except (TypeError, ValueError) as error:
        raise Refused(400, str(error)) from None


async def _awaited(work: Awaitable[T]) -> T:
    return await work


def _cancel(work: asyncio.Task[Any]) -> None:
    """Once: a second time would break into its cleaning up."""
    if not work.cancelling():
        work.cancel()


async def _unless_gone(request: Request, work: asyncio.Task[T]) -> T:
    """What `work` gives; it is cancelled when the client goes away, and so is whatever else ends the request."""
    gone = asyncio.ensure_future(_disconnected(request))
    either: set[asyncio.Future[Any]] = {work, gone}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        if work.cancelled():
            raise Refused(409, "the rollout was asked for anew")
        return work.result()
    finally:
        _cancel(work)
        gone.cancel()
        await asyncio.wait(either, timeout=GRACE_S)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
