"""The gateway over HTTP: who may call, what is answered while it is drawn, and what happens when a client goes away.

Needs the extra `serve`. One token, the administrator's, opens sessions and runs calls in sessions that are not kept;
each session has a token of its own, which reaches that session and nothing else.
"""

import asyncio
import collections
import contextlib
import hashlib
import json
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glm5_jax.records import Turn
from glm5_jax.serve import anthropic_api, calls, openai_api, refusals
from glm5_jax.serve.gateway import Gateway
from glm5_jax.serve.refusals import Refused

Endpoint = Callable[[Request], Awaitable[Response]]
Asked = openai_api.Asked | anthropic_api.Asked

MOST_BYTES = 32 * 2**20  # of a request
BACKLOG = 2048  # connections that wait to be taken
GRACE_S = 5  # that a client has, once the server stops, to read the end of its answer
STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]


def application(gateway: Gateway, token: str, gauges: Callable[[], Mapping[str, float]] = dict) -> Starlette:
    """The ASGI application; `token` is the administrator's, `gauges` are what /metrics says beside its own."""
    door = _Door(gateway, token, gauges)
    return Starlette(routes=door.routes(), exception_handlers={HTTPException: _unrouted},
                     middleware=[Middleware(_Counted, door.answered)])


class Server(uvicorn.Server):
    """Serves an application until it is told to stop; calls under way are called back then, and their streams end."""

    def __init__(self, gateway: Gateway, token: str, gauges: Callable[[], Mapping[str, float]] = dict):
        super().__init__(uvicorn.Config(
            application(gateway, token, gauges), loop="asyncio", http="h11", ws="none", lifespan="off",
            log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=GRACE_S))
        self._gateway = gateway

    async def shutdown(self, sockets: Any = None) -> None:
        ending = asyncio.create_task(self._gateway.shutdown())
        await super().shutdown(sockets)
        await ending


def listening(host: str, port: int) -> socket.socket:
    """A socket that takes connections, for `Server.run(sockets=[...])`; port 0 is any free one. Raises ValueError for a
    port that cannot be, and OSError."""
    if not 0 <= port < 2**16:
        raise ValueError(f"port: expected 0 to 65535, found {port}")
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    # Only where the protocol is named asyncio switches Nagle's delay off: small events have to leave at once.
    taken = socket.socket(family, kind, protocol)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
        taken.listen(BACKLOG)
    except OSError as error:
        taken.close()
        raise OSError(error.errno, f"host {host}, port {port}: {error.strerror}") from error
    return taken


def url(taken: socket.socket) -> str:
    """Where clients find what listens at the socket."""
    host, port = taken.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class _Door:
    """The endpoints. Tokens are kept and looked up by their digests: the time that takes says nothing of a token."""

    def __init__(self, gateway: Gateway, token: str, gauges: Callable[[], Mapping[str, float]]):
        if not token:
            raise ValueError("token: expected a secret, found an empty string")
        self._gateway, self._gauges = gateway, gauges
        self._reached: dict[bytes, str | None] = {_digest(token): None}  # the session of a token; None: all of them
        self.answered: collections.Counter[int] = collections.Counter()  # by status

    def routes(self) -> list[Route]:
        return [Route(path, self._guarded(endpoint), methods=[method]) for method, path, endpoint in (
            ("POST", "/v1/chat/completions", self._chat),
            ("POST", "/v1/completions", self._text),
            ("POST", "/v1/messages", self._messages),
            ("POST", "/v1/messages/count_tokens", self._count_tokens),
            ("GET", "/v1/models", self._models),
            ("GET", "/v1/models/{id:path}", self._model),
            ("POST", "/v1/sessions", self._open),
            ("GET", "/v1/sessions/{id:path}", self._turns),
            ("DELETE", "/v1/sessions/{id:path}", self._close),
            ("GET", "/health", self._health),
            ("GET", "/metrics", self._metrics))]

    def _guarded(self, endpoint: Endpoint) -> Endpoint:
        """What an endpoint raises is answered in the shape of its API."""
        async def guarded(request: Request) -> Response:
            try:
                return await endpoint(request)
            except ClientDisconnect:
                return Response(status_code=499)  # nobody reads it
            except Exception as error:
                return refusal(request.url.path, error)
        return guarded

    async def _chat(self, request: Request) -> Response:
        session = self._reach(request)
        asked = openai_api.chat(await _body(request), self._gateway.model, self._gateway.tokenizer)
        return _Live(self._gateway, session, asked)

    async def _text(self, request: Request) -> Response:
        session = self._reach(request)
        asked = openai_api.text(await _body(request), self._gateway.model, self._gateway.tokenizer)
        return _Live(self._gateway, session, asked)

    async def _messages(self, request: Request) -> Response:
        session = self._reach(request)
        return _Live(self._gateway, session, anthropic_api.messages(await _body(request), self._gateway.model))

    async def _count_tokens(self, request: Request) -> Response:
        self._reach(request)
        body = await _body(request)
        return JSONResponse(anthropic_api.count_tokens(body, self._gateway.model, self._gateway.tokenizer))

    async def _models(self, request: Request) -> Response:
        self._reach(request)
        return JSONResponse(openai_api.models(self._gateway.model, self._gateway.generator.max_len))

    async def _model(self, request: Request) -> Response:
        self._reach(request)
        refusals.check_model(request.path_params["id"], self._gateway.model)
        return JSONResponse(openai_api.described(self._gateway.model, self._gateway.generator.max_len))

    async def _open(self, request: Request) -> Response:
        self._administrator(request)
        session, token = self._gateway.open(), secrets.token_urlsafe(32)
        self._reached[_digest(token)] = session
        return JSONResponse({"id": session, "object": "session", "token": token}, 201)

    async def _turns(self, request: Request) -> Response:
        session = self._session(request)
        return _record(session, self._gateway.turns(session))

    async def _close(self, request: Request) -> Response:
        session = self._session(request)
        self._reached = {key: reached for key, reached in self._reached.items() if reached != session}
        return _record(session, self._gateway.close(session))

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _metrics(self, request: Request) -> Response:
        self._administrator(request)
        values = {"sessions": len(self._reached) - 1, "calls": self._gateway.running} | dict(self._gauges())
        lines = [f"# TYPE glm5_{name} {'counter' if name.endswith('_total') else 'gauge'}\nglm5_{name} {value}"
                 for name, value in values.items()]
        lines.append("# TYPE glm5_http_responses_total counter")
        lines += [f'glm5_http_responses_total{{status="{status}"}} {count}'
                  for status, count in sorted(self.answered.items())]
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    def _reach(self, request: Request) -> str | None:
        """The session that the request's token opens, None for the administrator's; raises Refused for any other."""
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        for token in (request.headers.get("x-api-key", ""), bearer if scheme.lower() == "bearer" else ""):
            if (key := _digest(token)) in self._reached:
                return self._reached[key]
        raise Refused(401, "token: expected one of this server in `Authorization: Bearer` or `x-api-key`, found none",
                      code="invalid_api_key")

    def _administrator(self, request: Request) -> None:
        if self._reach(request) is not None:
            raise Refused(403, "token: expected the administrator's, found that of a session")

    def _session(self, request: Request) -> str:
        """The session that the path names, for who may reach it."""
        named, reached = request.path_params["id"], self._reach(request)
        if reached not in (None, named):
            raise Refused(404, f"session: expected the one of this token, found {named!r}")
        return named


class _Live(Response):
    """The answer of a call, whole or as a stream. The call ends with it: also when the client goes away."""

    def __init__(self, gateway: Gateway, session: str | None, asked: Asked):
        self._gateway, self._session, self._asked, self._begun = gateway, session, asked, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answering, gone = asyncio.create_task(self._answer(scope, receive, send)), asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait((answering, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            answering.cancel()
            gone.cancel()
            await asyncio.wait((answering, gone))
        if not answering.cancelled():
            answering.result()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """All that the call holds is given back before the end of the answer is sent."""
        try:
            with self._kept() as session:
                async with calls.started(self._gateway, session, self._asked.choices) as parts:
                    if self._asked.stream:
                        await self._stream(parts, send)
                    else:
                        whole = self._asked.whole(await calls.gathered(parts))
        except Exception as error:
            if not self._begun:
                return await refusal(scope["path"], error)(scope, receive, send)
            last = _api(scope["path"]).error_frame(refusals.of(error))
        else:
            if not self._asked.stream:
                return await JSONResponse(whole)(scope, receive, send)
            last = self._asked.last
        await send({"type": "http.response.body", "body": last})

    async def _stream(self, parts: AsyncIterator[calls.Part], send: Send) -> None:
        """Nothing is sent before something has come: until then a failure has a status of its own."""
        async with contextlib.aclosing(self._asked.frames(parts)) as frames:
            async for frame in frames:
                if not self._begun:
                    self._begun = True
                    await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
                await send({"type": "http.response.body", "body": frame, "more_body": True})

    @contextlib.contextmanager
    def _kept(self) -> Iterator[str]:
        """The session of the call, or one for this call alone."""
        session = self._gateway.open() if self._session is None else self._session
        try:
            yield session
        finally:
            if self._session is None:
                self._gateway.close(session)


class _Counted:
    """Counts the answers of an application by their status."""

    def __init__(self, app: ASGIApp, answered: collections.Counter[int]):
        self._app, self._answered = app, answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._answered[message["status"]] += 1
            await send(message)
        await self._app(scope, receive, counted)


def refusal(path: str, error: Exception) -> Response:
    """The answer to a request that failed, in the shape of the API that the path belongs to."""
    refused = refusals.of(error)
    status, body = _api(path).error(refused)
    headers = {} if refused.retry_after is None else {"retry-after": str(refused.retry_after)}
    return JSONResponse(body, status, headers | ({"www-authenticate": "Bearer"} if status == 401 else {}))


def _unrouted(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return refusal(request.url.path, Refused(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))


def _api(path: str) -> Any:
    return anthropic_api if path.startswith("/v1/messages") else openai_api


def _record(session: str, turns: tuple[Turn, ...]) -> Response:
    """The turns of a session, floats as exact as JSON has them."""
    body = json.dumps({"id": session, "object": "session", "turns": turns}, default=vars, allow_nan=False)
    return Response(body, media_type="application/json")


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


async def _body(request: Request) -> bytes:
    """The body; one that is too long is read to its end and let go, for most clients listen only after they have sent.
    """
    held, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= MOST_BYTES:
            held += chunk
    if size > MOST_BYTES:
        raise Refused(413, f"body: expected at most {MOST_BYTES} bytes, found {size}")
    return bytes(held)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
