"""Anthropic's API: what its own client is told, whole and streamed, and what it is refused."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from glm5_jax.serve import anthropic_api
from glm5_jax.serve.calls import Chat
from glm5_jax.serve.gateway import Options
from glm5_jax.serve.refusals import Refused
from tests.serve.live import Live, SAID, saying, SEEDS, spelled

ASKED: list[Any] = [{"role": "user", "content": "What is in /tmp?"}]
LS = {"name": "ls", "description": "Lists files.", "input_schema": {
    "type": "object", "properties": {"path": {"type": "string"}, "depth": {"type": "string"}}}}


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with saying() as live:
        yield live


@pytest.fixture(scope="module")
def client(live: Live) -> anthropic.Anthropic:
    return live.anthropic()


def messages(**changes: Any) -> anthropic_api.Asked:
    body = {"model": "glm5", "messages": ASKED, "max_tokens": 9} | changes
    return anthropic_api.messages(json.dumps(body).encode(), "glm5")


def said(message: anthropic.types.Message) -> dict[str, Any]:
    """What a message says, without the names that differ from one to the next."""
    blocks = [block.model_dump() | {"id": None} for block in message.content]
    kept = ("type", "thinking", "text", "name", "input", "signature")
    return {"blocks": [{name: block[name] for name in kept if name in block} for block in blocks],
            "end": message.stop_reason, "stop_sequence": message.stop_sequence,
            "usage": (message.usage.input_tokens, message.usage.output_tokens), "model": message.model}


def whole(client: anthropic.Anthropic, seed: int, **options: Any) -> dict[str, Any]:
    return said(client.messages.create(**{"model": "glm5", "messages": ASKED, "max_tokens": 100} | options,
                                       extra_body={"seed": seed}))


def streamed(client: anthropic.Anthropic, seed: int, **options: Any) -> dict[str, Any]:
    with client.messages.stream(**{"model": "glm5", "messages": ASKED, "max_tokens": 100} | options,
                                extra_body={"seed": seed}) as stream:
        return said(stream.get_final_message())


@pytest.mark.parametrize("seed", SEEDS)
def test_a_stream_says_what_the_whole_answer_says(client, seed):
    assert streamed(client, seed, tools=[LS]) == whole(client, seed, tools=[LS])


def test_an_answer_is_what_the_model_said(client):
    answer = whole(client, 0)
    assert answer["blocks"] == [{"type": "thinking", "thinking": "I think.", "signature": ""},
                                {"type": "text", "text": "Hello, wörld! 🦆"}]
    assert (answer["end"], answer["stop_sequence"]) == ("end_turn", None)
    assert answer["usage"][1] == len(spelled(SAID[0]))
    answer = whole(client, 1, tools=[LS])
    called = {"type": "tool_use", "name": "ls", "input": {"path": "/tmp", "depth": "1"}}
    assert answer["blocks"][1:] == [{"type": "text", "text": "Let me see."}, called, called]
    assert answer["end"] == "tool_use"
    assert whole(client, 3)["end"] == "max_tokens"
    assert [block["type"] for block in whole(client, 4)["blocks"]] == ["thinking", "tool_use", "text"]


def test_the_events_of_a_stream_are_in_the_order_of_the_api(client):
    stream = client.messages.create(model="glm5", messages=ASKED, max_tokens=100, tools=[LS], stream=True,
                                    extra_body={"seed": 1})
    events = list(stream)
    first, *blocks, delta, last = events
    assert (first.type, delta.type, last.type) == ("message_start", "message_delta", "message_stop")
    assert first.message.usage.input_tokens > 0 and not first.message.content
    inside = None
    for event in blocks:
        if event.type == "content_block_start":
            inside = event.index if inside is None else pytest.fail("a block inside another")
        assert event.index == inside
        inside = None if event.type == "content_block_stop" else inside
    assert inside is None
    assert [event.index for event in blocks if event.type == "content_block_start"] == [0, 1, 2, 3]


def test_an_answer_ends_at_the_limit(client):
    answer = whole(client, 0, max_tokens=4)
    assert (answer["end"], answer["usage"][1]) == ("max_tokens", 4)
    assert streamed(client, 0, max_tokens=4) == answer


def test_an_answer_ends_before_a_stop_sequence(client):
    answer = whole(client, 0, stop_sequences=["xyz", "wör"])
    assert answer["blocks"][1] == {"type": "text", "text": "Hello, "}
    assert (answer["end"], answer["stop_sequence"]) == ("stop_sequence", "wör")
    assert streamed(client, 0, stop_sequences=["xyz", "wör"]) == answer


def test_a_conversation_goes_on_with_the_tokens_that_were_sampled(live):
    """As a client of the API plays it: the blocks it got, then what the tools said."""
    with live.plain() as administrator:
        session = administrator.post("/v1/sessions").json()
        client = live.anthropic(session["token"])
        history = list(ASKED)
        for seed in (1, 0):
            answer = client.messages.create(model="glm5", messages=history, max_tokens=100, tools=[LS],
                                            extra_body={"seed": seed})
            history.append({"role": "assistant", "content": answer.content})
            history.append({"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "a.txt"}]}
                for block in answer.content if block.type == "tool_use"] or "Thanks."})
        client.messages.create(model="glm5", messages=history, max_tokens=100, tools=[LS],
                               extra_body={"seed": 2, "thinking": {"type": "enabled", "clear_thinking": False}})
        turns = administrator.get(f"/v1/sessions/{session['id']}").json()["turns"]
    assert [turn["extends"] for turn in turns] == [None, 0, 1]
    assert [turn["completion"]["ids"] for turn in turns] == [spelled(SAID[seed]) for seed in (1, 0, 2)]
    assert [message["role"] for message in turns[1]["messages"]] == ["tool", "tool"]


def test_tokens_are_counted_as_they_are_sent(client):
    for options in ({}, {"system": "Be kind.", "tools": [LS]}, {"thinking": {"type": "disabled"}}):
        counted = client.messages.count_tokens(model="glm5", messages=ASKED, **options).input_tokens
        assert counted == whole(client, 0, **options)["usage"][0]


@pytest.mark.parametrize("changes, error, kind, told", [
    ({"model": "claude"}, anthropic.NotFoundError, "not_found_error", "model: "),
    ({"extra_body": {"temperature": "hot"}}, anthropic.BadRequestError, "invalid_request_error", "temperature: "),
    ({"max_tokens": 5000}, anthropic.BadRequestError, "invalid_request_error", "at most 4096 tokens"),
    ({"messages": [{"role": "user", "content": "long " * 5000}]}, anthropic.BadRequestError, "invalid_request_error",
     "at most 4096 tokens"),
])
def test_the_client_raises_its_own_errors(client, changes, error, kind, told):
    for stream in (False, True):
        with pytest.raises(error) as raised:
            client.messages.create(**{"model": "glm5", "messages": ASKED, "max_tokens": 9, "stream": stream} | changes)
        assert raised.value.body["error"]["type"] == kind
        assert told in raised.value.body["error"]["message"]


@pytest.mark.parametrize("changes, field", [
    ({"max_tokens": None}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "tool", "content": "a.txt"}]}, "messages[0].role"),
    ({"messages": [{"role": "system", "content": [{"type": "thinking", "thinking": ""}]}]},
     "messages[0].content[0].type"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "messages[0].content[0].tool_use_id"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": [
        {"type": "image"}]}]}]}, "messages[0].content[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": {}}]}]},
     "messages[0].content[0].type"),
    ({"messages": [*ASKED, {"role": "assistant", "content": "It is"}]}, "messages"),
    ({"system": 7}, "system"),
    ({"tools": [{"name": "ls"}]}, "tools[0].input_schema"),
    ({"tools": [{"type": "bash_20250124", "name": "bash", "input_schema": {}}]}, "tools[0].type"),
    ({"tool_choice": {"type": "any"}}, "tool_choice.type"),
    ({"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}, "tool_choice.disable_parallel_tool_use"),
    ({"temperature": 1.5}, "temperature"),
    ({"top_k": -1}, "top_k"),
    ({"stop_sequences": "x"}, "stop_sequences"),
    ({"stop_sequences": [""]}, "stop_sequences[0]"),
    ({"thinking": {"type": "sometimes"}}, "thinking.type"),
    ({"n": 2}, "n"),
])
def test_what_is_wrong_or_cannot_be_had_is_refused_by_name(changes, field):
    with pytest.raises(Refused) as refused:
        messages(**changes)
    assert (refused.value.status, refused.value.field) == (400, field)
    assert refused.value.message.startswith(f"{field}: expected ")


def test_messages_are_those_of_the_template():
    sent = [{"role": "user", "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "Hm", "signature": "x"}, {"type": "text", "text": "So"},
                {"type": "tool_use", "id": "toolu_1", "name": "ls", "input": {"path": "/tmp"}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "a.txt"}]},
                {"type": "tool_result", "tool_use_id": "toolu_2", "content": "none", "is_error": True},
                {"type": "tool_result", "tool_use_id": "toolu_3"},
                {"type": "text", "text": "Well?", "cache_control": {"type": "ephemeral"}}]},
            {"role": "assistant", "content": "Done"}, {"role": "system", "content": "Be brief."},
            {"role": "user", "content": []}]
    [choice] = messages(messages=sent, system=[{"type": "text", "text": "Be kind."}], tools=[LS]).choices
    assert choice.prompt == Chat((
        {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi there"},
        {"role": "assistant", "content": "So", "reasoning_content": "Hm", "tool_calls": [
            {"id": "toolu_1", "type": "function", "function": {"name": "ls", "arguments": {"path": "/tmp"}}}]},
        {"role": "tool", "content": "a.txt", "tool_call_id": "toolu_1"},
        {"role": "tool", "content": "none", "tool_call_id": "toolu_2"},
        {"role": "tool", "content": "", "tool_call_id": "toolu_3"},
        {"role": "user", "content": "Well?"},
        {"role": "assistant", "content": "Done"}, {"role": "system", "content": "Be brief."},
        {"role": "user", "content": ""}), ({"type": "function", "function": {
            "name": "ls", "description": "Lists files.", "parameters": LS["input_schema"]}},))


def test_options():
    [choice] = messages().choices
    assert choice.options == Options(9)
    [choice] = messages(temperature=0, top_p=0.5, top_k=3, seed=7, stop_sequences=["x"], tools=[LS],
                        tool_choice={"type": "none"}, thinking={"type": "disabled", "clear_thinking": False}).choices
    assert choice.options == Options(9, 0.0, 0.5, 3, 7, ("x",), False, False)
    assert choice.prompt.tools == ()
    assert messages(thinking={"type": "enabled", "budget_tokens": 2048}).choices[0].options.thinking
