"""OpenAI's chat completions, completions and models: requests as calls, answers as its objects and chunks.

Reasoning is `reasoning_content`, in what is sent and in what is received, and `thinking` and `top_k` may be asked for,
as with other servers of open models. What cannot be had is refused, naming the field.
"""

import dataclasses
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Any, ClassVar

from glm5_jax.records import Completion, Message
from glm5_jax.serve import refusals
from glm5_jax.serve.calls import Chat, Choice, Delta, Part, Said
from glm5_jax.serve.gateway import Options
from glm5_jax.serve.refusals import Refused
from glm5_jax.text.tokenizer import Tokenizer

Object = dict[str, Any]

MOST_CHOICES = 128
TEXT_TOKENS = 16  # of /v1/completions where it is not told: the API's own default
FINISH = {"length": "length", "stop_string": "stop", "calls": "tool_calls", "stop": "stop"}

STRING: Object = {"type": "string"}
FLAG: Object = {"type": "boolean"}
COUNT: Object = {"type": "integer", "minimum": 1}
STOP: Object = {"type": ["string", "array"], "minLength": 1, "items": {"type": "string", "minLength": 1}}
PART: Object = {"type": "object", "properties": {"type": {"const": "text"}, "text": STRING},
                "required": ["type", "text"]}
CALL: Object = {"type": "object", "required": ["function"], "properties": {
    "id": STRING, "type": {"const": "function"},
    "function": {"type": "object", "required": ["name"], "properties": {"name": STRING, "arguments": STRING}}}}
MESSAGE: Object = {"type": "object", "required": ["role"], "properties": {
    "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
    "content": {"type": ["string", "array", "null"], "items": PART},
    "reasoning_content": {"type": ["string", "null"]}, "tool_call_id": {"type": ["string", "null"]},
    "tool_calls": {"type": ["array", "null"], "items": CALL}}}
TOOL: Object = {"type": "object", "required": ["type", "function"], "properties": {
    "type": {"const": "function"}, "function": {"type": "object", "required": ["name"], "properties": {
        "name": STRING, "description": STRING, "parameters": {"type": "object"}}}}}
THINKING: Object = {"type": "object", "required": ["type"], "additionalProperties": False, "properties": {
    "type": {"enum": ["enabled", "disabled"]}, "clear_thinking": FLAG}}
SAMPLED: Object = {
    "model": STRING, "stream": FLAG, "stream_options": {"type": "object", "properties": {"include_usage": FLAG}},
    "n": COUNT | {"maximum": MOST_CHOICES}, "max_tokens": COUNT, "stop": STOP,
    "temperature": {"type": "number", "minimum": 0, "maximum": 2}, "top_k": {"type": "integer", "minimum": 0},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "seed": {"type": "integer", "minimum": 0, "maximum": 2**32 - 1},
    "presence_penalty": {"const": 0}, "frequency_penalty": {"const": 0},
    # Of no effect on an answer, here as there.
    "user": {}, "metadata": {}, "store": {}, "service_tier": {}, "safety_identifier": {}, "prompt_cache_key": {}}
CHAT: Object = {"type": "object", "required": ["model", "messages"], "additionalProperties": False,
                "properties": SAMPLED | {
                    "messages": {"type": "array", "minItems": 1, "items": MESSAGE}, "max_completion_tokens": COUNT,
                    "logprobs": FLAG, "top_logprobs": {"const": 0},  # of tokens not sampled nothing is known
                    "tools": {"type": "array", "items": TOOL}, "tool_choice": {"enum": ["auto", "none"]},
                    "parallel_tool_calls": {"const": True}, "thinking": THINKING,
                    "response_format": {"type": "object", "properties": {"type": {"const": "text"}}}}}
TEXT: Object = {"type": "object", "required": ["model", "prompt"], "additionalProperties": False,
                "properties": SAMPLED | {
                    "prompt": {"type": ["string", "array"], "minItems": 1}, "logprobs": {"const": 0},
                    "echo": {"const": False}, "best_of": {"const": 1}}}


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request that can be run, and the shape of its answer: `whole`, or `frames` and then `last`."""

    name: ClassVar[str]
    streamed_name: ClassVar[str]
    prefix: ClassVar[str]  # of its id
    opening: ClassVar[Object | None] = None
    last: ClassVar[bytes] = b"data: [DONE]\n\n"

    choices: tuple[Choice, ...]
    tokenizer: Tokenizer
    model: str
    n: int  # choices of one prompt
    stream: bool
    include_usage: bool
    logprobs: bool
    id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def whole(self, answers: Sequence[Said]) -> Object:
        choices = [self._choice(index, self.answered(said), self._logprobs(said.completion), FINISH[said.end])
                   for index, said in enumerate(answers)]
        return self._object(self.name, choices) | {"usage": self._usage(answers)}

    async def frames(self, parts: AsyncIterator[Part]) -> AsyncGenerator[bytes, None]:
        answers: dict[int, Said] = {}
        calls: dict[int, int] = {}  # so far, of each choice that has begun
        async for part in parts:
            pieces = [] if part.choice in calls or self.opening is None else [self.opening]
            calls.setdefault(part.choice, 0)
            for delta in part.deltas:
                pieces.append(self.more(delta, calls[part.choice]))
                calls[part.choice] += delta.kind == "call"
            logprobs = self._logprobs(part.completion)
            if logprobs is not None and not pieces:
                pieces = [self.more(Delta("text", ""), 0)]
            for place, piece in enumerate(pieces, start=1):
                yield self._frame([self._choice(part.choice, piece, logprobs if place == len(pieces) else None, None)])
            if part.said is not None:
                answers[part.choice] = part.said
                yield self._frame([self._choice(part.choice, self.more(None, 0), None, FINISH[part.said.end])])
        if self.include_usage:
            yield self._frame([], self._usage([answers[index] for index in sorted(answers)]))

    def answered(self, said: Said) -> Object:
        """The fields of a whole choice."""
        raise NotImplementedError

    def more(self, delta: Delta | None, call: int) -> Object:
        """The fields of a chunk's choice; `call` is the number of a call, None says that nothing more comes."""
        raise NotImplementedError

    def tokens(self, completion: Completion) -> Object:
        """The log-probs of sampled tokens."""
        raise NotImplementedError

    def letters(self, id: int) -> bytes:
        """What a token spells; nothing where the model's vocabulary is padded beyond the tokenizer's."""
        return self.tokenizer.bytes_of(id) if id < self.tokenizer.vocab_size else b""

    def _logprobs(self, completion: Completion | None) -> Object | None:
        return self.tokens(completion) if self.logprobs and completion is not None and completion.ids else None

    def _choice(self, index: int, fields: Object, logprobs: Object | None, finish: str | None) -> Object:
        return {"index": index} | fields | {"logprobs": logprobs, "finish_reason": finish}

    def _object(self, name: str, choices: list[Object]) -> Object:
        return {"id": f"{self.prefix}-{self.id}", "object": name, "created": self.created, "model": self.model,
                "choices": choices}

    def _frame(self, choices: list[Object], usage: Object | None = None) -> bytes:
        chunk = self._object(self.streamed_name, choices)
        return _event(chunk | {"usage": usage} if self.include_usage else chunk)

    def _usage(self, answers: Sequence[Said]) -> Object:
        sent = sum(len(said.prompt) for said in answers[::self.n])
        drawn = sum(len(said.completion.ids) for said in answers)
        return {"prompt_tokens": sent, "completion_tokens": drawn, "total_tokens": sent + drawn}


class ChatAsked(Asked):
    """An answer in a conversation."""

    name, streamed_name, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"
    opening = {"delta": {"role": "assistant", "content": ""}}

    def answered(self, said: Said) -> Object:
        message: Object = {"role": "assistant", "content": said.text("text")}
        if thought := said.text("thought"):
            message["reasoning_content"] = thought
        if calls := [self._call(delta) for delta in said.calls]:
            message |= {"content": message["content"] or None, "tool_calls": calls}
        return {"message": message}

    def more(self, delta: Delta | None, call: int) -> Object:
        if delta is None:
            return {"delta": {}}
        if delta.kind == "call":
            return {"delta": {"tool_calls": [{"index": call} | self._call(delta)]}}
        return {"delta": {"reasoning_content" if delta.kind == "thought" else "content": delta.text}}

    def tokens(self, completion: Completion) -> Object:
        return {"refusal": None, "content": [
            {"token": letters.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(letters),
             "top_logprobs": []} for letters, logprob in zip(map(self.letters, completion.ids), completion.logprobs)]}

    def _call(self, delta: Delta) -> Object:
        return {"id": f"call_{uuid.uuid4().hex}", "type": "function",
                "function": {"name": delta.text, "arguments": delta.arguments}}


class TextAsked(Asked):
    """What stands behind a raw prompt."""

    name, streamed_name, prefix = "text_completion", "text_completion", "cmpl"

    def answered(self, said: Said) -> Object:
        return {"text": said.text("text")}

    def more(self, delta: Delta | None, call: int) -> Object:
        return {"text": "" if delta is None else delta.text}

    def tokens(self, completion: Completion) -> Object:
        return {"tokens": [self.letters(id).decode("utf-8", "replace") for id in completion.ids],
                "token_logprobs": list(completion.logprobs), "top_logprobs": None}


def chat(body: bytes, model: str, tokenizer: Tokenizer) -> Asked:
    """The request of /v1/chat/completions; raises Refused."""
    fields = refusals.parsed(body, CHAT, model)
    limits = {fields[name] for name in ("max_tokens", "max_completion_tokens") if name in fields}
    if len(limits) > 1:
        raise Refused(400, f"max_completion_tokens: expected the value of max_tokens, or one of them alone, found "
                           f"{limits}", field="max_completion_tokens")
    tools = tuple(map(_tool, fields.get("tools", ()))) if fields.get("tool_choice") != "none" else ()
    prompt = Chat(tuple(map(_message, fields["messages"])), tools)
    return _asked(ChatAsked, fields, [prompt], tokenizer, limits.pop() if limits else None)


def text(body: bytes, model: str, tokenizer: Tokenizer) -> Asked:
    """The request of /v1/completions; raises Refused."""
    fields = refusals.parsed(body, TEXT, model)
    prompt = fields["prompt"]
    if isinstance(prompt, list) and not isinstance(prompt[0], int):
        prompts = [_raw(one, f"prompt[{index}]") for index, one in enumerate(prompt)]
    else:
        prompts = [_raw(prompt, "prompt")]
    return _asked(TextAsked, fields, prompts, tokenizer, fields.get("max_tokens", TEXT_TOKENS))


def models(name: str, max_len: int) -> Object:
    """The answer of /v1/models."""
    return {"object": "list", "data": [described(name, max_len)]}


def described(name: str, max_len: int) -> Object:
    """The answer of /v1/models/{id}."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "glm5-jax", "max_model_len": max_len}


def error(refused: Refused) -> tuple[int, Object]:
    """Status and body of a refusal."""
    kind = ("invalid_request_error" if refused.status < 429 else
            "rate_limit_error" if refused.status == 429 else "server_error")
    return refused.status, {"error": {"message": refused.message, "type": kind, "param": refused.field,
                                      "code": refused.code}}


def error_frame(refused: Refused) -> bytes:
    """How a stream ends that had begun."""
    return _event(error(refused)[1])


def _event(value: Object) -> bytes:
    return b"data: " + json.dumps(value, allow_nan=False).encode() + b"\n\n"


def _asked(kind: type[Asked], fields: Object, prompts: Sequence[Chat | str | tuple[int, ...]], tokenizer: Tokenizer,
           max_new_tokens: int | None) -> Asked:
    n, seed, stop = int(fields.get("n", 1)), fields.get("seed"), fields.get("stop", ())
    if n * len(prompts) > MOST_CHOICES:
        raise Refused(400, f"n: expected at most {MOST_CHOICES} answers in all, found {n} to each of {len(prompts)} "
                           "prompts", field="n")
    thinking = fields.get("thinking", {})
    options = Options(
        max_new_tokens=None if max_new_tokens is None else int(max_new_tokens),
        temperature=float(fields.get("temperature", 1)), top_p=float(fields.get("top_p", 1)),
        top_k=int(fields.get("top_k", 0)), stop=(stop,) if isinstance(stop, str) else tuple(stop),
        thinking=thinking.get("type") != "disabled", clear_thinking=thinking.get("clear_thinking", True))
    # Choice i of a prompt draws as a request with the seed + i would.
    seeds = [None if seed is None else (int(seed) + i) % 2**32 for i in range(n)]
    choices = tuple(Choice(prompt, dataclasses.replace(options, seed=own)) for prompt in prompts for own in seeds)
    return kind(choices, tokenizer, fields["model"], n, fields.get("stream", False),
                fields.get("stream_options", {}).get("include_usage", False),
                kind is TextAsked and "logprobs" in fields or fields.get("logprobs") is True)


def _message(sent: Mapping[str, Any]) -> Message:
    content = sent.get("content")
    message: Message = {"role": "system" if sent["role"] == "developer" else sent["role"],
                        "content": "".join(part["text"] for part in content) if isinstance(content, list)
                        else content or ""}
    kept = {"assistant": ("reasoning_content", "tool_calls"), "tool": ("tool_call_id",)}.get(message["role"], ())
    return message | {name: sent[name] for name in kept if sent.get(name) is not None}


def _tool(sent: Mapping[str, Any]) -> Message:
    """As the template prints it, in one order of the fields."""
    function = sent["function"]
    kept = {name: function[name] for name in ("name", "description", "parameters") if name in function}
    return {"type": "function", "function": kept}


def _raw(prompt: Any, where: str) -> str | tuple[int, ...]:
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and all(type(id) is int for id in prompt):
        return tuple(prompt)
    raise Refused(400, f"{where}: expected a string or a list of token ids, found {prompt!r}", field=where)
