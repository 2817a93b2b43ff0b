"""The door: tokens and sessions, what is refused in whose words, clients that go away, and the end of the server."""

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest

from glm5_jax.infer.request import RequestTooLong
from glm5_jax.records import from_json, Turn
from glm5_jax.serve import http
from glm5_jax.serve.gateway import Gateway
from glm5_jax.serve.generator import Closed, EngineLost, Overloaded, UnknownSession
from glm5_jax.serve.refusals import Refused
from tests.serve.fakes import ScriptedGenerator
from tests.serve.live import Halting, Live, PATIENCE, serving, spelled, TOKEN, TOKENIZER, Watched

HELLO = "I think.</think>Hello<|user|>"
ASKED: list[Any] = [{"role": "user", "content": "Hi"}]
CHAT = {"model": "glm5", "messages": ASKED, "max_tokens": 100}
PATHS = ["/v1/chat/completions", "/v1/messages"]
FRONTS = pytest.mark.parametrize("path", PATHS)


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    generator = ScriptedGenerator(lambda ids, sampling, session: spelled(HELLO), version=3)
    with serving(Gateway(generator, TOKENIZER), lambda: {"slots": 8, "tokens_total": 40}) as live:
        yield live


@pytest.fixture
def administrator(live: Live) -> Iterator[httpx.Client]:
    with live.plain() as client:
        yield client


@contextlib.contextmanager
def halted(error: Exception | None = None, limit: int = 1024) -> Iterator[tuple[Live, Watched]]:
    """A server whose model says one token and no more."""
    watched = Watched(Halting(error))
    with serving(Gateway(watched, TOKENIZER, limit=limit)) as live:
        yield live, watched


def assert_idle(live: Live, watched: Watched) -> None:
    """Nothing is held any more for any call."""
    assert watched.idle.wait(PATIENCE)
    live.stop()
    assert live.gateway.running == 0
    assert live.left == []


def kind_of(body: dict[str, Any]) -> str:
    """The type of an error, in an answer of either API."""
    assert isinstance(body["error"]["message"], str) and body["error"]["message"]
    return body["error"]["type"]


# Tokens and sessions


@pytest.mark.parametrize("method, path", [
    ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("POST", "/v1/messages"),
    ("POST", "/v1/messages/count_tokens"), ("GET", "/v1/models"), ("GET", "/v1/models/glm5"), ("POST", "/v1/sessions"),
    ("GET", "/v1/sessions/session-0"), ("DELETE", "/v1/sessions/session-0"), ("GET", "/metrics"),
])
def test_nothing_is_told_without_a_token(live, method, path):
    with live.plain(token=None) as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer"}, {"authorization": TOKEN},
                        {"authorization": f"Basic {TOKEN}"}, {"x-api-key": "wrong"}, {"x-api-key": ""},
                        {"x-api-key": "ä".encode()}):
            answer = client.request(method, path, headers=headers, json=CHAT if method == "POST" else None)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert kind_of(answer.json()) == ("authentication_error" if "messages" in path else "invalid_request_error")


def test_the_clients_of_both_apis_know_that_a_token_is_wrong(live):
    with pytest.raises(openai.AuthenticationError):
        live.openai("wrong").models.list()
    with pytest.raises(anthropic.AuthenticationError):
        live.anthropic("wrong").messages.create(**CHAT)


@pytest.mark.parametrize("header", [{"authorization": f"Bearer {TOKEN}"}, {"authorization": f"bearer {TOKEN}"},
                                    {"x-api-key": TOKEN}, {"x-api-key": "wrong", "authorization": f"Bearer {TOKEN}"}])
def test_a_token_serves_in_either_header(live, header):
    with live.plain(token=None) as client:
        assert client.get("/v1/models", headers=header).status_code == 200


def test_a_session_keeps_what_was_sampled_in_it(live, administrator):
    opened = administrator.post("/v1/sessions")
    assert opened.status_code == 201
    session = opened.json()
    live.openai(session["token"]).chat.completions.create(model="glm5", messages=ASKED)
    live.anthropic(session["token"]).messages.create(**CHAT)
    recorded = live.within(live.gateway.turns, session["id"])
    with live.plain(session["token"]) as client:
        turns = client.get(f"/v1/sessions/{session['id']}").json()["turns"]
        assert turns == administrator.get(f"/v1/sessions/{session['id']}").json()["turns"]
        assert client.delete(f"/v1/sessions/{session['id']}").json()["turns"] == turns
        assert client.get(f"/v1/sessions/{session['id']}").status_code == 401  # its token went with it
    assert administrator.get(f"/v1/sessions/{session['id']}").status_code == 404
    assert [from_json(Turn, json.dumps(turn)) for turn in turns] == list(recorded)
    for turn in turns:
        assert turn["completion"]["ids"] == spelled(HELLO)
        assert turn["completion"]["versions"] == [3] * len(spelled(HELLO))
        assert turn["completion"]["stop"] == "stop"


def test_a_session_token_reaches_that_session_alone(live, administrator):
    mine, other = (administrator.post("/v1/sessions").json() for _ in range(2))
    assert mine["id"] != other["id"] and mine["token"] != other["token"]
    with live.plain(mine["token"]) as client:
        assert client.get(f"/v1/sessions/{mine['id']}").status_code == 200
        for name in (other["id"], "session-unknown"):
            assert client.get(f"/v1/sessions/{name}").status_code == 404
            assert client.delete(f"/v1/sessions/{name}").status_code == 404
        for method, path in (("POST", "/v1/sessions"), ("GET", "/metrics")):
            assert client.request(method, path).status_code == 403
    live.openai(mine["token"]).chat.completions.create(model="glm5", messages=ASKED)
    assert len(administrator.get(f"/v1/sessions/{mine['id']}").json()["turns"]) == 1
    assert administrator.get(f"/v1/sessions/{other['id']}").json()["turns"] == []


def test_calls_of_the_administrator_leave_no_session(live, administrator):
    generator = live.gateway.generator
    before = len(generator.asked)
    administrator.post(PATHS[0], json=CHAT)
    administrator.post(PATHS[0], json=CHAT | {"stream": True, "n": 2})
    administrator.post(PATHS[1], json=CHAT)
    used = {session for _, _, session in generator.asked[before:]}
    assert len(used) == 3 and used <= set(generator.released)
    for session in used:
        assert administrator.get(f"/v1/sessions/{session}").status_code == 404


def test_a_server_without_a_token_is_none(live):
    with pytest.raises(ValueError, match="token"):
        http.application(live.gateway, "")


# The two fronts


def test_the_same_messages_are_the_same_tokens_through_both_fronts(live, administrator):
    """A conversation with a thought, calls and their results; the seed is that of the request."""
    schema = {"type": "object", "properties": {"path": {"type": "string"}}}
    sent = []
    for name in ("openai", "anthropic"):
        session = administrator.post("/v1/sessions").json()
        if name == "openai":
            live.openai(session["token"]).chat.completions.create(
                model="glm5", max_tokens=100, seed=7, temperature=0.5,
                tools=[{"type": "function", "function": {"name": "ls", "description": "Lists.", "parameters": schema}}],
                messages=[{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Héllo <|user|>"},
                          {"role": "assistant", "content": "So", "reasoning_content": "Hm", "tool_calls": [
                              {"id": "1", "type": "function",
                               "function": {"name": "ls", "arguments": '{"path":"/"}'}}]},
                          {"role": "tool", "tool_call_id": "1", "content": "a.txt"}])
        else:
            live.anthropic(session["token"]).messages.create(
                model="glm5", max_tokens=100, extra_body={"seed": 7, "temperature": 0.5}, system="Be kind.",
                tools=[{"name": "ls", "description": "Lists.", "input_schema": schema}],
                messages=[{"role": "user", "content": "Héllo <|user|>"},
                          {"role": "assistant", "content": [
                              {"type": "thinking", "thinking": "Hm", "signature": ""}, {"type": "text", "text": "So"},
                              {"type": "tool_use", "id": "1", "name": "ls", "input": {"path": "/"}}]},
                          {"role": "user", "content": [
                              {"type": "tool_result", "tool_use_id": "1", "content": "a.txt"}]}])
        [turn] = administrator.get(f"/v1/sessions/{session['id']}").json()["turns"]
        sent.append((turn["prompt"], turn["completion"], live.gateway.generator.asked[-1][1]))
    assert sent[0] == sent[1]


@pytest.mark.parametrize("error, statuses, kinds", [
    (RequestTooLong("too long"), (400, 400), ("invalid_request_error", "invalid_request_error")),
    (ValueError("no"), (400, 400), ("invalid_request_error", "invalid_request_error")),
    (UnknownSession("gone"), (404, 404), ("invalid_request_error", "not_found_error")),
    (Refused(413, "long"), (413, 413), ("invalid_request_error", "request_too_large")),
    (Overloaded("full"), (429, 529), ("rate_limit_error", "overloaded_error")),
    (Closed("shut"), (503, 503), ("server_error", "api_error")),
    (EngineLost("NaN"), (500, 500), ("server_error", "api_error")),
    (RuntimeError("a mistake of ours"), (500, 500), ("server_error", "api_error")),
])
def test_errors_have_the_status_and_the_shape_of_the_api(error, statuses, kinds):
    for path, status, kind in zip(PATHS, statuses, kinds):
        answer = http.refusal(path, error)
        body = json.loads(answer.body)
        assert (answer.status_code, kind_of(body)) == (status, kind)
        assert ("retry-after" in answer.headers) == (status in (429, 503, 529))


@FRONTS
@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff\xfe", b'{"model": "glm5"}'])
def test_a_bad_body_is_refused_in_the_shape_of_the_api(administrator, path, body):
    answer = administrator.post(path, content=body)
    assert (answer.status_code, kind_of(answer.json())) == (400, "invalid_request_error")


@FRONTS
def test_a_body_that_is_too_long_is_refused(administrator, path, monkeypatch):
    monkeypatch.setattr(http, "MOST_BYTES", 2**20)
    answer = administrator.post(path, content=b" " * (2**20 + 1))
    assert answer.status_code == 413
    kind_of(answer.json())
    assert administrator.post(path, json=CHAT).status_code == 200


@pytest.mark.parametrize("method, path, status", [("GET", "/v1/nothing", 404), ("GET", "/v1/messages/nothing", 404),
                                                  ("GET", "/v1/chat/completions", 405), ("PUT", "/v1/messages", 405)])
def test_other_paths_and_methods_are_refused_in_the_shape_of_the_api(administrator, method, path, status):
    answer = administrator.request(method, path)
    assert answer.status_code == status
    assert (answer.json().get("type") == "error") == ("messages" in path)
    kind_of(answer.json())


def test_nothing_is_said_to_other_origins(administrator):
    answer = administrator.options("/v1/chat/completions", headers={"origin": "https://example.org",
                                                                    "access-control-request-method": "POST"})
    assert answer.status_code == 405
    assert not [name for name in answer.headers if name.startswith("access-control")]


# Health and metrics


def test_health_needs_no_token(live):
    with live.plain(token=None) as client:
        assert client.get("/health").json() == {"status": "ok"}


def test_metrics_are_lines_of_prometheus(live, administrator):
    administrator.get("/v1/nothing")
    administrator.post("/v1/chat/completions", json=CHAT | {"stream": True})
    lines = administrator.get("/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert (values["glm5_slots"], values["glm5_tokens_total"], values["glm5_calls"]) == ("8", "40", "0")
    assert int(values['glm5_http_responses_total{status="200"}']) >= 1
    assert int(values['glm5_http_responses_total{status="404"}']) >= 1
    typed = {line.split()[2]: line.split()[3] for line in lines if line.startswith("# TYPE")}
    assert typed.keys() == {name.partition("{")[0] for name in values}
    assert (typed["glm5_slots"], typed["glm5_tokens_total"]) == ("gauge", "counter")


# Clients that go away, engines that fail, servers that stop


@FRONTS
def test_a_client_that_goes_away_frees_its_slot(path):
    with halted() as (live, watched):
        with live.plain() as client, client.stream("POST", path, json=CHAT | {"stream": True}) as answer:
            pieces = answer.iter_bytes()
            next(pieces)
            assert watched.running == 1
        assert watched.idle.wait(PATIENCE)
        assert_idle(live, watched)


@FRONTS
def test_a_client_that_goes_away_before_its_answer_frees_its_slot(path):
    with halted() as (live, watched):
        body = json.dumps(CHAT).encode()
        host, port = live.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"POST {path} HTTP/1.1\r\nhost: {host}\r\nx-api-key: {TOKEN}\r\n"
                               f"content-length: {len(body)}\r\n\r\n".encode() + body)
            assert watched.busy.wait(PATIENCE)
        assert_idle(live, watched)


def test_what_a_session_drew_for_a_client_that_went_away_is_on_record():
    with halted() as (live, watched), live.plain() as administrator:
        session = administrator.post("/v1/sessions").json()
        with live.plain(session["token"]) as client:
            with client.stream("POST", PATHS[0], json=CHAT | {"stream": True}) as answer:
                pieces, said = answer.iter_text(), ""
                while "Hm" not in said:
                    said += next(pieces)
        assert watched.idle.wait(PATIENCE)
        [turn] = live.within(live.gateway.turns, session["id"])
        assert (turn.completion.ids, turn.completion.stop.value) == (tuple(spelled("Hm")), "abort")


def test_several_answers_of_a_client_that_goes_away_are_all_called_back():
    with halted() as (live, watched):
        with live.plain() as client:
            with client.stream("POST", PATHS[0], json=CHAT | {"stream": True, "n": 5}) as answer:
                chunks = answer.iter_bytes()
                while watched.running < 5:
                    next(chunks)
        assert_idle(live, watched)


@FRONTS
def test_overload_is_told_with_a_time_to_come_again(path):
    with halted(limit=1) as (live, watched), live.plain() as client:
        with client.stream("POST", path, json=CHAT | {"stream": True}) as first:
            pieces = first.iter_bytes()
            next(pieces)
            for stream in (False, True):
                answer = client.post(path, json=CHAT | {"stream": stream})
                assert answer.status_code == (429 if "chat" in path else 529)
                assert int(answer.headers["retry-after"]) >= 1
            raises = (pytest.raises(openai.RateLimitError) if "chat" in path else
                      pytest.raises(anthropic.InternalServerError))
            with raises:
                ask(live, path)
        assert_idle(live, watched)


@FRONTS
def test_an_engine_that_fails_is_a_fault_of_the_server(path):
    with halted(EngineLost("a step of the engine failed: NaN")) as (live, watched), live.plain() as client:
        answer = client.post(path, json=CHAT)
        assert answer.status_code == 500
        assert "NaN" in answer.json()["error"]["message"]
        client_of = openai if "chat" in path else anthropic
        with pytest.raises(client_of.InternalServerError):
            ask(live, path)
        with pytest.raises(client_of.APIError, match="NaN"):  # the stream had begun
            ask(live, path, stream=True)
        assert_idle(live, watched)


@FRONTS
def test_a_server_that_stops_ends_its_streams_in_the_words_of_the_api(path):
    with halted() as (live, watched), live.plain() as client:
        with client.stream("POST", path, json=CHAT | {"stream": True}) as answer:
            pieces = answer.iter_text()
            said = next(pieces)
            live.server.should_exit = True
            said += "".join(pieces)
        last = json.loads(said.strip().splitlines()[-1].removeprefix("data: "))
        assert "called back" in last["error"]["message"]
        assert said.count("Hm") == 1
        assert_idle(live, watched)


@FRONTS
def test_the_clients_raise_where_the_server_stops(path):
    with halted() as (live, watched):
        raised = list[BaseException]()

        def asking() -> None:
            try:
                ask(live, path, stream=True, begun=begun.set)
            except BaseException as error:
                raised.append(error)

        begun = threading.Event()
        thread = threading.Thread(target=asking)
        thread.start()
        assert begun.wait(PATIENCE)
        live.stop()
        thread.join(PATIENCE)
        assert isinstance(raised[0], openai.APIError if "chat" in path else anthropic.APIError)
        assert_idle(live, watched)


def test_what_is_whole_answered_with_503_where_the_server_stops():
    with halted() as (live, watched), live.plain() as client:
        answers = list[httpx.Response]()
        thread = threading.Thread(target=lambda: answers.append(client.post(PATHS[0], json=CHAT)))
        thread.start()
        assert watched.busy.wait(PATIENCE)
        live.stop()
        thread.join(PATIENCE)
        assert answers[0].status_code == 503
        assert_idle(live, watched)


def test_a_session_that_is_closed_ends_its_streams():
    with halted() as (live, watched), live.plain() as administrator:
        session = administrator.post("/v1/sessions").json()
        with live.plain(session["token"]) as client:
            with client.stream("POST", PATHS[0], json=CHAT | {"stream": True}) as answer:
                pieces = answer.iter_text()
                said = next(pieces)
                assert administrator.delete(f"/v1/sessions/{session['id']}").status_code == 200
                said += "".join(pieces)
        assert "called back" in said
        assert_idle(live, watched)


def ask(live: Live, path: str, stream: bool = False, begun: Callable[[], None] = lambda: None) -> None:
    """One call by the client of the API that the path belongs to, read to its end."""
    create = live.openai().chat.completions.create if "chat" in path else live.anthropic().messages.create
    answer = create(**CHAT, stream=stream)
    for _ in answer if stream else ():
        begun()
