"""Anthropic's messages: requests as calls, answers as its blocks and events.

Thinking is on unless it is disabled, as through the other API, so that the same messages are the same tokens; a budget
for it is taken as the wish that it is. What cannot be had is refused, naming the field.
"""

import dataclasses
import json
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from glm5_jax.records import Message
from glm5_jax.serve import refusals
from glm5_jax.serve.calls import Chat, Choice, Delta, Part, Said
from glm5_jax.serve.gateway import Options
from glm5_jax.serve.refusals import Refused
from glm5_jax.text import mask, values
from glm5_jax.text.tokenizer import Tokenizer

Object = dict[str, Any]

FINISH = {"length": "max_tokens", "stop_string": "stop_sequence", "calls": "tool_use", "stop": "end_turn"}
ERRORS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
          413: "request_too_large", 529: "overloaded_error"}
BLOCK = {"thought": "thinking", "text": "text", "call": "tool_use"}

STRING: Object = {"type": "string"}
FLAG: Object = {"type": "boolean"}
COUNT: Object = {"type": "integer", "minimum": 1}


def _blocks(required: Sequence[str], **kinds: Object) -> Object:
    """The schema of a string or a list of blocks of these types, each with its fields."""
    fields = {name: wanted for kind in kinds.values() for name, wanted in kind.items()}
    return {"type": ["string", "array"], "items": {
        "type": "object", "properties": {"type": {"enum": list(kinds)}} | fields, "required": ["type", *required]}}


TEXT_BLOCKS = _blocks(["text"], text={"text": STRING})
MESSAGE: Object = {"type": "object", "required": ["role", "content"], "properties": {
    "role": {"enum": ["user", "assistant", "system"]},
    "content": _blocks([], text={"text": STRING}, thinking={"thinking": STRING},
                       tool_use={"id": STRING, "name": STRING, "input": {"type": "object"}},
                       tool_result={"tool_use_id": STRING, "content": TEXT_BLOCKS, "is_error": FLAG})}}
TOOL: Object = {"type": "object", "required": ["name", "input_schema"], "properties": {
    "type": {"const": "custom"}, "name": STRING, "description": STRING, "input_schema": {"type": "object"}}}
PROMPT: Object = {
    "model": STRING, "messages": {"type": "array", "minItems": 1, "items": MESSAGE}, "system": TEXT_BLOCKS,
    "tools": {"type": "array", "items": TOOL},
    "tool_choice": {"type": "object", "required": ["type"], "properties": {
        "type": {"enum": ["auto", "none"]}, "disable_parallel_tool_use": {"const": False}}},
    "thinking": {"type": "object", "required": ["type"], "additionalProperties": False, "properties": {
        "type": {"enum": ["enabled", "adaptive", "disabled"]}, "budget_tokens": COUNT, "clear_thinking": FLAG}}}
COUNTED: Object = {"type": "object", "required": ["model", "messages"], "additionalProperties": False,
                   "properties": PROMPT}
MESSAGES: Object = {"type": "object", "required": ["model", "messages", "max_tokens"], "additionalProperties": False,
                    "properties": PROMPT | {
                        "max_tokens": COUNT, "stream": FLAG,
                        "stop_sequences": {"type": "array", "items": {"type": "string", "minLength": 1}},
                        "temperature": {"type": "number", "minimum": 0, "maximum": 1},
                        "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
                        "top_k": {"type": "integer", "minimum": 0},
                        "seed": {"type": "integer", "minimum": 0, "maximum": 2**32 - 1},  # ours
                        # Of no effect on an answer, here as there.
                        "metadata": {}, "service_tier": {}, "cache_control": {}, "inference_geo": {}}}
ALLOWED = {"user": ("text", "tool_result"), "assistant": ("text", "thinking", "tool_use"), "system": ("text",)}
REQUIRED = {"text": ("text",), "thinking": ("thinking",), "tool_use": ("id", "name", "input"),
            "tool_result": ("tool_use_id",)}


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request that can be run, and the shape of its answer: `whole`, or `frames` and then `last`."""

    last: ClassVar[bytes] = b'event: message_stop\ndata: {"type": "message_stop"}\n\n'

    choices: tuple[Choice, ...]
    model: str
    stream: bool
    id: str = dataclasses.field(default_factory=lambda: f"msg_{uuid.uuid4().hex}")

    def whole(self, answers: Sequence[Said]) -> Object:
        [said] = answers
        return self._message(len(said.prompt)) | {
            "content": list(map(_block, said.deltas)), "stop_reason": FINISH[said.end],
            "stop_sequence": said.stop_string,
            "usage": {"input_tokens": len(said.prompt), "output_tokens": len(said.completion.ids)}}

    async def frames(self, parts: AsyncIterator[Part]) -> AsyncGenerator[bytes, None]:
        index, kind = -1, ""  # of the block that is open
        begun = False
        async for part in parts:
            if not begun:
                begun = True
                yield _event("message_start", message=self._message(len(part.prompt)))
            for delta in part.deltas:
                if delta.kind != kind or kind == "call":
                    if kind:
                        yield _event("content_block_stop", index=index)
                    index, kind = index + 1, delta.kind
                    yield _event("content_block_start", index=index, content_block=_opened(delta))
                yield _event("content_block_delta", index=index, delta=_more(delta))
            if part.said is not None:
                if kind:
                    yield _event("content_block_stop", index=index)
                yield _event("message_delta", usage={"output_tokens": len(part.said.completion.ids)}, delta={
                    "stop_reason": FINISH[part.said.end], "stop_sequence": part.said.stop_string})

    def _message(self, sent: int) -> Object:
        return {"id": self.id, "type": "message", "role": "assistant", "model": self.model, "content": [],
                "stop_reason": None, "stop_sequence": None, "usage": {"input_tokens": sent, "output_tokens": 0}}


def messages(body: bytes, model: str) -> Asked:
    """The request of /v1/messages; raises Refused."""
    fields = refusals.parsed(body, MESSAGES, model)
    thinking, clear_thinking = _thinking(fields)
    options = Options(
        max_new_tokens=int(fields["max_tokens"]), temperature=float(fields.get("temperature", 1)),
        top_p=float(fields.get("top_p", 1)), top_k=int(fields.get("top_k", 0)),
        seed=int(fields["seed"]) if "seed" in fields else None, stop=tuple(fields.get("stop_sequences", ())),
        thinking=thinking, clear_thinking=clear_thinking)
    return Asked((Choice(_chat(fields), options),), fields["model"], fields.get("stream", False))


def count_tokens(body: bytes, model: str, tokenizer: Tokenizer) -> Object:
    """The answer of /v1/messages/count_tokens: the prompt as the template renders it; raises Refused and ChatError."""
    fields = refusals.parsed(body, COUNTED, model)
    chat, (thinking, clear_thinking) = _chat(fields), _thinking(fields)
    ids, _ = mask.encode(tokenizer, chat.messages, chat.tools, add_generation_prompt=True, enable_thinking=thinking,
                         clear_thinking=clear_thinking)
    return {"input_tokens": len(ids)}


def error(refused: Refused) -> tuple[int, Object]:
    """Status and body of a refusal; this API has a status of its own for overload."""
    status = 529 if refused.status == 429 else refused.status
    return status, {"type": "error", "error": {"type": ERRORS.get(status, "api_error"), "message": refused.message}}


def error_frame(refused: Refused) -> bytes:
    """How a stream ends that had begun."""
    return _event(**error(refused)[1])


def _event(type: str, **fields: Any) -> bytes:
    return f"event: {type}\ndata: {json.dumps({'type': type} | fields, allow_nan=False)}\n\n".encode()


def _block(delta: Delta) -> Object:
    """A whole block."""
    match delta.kind:
        case "thought":
            return {"type": "thinking", "thinking": delta.text, "signature": ""}
        case "text":
            return {"type": "text", "text": delta.text}
    return {"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex}", "name": delta.text,
            "input": values.load(delta.arguments)}


def _opened(delta: Delta) -> Object:
    """The block that begins with a delta, still empty."""
    return _block(Delta(delta.kind, delta.text if delta.kind == "call" else "", "{}"))


def _more(delta: Delta) -> Object:
    match delta.kind:
        case "thought":
            return {"type": "thinking_delta", "thinking": delta.text}
        case "text":
            return {"type": "text_delta", "text": delta.text}
    return {"type": "input_json_delta", "partial_json": delta.arguments}


def _thinking(fields: Mapping[str, Any]) -> tuple[bool, bool]:
    thinking = fields.get("thinking", {})
    return thinking.get("type") != "disabled", thinking.get("clear_thinking", True)


def _chat(fields: Mapping[str, Any]) -> Chat:
    system = [{"role": "system", "content": _text(fields["system"])}] if fields.get("system") else []
    sent = [message for index, one in enumerate(fields["messages"]) for message in _messages(one, f"messages[{index}]")]
    if fields["messages"][-1]["role"] == "assistant":
        raise Refused(400, "messages: expected the last one from the user, found one of the assistant; an answer "
                           "cannot be begun for the model", field="messages")
    tools = fields.get("tools", ()) if fields.get("tool_choice", {}).get("type") != "none" else ()
    return Chat((*system, *sent), tuple(map(_tool, tools)))


def _messages(sent: Mapping[str, Any], where: str) -> Iterator[Message]:
    """One message of the API as those of the template, where results of tools are messages of their own."""
    content = [{"type": "text", "text": sent["content"]}] if isinstance(sent["content"], str) else sent["content"]
    allowed = ALLOWED[sent["role"]]
    for index, block in enumerate(content):
        place = f"{where}.content[{index}]"
        if block["type"] not in allowed:
            raise Refused(400, f"{place}.type: expected one of {list(allowed)} from the {sent['role']}, found "
                               f"{block['type']!r}", field=f"{place}.type")
        for name in REQUIRED[block["type"]]:
            if name not in block:
                raise Refused(400, f"{place}.{name}: expected a value, found none", field=f"{place}.{name}")
    if sent["role"] == "assistant":
        yield _assistant(content)
        return
    texts: list[str] = []
    for block in content:
        if block["type"] == "text":
            texts.append(block["text"])
            continue
        if texts:
            yield {"role": sent["role"], "content": "".join(texts)}
        texts = []
        yield {"role": "tool", "content": _text(block.get("content", "")), "tool_call_id": block["tool_use_id"]}
    if texts or not content:
        yield {"role": sent["role"], "content": "".join(texts)}


def _assistant(content: Sequence[Mapping[str, Any]]) -> Message:
    message: Message = {"role": "assistant", "content": _text([one for one in content if one["type"] == "text"])}
    if thoughts := [one["thinking"] for one in content if one["type"] == "thinking"]:
        message["reasoning_content"] = "".join(thoughts)
    if calls := [{"id": one["id"], "type": "function", "function": {"name": one["name"], "arguments": one["input"]}}
                 for one in content if one["type"] == "tool_use"]:
        message["tool_calls"] = calls
    return message


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(block["text"] for block in content)


def _tool(sent: Mapping[str, Any]) -> Message:
    kept = {name: sent[name] for name in ("name", "description") if name in sent}
    return {"type": "function", "function": kept | {"parameters": sent["input_schema"]}}
