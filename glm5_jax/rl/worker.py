"""One engine behind HTTP, for a loop in another process or on another host: it streams tokens and takes new policies.

    python -m glm5_jax.rl.worker --checkpoint runs/glm5-tiny/hf --policies runs/rl/policies --port 8100

It listens on this machine alone unless another --host is named, and prints where, and its token; `rl.remote` is its
client. A policy is fetched from the folder by number and checked byte for byte before the engine gets it (see
`rl.weights`): one that is not whole is refused, and the engine serves on what it had. Ctrl-C or SIGTERM ends it, and
its streams, for another engine to go on with.
"""

import argparse
import asyncio
import functools
import json
import os
import secrets
import socket
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from glm5_jax.checkpoint.released import load_hf
from glm5_jax.infer.engine import Engine
from glm5_jax.infer.request import Sampling
from glm5_jax.records import Completion, PolicyVersion, to_json
from glm5_jax.rl import weights
from glm5_jax.serve.driver import Driver
from glm5_jax.serve.http import GRACE_S, listening, MOST_BYTES, url

Load = Callable[[int], tuple[PolicyVersion, Any]]


def application(driver: Driver, token: str, load: Load) -> Starlette:
    """The ASGI application of one engine; `load` gives a policy and its parameters by number or raises WeightsError."""

    def guarded(answer: Callable[[dict[str, Any]], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            given = request.headers.get("authorization", "")
            if not secrets.compare_digest(given.encode(), f"Bearer {token}".encode()):
                return JSONResponse(_named(PermissionError("expected this worker's token")), status_code=401)
            try:
                return await answer(json.loads(await _body(request)))
            except Exception as error:
                return JSONResponse(_named(error), status_code=500)
        return endpoint

    async def stream(asked: dict[str, Any]) -> Response:
        pieces = driver.stream(asked["ids"], Sampling(**asked["sampling"]), session=asked["session"],
                               drawn=asked["drawn"])
        return StreamingResponse(_lines(pieces), media_type="application/x-ndjson")

    async def abort(asked: dict[str, Any]) -> Response:
        driver.abort(asked["session"])
        return JSONResponse({})

    async def push(asked: dict[str, Any]) -> Response:
        policy, params = await asyncio.to_thread(load, asked["number"])
        await driver.push(params, policy.number, cache=asked["cache"])
        return Response(to_json(policy), media_type="application/json")

    async def health(asked: dict[str, Any]) -> Response:
        version, now = await driver.call(lambda engine: engine.version), driver.gauges  # the engine's own word
        return JSONResponse({"max_len": driver.max_len, "version": version, "running": now.running,
                             "waiting": now.waiting, "tokens": now.tokens})

    return Starlette(routes=[Route(f"/{name}", guarded(answer), methods=["POST"]) for name, answer in
                             (("stream", stream), ("abort", abort), ("push", push), ("health", health))])


class Server(uvicorn.Server):
    """Serves the application of an engine until it is told to stop; then streams end as those of a closed driver."""

    def __init__(self, driver: Driver, token: str, load: Load):
        super().__init__(uvicorn.Config(application(driver, token, load), loop="asyncio", lifespan="off",
                                        log_level="warning", timeout_graceful_shutdown=GRACE_S))
        self._driver = driver

    async def shutdown(self, sockets: Any = None) -> None:
        closing = asyncio.create_task(asyncio.to_thread(self._driver.close))
        await super().shutdown(sockets)
        await closing


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MOST_BYTES:
            raise ValueError(f"body: expected at most {MOST_BYTES} bytes, found more")
    return bytes(body)


async def _lines(pieces: AsyncGenerator[Completion, None]) -> AsyncGenerator[str, None]:
    """A line for each piece; what goes wrong is the last one."""
    async with aclosing(pieces):
        try:
            async for piece in pieces:
                yield to_json(piece) + "\n"
        except Exception as error:
            yield json.dumps(_named(error)) + "\n"


def _named(error: Exception) -> dict[str, str]:
    return {"error": type(error).__name__, "message": str(error)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until it is told to stop; returns the exit code: 0, or 2 for a fault of the input."""
    options = _parser().parse_args(arguments)
    try:
        with listening(options.host, options.port) as taken:  # first: what comes next may take long
            serve(options, taken)
    except KeyboardInterrupt:
        pass  # raised anew by the server once it has stopped
    except (OSError, ValueError) as error:
        print(f"worker: {error}", file=sys.stderr)
        return 2
    return 0


def serve(options: argparse.Namespace, taken: socket.socket) -> None:
    """Serves at a socket that listens; raises OSError or ValueError for what cannot be served."""
    config, params = load_hf(options.checkpoint, dtype=options.dtype, progress=True)
    engine = Engine(params, config, slots=options.slots, max_len=options.max_len, block=options.block, fp8=options.fp8)
    with Driver(engine) as driver:
        token = options.token or secrets.token_urlsafe(32)
        print(f"at     {url(taken)}\ntoken  {token}", flush=True)
        Server(driver, token, functools.partial(weights.fetch, options.policies, like=params)).run(sockets=[taken])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m glm5_jax.rl.worker", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", required=True, help="directory in the released layout, for the config and the first weights")
    add("--policies", required=True, help="folder where the trainer publishes its policies")
    add("--host", default="127.0.0.1", help="address to listen at; the traffic is not encrypted")
    add("--port", type=int, default=0, help="0 for any that is free")
    add("--token", default=os.environ.get("GLM5_JAX_TOKEN"),
        help="what the client has to show; default that of the environment variable GLM5_JAX_TOKEN, which other users "
             "of the machine do not see as they see arguments, or a new one")
    add("--slots", type=int, default=8, help="completions that are drawn at once; others wait")
    add("--max-len", type=int, default=4096, help="tokens of a context")
    add("--block", type=int, default=16, help="tokens between two looks at new requests")
    add("--dtype", choices=("float32", "bfloat16"), help="of the weights; default as stored")
    add("--fp8", action="store_true", help="quantise every policy to FP8")
    return parser


if __name__ == "__main__":
    sys.exit(main())
