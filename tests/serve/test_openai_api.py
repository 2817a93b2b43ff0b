"""OpenAI's API: what its own client is told, whole and streamed, and what it is refused."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from glm5_jax.serve import openai_api
from glm5_jax.serve.calls import Chat
from glm5_jax.serve.gateway import Options
from glm5_jax.serve.refusals import Refused
from tests.serve.live import Live, SAID, saying, SEEDS, spelled, TOKENIZER

ASKED: list[Any] = [{"role": "user", "content": "What is in /tmp?"}]
LS = {"type": "function", "function": {"name": "ls", "description": "Lists files.", "parameters": {
    "type": "object", "properties": {"path": {"type": "string"}, "depth": {"type": "string"}}}}}


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with saying() as live:
        yield live


@pytest.fixture(scope="module")
def client(live: Live) -> openai.OpenAI:
    return live.openai()


def chat(**changes: Any) -> openai_api.Asked:
    body = {"model": "glm5", "messages": ASKED} | changes
    return openai_api.chat(json.dumps(body).encode(), "glm5", TOKENIZER)


def text(**changes: Any) -> openai_api.Asked:
    body = {"model": "glm5", "prompt": "Once"} | changes
    return openai_api.text(json.dumps(body).encode(), "glm5", TOKENIZER)


def whole(client: openai.OpenAI, **options: Any) -> list[dict[str, Any]]:
    """What each choice of an answer says."""
    answer = client.chat.completions.create(model="glm5", messages=ASKED, logprobs=True, **options)
    assert answer.usage is not None
    drawn = [choice.logprobs.content for choice in answer.choices if choice.logprobs]
    assert answer.usage.completion_tokens == sum(len(tokens or ()) for tokens in drawn)
    return [{"reasoning": getattr(choice.message, "reasoning_content", None) or "",
             "content": choice.message.content or "",
             "calls": [(call.function.name, json.loads(call.function.arguments))
                       for call in choice.message.tool_calls or ()],
             "end": choice.finish_reason, "tokens": tokens} for choice, tokens in zip(answer.choices, drawn)]


def streamed(client: openai.OpenAI, n: int = 1, **options: Any) -> list[dict[str, Any]]:
    """The same from a stream."""
    said: list[dict[str, Any]] = [{"reasoning": "", "content": "", "calls": [], "end": None, "tokens": []}
                                  for _ in range(n)]
    usage = None
    for chunk in client.chat.completions.create(model="glm5", messages=ASKED, logprobs=True, stream=True, n=n,
                                                stream_options={"include_usage": True}, **options):
        assert usage is None  # nothing comes behind it
        usage = chunk.usage
        for choice in chunk.choices:
            one = said[choice.index]
            assert one["end"] is None
            one["reasoning"] += getattr(choice.delta, "reasoning_content", None) or ""
            one["content"] += choice.delta.content or ""
            for call in choice.delta.tool_calls or ():
                assert call.index == len(one["calls"])
                one["calls"].append((call.function.name, json.loads(call.function.arguments)))
            one["tokens"] += choice.logprobs.content if choice.logprobs else []
            one["end"] = choice.finish_reason
    assert usage.completion_tokens == sum(len(one["tokens"]) for one in said)
    return said


@pytest.mark.parametrize("seed", SEEDS)
def test_a_stream_says_what_the_whole_answer_says(client, seed):
    assert streamed(client, seed=seed, tools=[LS]) == whole(client, seed=seed, tools=[LS])


def test_an_answer_is_what_the_model_said(client):
    [said] = whole(client, seed=0)
    assert (said["reasoning"], said["content"], said["end"]) == ("I think.", "Hello, wörld! 🦆", "stop")
    [said] = whole(client, seed=1, tools=[LS])
    assert said["calls"] == [("ls", {"path": "/tmp", "depth": "1"})] * 2  # a string, as the tool has it
    assert (said["content"], said["end"]) == ("Let me see.", "tool_calls")
    [said] = whole(client, seed=1)
    assert said["calls"] == [("ls", {"path": "/tmp", "depth": 1})] * 2
    [said] = whole(client, seed=3)
    assert (said["reasoning"], said["content"], said["end"]) == ("A thought without an end", "", "length")
    [said] = whole(client, seed=4)
    assert (said["content"], len(said["calls"])) == (" and more", 1)


def test_log_probs_are_those_of_all_sampled_tokens(client):
    [said] = whole(client, seed=0)
    ids = spelled(SAID[0])
    assert b"".join(bytes(token.bytes) for token in said["tokens"]).decode() == SAID[0]
    assert [token.logprob for token in said["tokens"]] == [-(n + 1) / 1024 for n in range(len(ids))]
    answer = client.chat.completions.create(model="glm5", messages=ASKED)
    assert answer.choices[0].logprobs is None


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_an_answer_ends_at_the_limit(client, limit):
    [said] = whole(client, seed=0, **{limit: 4})
    assert (len(said["tokens"]), said["end"]) == (4, "length")
    assert streamed(client, seed=0, **{limit: 4}) == [said]


@pytest.mark.parametrize("stop", ["wör", ["xyz", "wör"]])
def test_an_answer_ends_before_a_stop_string(client, stop):
    [said] = whole(client, seed=0, stop=stop)
    assert (said["content"], said["end"]) == ("Hello, ", "stop")
    assert streamed(client, seed=0, stop=stop) == [said]


def test_several_answers_are_those_of_the_seeds_that_follow(client):
    assert whole(client, seed=3, n=4) == [whole(client, seed=seed)[0] for seed in (3, 4, 5, 6)]
    assert streamed(client, seed=3, n=4) == whole(client, seed=3, n=4)


def test_several_answers_are_forks_of_one_session(live):
    with live.plain() as administrator:
        session = administrator.post("/v1/sessions").json()
        answer = live.openai(session["token"]).chat.completions.create(model="glm5", messages=ASKED, n=3)
        turns = administrator.get(f"/v1/sessions/{session['id']}").json()["turns"]
    assert answer.usage.prompt_tokens == len(turns[0]["prompt"])  # one prompt, sent once
    assert [turn["extends"] for turn in turns] == [None] * 3
    assert {turn["reply"]["content"] for turn in turns} == {choice.message.content or "" for choice in answer.choices}


def test_a_conversation_goes_on_with_the_tokens_that_were_sampled(live):
    """As a client of the API plays it: the message it got, then what the tools said."""
    with live.plain() as administrator:
        session = administrator.post("/v1/sessions").json()
        client = live.openai(session["token"])
        messages = list(ASKED)
        for seed in (1, 0):
            message = client.chat.completions.create(model="glm5", messages=messages, tools=[LS],
                                                     seed=seed).choices[0].message
            messages.append(message.model_dump())
            messages += [{"role": "tool", "tool_call_id": call.id, "content": "a.txt"}
                         for call in message.tool_calls or ()]
        messages.append({"role": "user", "content": "Thanks."})
        for clear in (False, True):
            client.chat.completions.create(model="glm5", messages=messages, tools=[LS], seed=2, extra_body={
                "thinking": {"type": "enabled", "clear_thinking": clear}})
        turns = administrator.get(f"/v1/sessions/{session['id']}").json()["turns"]
    assert [turn["extends"] for turn in turns] == [None, 0, 1, None]  # the last leaves the thoughts out
    assert [turn["completion"]["ids"] for turn in turns] == [spelled(SAID[seed]) for seed in (1, 0, 2, 2)]
    assert [message["role"] for message in turns[1]["messages"]] == ["tool", "tool"]


def test_completions_take_text_and_ids(client):
    ends = {"max_tokens": 8, "temperature": 0.5, "logprobs": 0}
    one = client.completions.create(model="glm5", prompt="Once", seed=0, **ends).choices[0]
    ids = spelled(SAID[0])[:8]
    assert one.text == TOKENIZER.decode(ids)
    assert one.finish_reason == "length"
    assert one.logprobs.token_logprobs == [-(n + 1) / 1024 for n in range(8)]
    assert "".join(one.logprobs.tokens) == one.text
    same = client.completions.create(model="glm5", prompt=TOKENIZER.encode("Once"), seed=0, **ends).choices[0]
    assert same == one
    chunks = list(client.completions.create(model="glm5", prompt="Once", seed=0, stream=True, **ends))
    assert "".join(chunk.choices[0].text for chunk in chunks) == one.text
    assert chunks[-1].choices[0].finish_reason == "length"
    assert sum((chunk.choices[0].logprobs.tokens for chunk in chunks if chunk.choices[0].logprobs), []) \
        == one.logprobs.tokens


def test_completions_to_several_prompts_come_in_their_order(client):
    answer = client.completions.create(model="glm5", prompt=["One", "Two"], n=2, seed=2, max_tokens=3)
    single = [client.completions.create(model="glm5", prompt=prompt, seed=seed, max_tokens=3).choices[0].text
              for prompt in ("One", "Two") for seed in (2, 3)]
    assert [choice.text for choice in answer.choices] == single
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == len(TOKENIZER.encode("One")) + len(TOKENIZER.encode("Two"))
    assert len(text().choices) == 1 and text().choices[0].options.max_new_tokens == 16


def test_models(client):
    assert [model.id for model in client.models.list()] == ["glm5"]
    assert client.models.retrieve("glm5").id == "glm5"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")


@pytest.mark.parametrize("changes, error, field, code", [
    ({"model": "gpt"}, openai.NotFoundError, "model", "model_not_found"),
    ({"temperature": "hot"}, openai.BadRequestError, "temperature", None),
    ({"messages": [{"role": "user", "content": 7}]}, openai.BadRequestError, "messages[0].content", None),
    ({"max_tokens": 10**6}, openai.BadRequestError, None, "context_length_exceeded"),
    ({"messages": [{"role": "user", "content": "long " * 5000}]}, openai.BadRequestError, None,
     "context_length_exceeded"),
])
def test_the_client_raises_its_own_errors(client, changes, error, field, code):
    for stream in (False, True):
        with pytest.raises(error) as raised:
            client.chat.completions.create(**{"model": "glm5", "messages": ASKED, "stream": stream} | changes)
        assert (raised.value.param, raised.value.code) == (field, code)
        assert raised.value.type == "invalid_request_error"


CALL = {"id": "call_1", "type": "function", "function": {"name": "ls", "arguments": "{"}}


@pytest.mark.parametrize("changes, field", [
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [{"content": "hello"}]}, "messages[0].role"),
    ({"messages": [{"role": "robot", "content": ""}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
     "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]},
     "messages[0].tool_calls[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "ls", "parameters": 1}}]}, "tools[0].function.parameters"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "ls"}}}, "tool_choice"),
    ({"parallel_tool_calls": False}, "parallel_tool_calls"),
    ({"response_format": {"type": "json_object"}}, "response_format.type"),
    ({"top_logprobs": 3, "logprobs": True}, "top_logprobs"),
    ({"logprobs": 1}, "logprobs"),
    ({"n": 0}, "n"),
    ({"n": 1000}, "n"),
    ({"n": True}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
    ({"temperature": 3}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"seed": -1}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", 1]}, "stop[1]"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"frequency_penalty": 0.5}, "frequency_penalty"),
    ({"logit_bias": {"7": 1}}, "logit_bias"),
    ({"thinking": {"type": "sometimes"}}, "thinking.type"),
    ({"tool_chioce": "auto"}, "tool_chioce"),
])
def test_what_is_wrong_or_cannot_be_had_is_refused_by_name(changes, field):
    with pytest.raises(Refused) as refused:
        chat(**changes)
    assert (refused.value.status, refused.value.field) == (400, field)
    assert refused.value.message.startswith(f"{field}: expected ")


@pytest.mark.parametrize("changes, field", [
    ({"prompt": []}, "prompt"),
    ({"prompt": 7}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": ["a", 1.5]}, "prompt[1]"),
    ({"prompt": ["a"] * 65, "n": 2}, "n"),
    ({"echo": True}, "echo"),
    ({"logprobs": 2}, "logprobs"),
    ({"best_of": 2}, "best_of"),
    ({"suffix": "."}, "suffix"),
    ({"messages": ASKED}, "messages"),
])
def test_what_completions_cannot_have_is_refused_by_name(changes, field):
    with pytest.raises(Refused) as refused:
        text(**changes)
    assert (refused.value.status, refused.value.field) == (400, field)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"\xff", b'{"model": "\\ud800"}', b"[" * 10**5,
                                  b'{"temperature": NaN}'])
def test_a_body_that_is_no_request_is_refused(body):
    with pytest.raises(Refused) as refused:
        openai_api.chat(body, "glm5", TOKENIZER)
    assert refused.value.status == 400
    assert len(refused.value.message) < 1100


def test_arguments_that_are_no_json_are_refused(client):
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model="glm5", messages=[*ASKED, {"role": "assistant", "tool_calls": [CALL]}])
    assert raised.value.param == "messages[1].tool_calls[0].arguments"


def test_messages_are_those_of_the_template():
    sent = [{"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]},
            {"role": "user", "content": "Hi", "name": "Ada"},
            {"role": "assistant", "content": None, "refusal": None, "reasoning_content": "Hm", "tool_calls": [CALL]},
            {"role": "tool", "content": "a.txt", "tool_call_id": "call_1"},
            {"role": "assistant", "content": "Done", "reasoning_content": None, "tool_calls": None}]
    [choice] = chat(messages=sent).choices
    assert choice.prompt == Chat((
        {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "reasoning_content": "Hm", "tool_calls": [CALL]},
        {"role": "tool", "content": "a.txt", "tool_call_id": "call_1"}, {"role": "assistant", "content": "Done"}))


def test_tools_are_printed_in_one_order_of_their_fields():
    turned = {"function": dict(reversed(LS["function"].items())) | {"strict": True}, "type": "function"}
    [choice] = chat(tools=[turned]).choices
    assert json.dumps(choice.prompt.tools) == json.dumps([LS])
    assert chat(tools=[LS], tool_choice="none").choices[0].prompt.tools == ()


def test_options():
    assert [choice.options for choice in chat().choices] == [Options()]
    options = {"temperature": 0, "top_p": 0.5, "top_k": 3, "seed": 2**32 - 1, "stop": "x", "max_tokens": 9, "n": 2}
    thinking = {"type": "disabled", "clear_thinking": False}
    one, two = chat(**options, thinking=thinking, presence_penalty=0.0, user="Ada", metadata=None).choices
    assert one.options == Options(9, 0.0, 0.5, 3, 2**32 - 1, ("x",), False, False)
    assert two.options.seed == 0
