"""The chat template of GLM-5 (and GLM-4.7): messages to segments, character for character.

Everything that is printed, learned or tokenised comes out of the one generator `segments`.
"""

import dataclasses
import reprlib
from typing import Any, Iterator, Mapping, Sequence

from glm5_jax.text import values
from glm5_jax.text.segments import MARKER_OF, PREFIX, Segment

Message = Mapping[str, Any]

TOOLS_HEAD = """
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
"""
TOOLS_TAIL = """</tools>

For each function call, output the function name and arguments within the following XML format:
"""
CALL_PATTERN = ("<tool_call>", "{function-name}", "<arg_key>", "{arg-key-1}", "</arg_key>", "<arg_value>",
                "{arg-value-1}", "</arg_value>", "<arg_key>", "{arg-key-2}", "</arg_key>", "<arg_value>",
                "{arg-value-2}", "</arg_value>", "...", "</tool_call>")


class ChatError(ValueError):
    """A message, a tool or a text that the chat format has no place for."""

    def __init__(self, where: str, expected: str, found: object):
        super().__init__(f"{where}: expected {expected}, found {found}")


def segments(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    add_generation_prompt: bool = False,
    enable_thinking: bool = True,
    clear_thinking: bool = True,
) -> Iterator[Segment]:
    """The segments of a conversation, in order; the arguments are those of `chat.render`, which joins them.

    Raises ChatError naming the message and the field that cannot be rendered.
    """
    messages = list(messages)
    roles = [_role(message, index) for index, message in enumerate(messages)]
    last_user = max((index for index, role in enumerate(roles) if role == "user"), default=-1)
    yield from map(_marker, PREFIX)
    yield from _tools_block(list(tools or ()))
    stop = False  # whether the next marker ends a turn to be learned, and so is the model's to produce
    for index, (message, role) in enumerate(zip(messages, roles)):
        where = f"messages[{index}]"
        if role == "assistant":
            stop = _learned(message, where)
            for segment in _assistant(message, where, show_thought=index > last_user or not clear_thinking):
                yield segment if stop else dataclasses.replace(segment, trained=False)
            continue
        if role == "tool":
            yield from _tool_results(message, where, stop, opened=index > 0 and roles[index - 1] == "tool")
        else:
            yield _marker(MARKER_OF[role], trained=stop and role == "user")
            yield Segment(_content(message, where))
        stop = False
    if add_generation_prompt:
        yield from map(_marker, ("<|assistant|>", "<think>" if enable_thinking else "</think>"))


def _found(value: Any) -> str:
    return reprlib.repr(value)[:40]  # `repr` itself fails for what is nested too deep


def _marker(text: str, trained: bool = False) -> Segment:
    return Segment(text, marker=True, trained=trained)


def _role(message: Any, index: int) -> str:
    if not isinstance(message, Mapping):
        raise ChatError(f"messages[{index}]", "a dict with a role and a content", _found(message))
    role = message.get("role")
    if not isinstance(role, str) or role not in MARKER_OF:
        raise ChatError(f"messages[{index}].role", f"one of {list(MARKER_OF)}", _found(role))
    if role != "assistant" and "weight" in message:
        raise ChatError(f"messages[{index}].weight", "a weight on assistant messages alone (nothing else is learned)",
                        f"one on role {role!r}")
    return role


def _learned(message: Message, where: str) -> bool:
    weight = message.get("weight", 1)
    if weight not in (0, 1):
        raise ChatError(f"{where}.weight", "0 (kept in context, not learned) or 1", _found(weight))
    return bool(weight)


def _content(message: Message, where: str) -> str:
    content = message.get("content")
    if content is None:  # the released template prints "None" for null, which is known to derail agents
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise ChatError(f"{where}.content", "a string, a list of parts, or null", type(content).__name__)
    return "".join(_part(part, f"{where}.content[{index}]") for index, part in enumerate(content))


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping) or part.get("type") != "text":
        return ""
    text = part.get("text", "")
    if not isinstance(text, str):
        raise ChatError(f"{where}.text", "a string", type(text).__name__)
    return text


def _tools_block(tools: Sequence[Mapping[str, Any]]) -> Iterator[Segment]:
    if not tools:
        return
    lines = []
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise ChatError(f"tools[{index}]", "a dict that describes a function", _found(tool))
        lines.append(_json(tool, f"tools[{index}]") + "\n")
    yield _marker("<|system|>")
    yield Segment(TOOLS_HEAD + "".join(lines) + TOOLS_TAIL)
    for piece in CALL_PATTERN:
        yield Segment(piece, marker=piece.startswith("<"))


def _json(value: Any, where: str) -> str:
    try:
        return values.printed(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise ChatError(where, "what JSON can say", error) from error


def _assistant(message: Message, where: str, show_thought: bool) -> Iterator[Segment]:
    reasoning, content = _thought_and_content(message, where)
    yield _marker("<|assistant|>")
    if reasoning and show_thought:
        yield _marker("<think>")
        yield Segment(reasoning.strip(), trained=True)
        yield _marker("</think>", trained=True)
    else:
        yield _marker("</think>")
    yield Segment(content.strip(), trained=True)
    calls = message.get("tool_calls")
    if calls is not None and not isinstance(calls, (list, tuple)):
        raise ChatError(f"{where}.tool_calls", "a list of calls, or null", type(calls).__name__)
    for index, call in enumerate(calls or ()):
        yield from _call(call, f"{where}.tool_calls[{index}]")


def _thought_and_content(message: Message, where: str) -> tuple[str, str]:
    reasoning, content = message.get("reasoning_content"), _content(message, where)
    if isinstance(reasoning, str):
        return reasoning, content
    if reasoning is not None:
        raise ChatError(f"{where}.reasoning_content", "a string, or null", type(reasoning).__name__)
    if "</think>" not in content:
        return "", content
    before, after = content.split("</think>", 1)[0], content.rsplit("</think>", 1)[1]
    return before.rstrip("\n").rsplit("<think>", 1)[-1].lstrip("\n"), after.lstrip("\n")


def _call(call: Any, where: str) -> Iterator[Segment]:
    inner = call.get("function") or call if isinstance(call, Mapping) else call
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise ChatError(where, "a dict with a name and arguments, or one under 'function'", _found(call))
    yield _marker("<tool_call>", trained=True)
    yield Segment(inner["name"], trained=True)
    for key, value in _arguments(inner, f"{where}.arguments").items():
        if not isinstance(key, str):
            raise ChatError(f"{where}.arguments", "string keys", _found(key))
        yield _marker("<arg_key>", trained=True)
        yield Segment(key, trained=True)
        yield _marker("</arg_key>", trained=True)
        yield _marker("<arg_value>", trained=True)
        yield Segment(_json(value, f"{where}.arguments[{key!r}]"), trained=True)
        yield _marker("</arg_value>", trained=True)
    yield _marker("</tool_call>", trained=True)


def _arguments(call: Message, where: str) -> Mapping[str, Any]:
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = values.load(arguments)
        except ValueError as error:
            raise ChatError(where, "a dict, or the JSON text of an object", _found(arguments)) from error
    if arguments is None:
        return {}
    if not isinstance(arguments, Mapping):
        raise ChatError(where, "a dict, or the JSON text of an object", type(arguments).__name__)
    return arguments


def _tool_results(message: Message, where: str, stop: bool, opened: bool) -> Iterator[Segment]:
    content = message.get("content")
    if isinstance(content, (list, tuple)) and not _is_parts(content):
        results, opened = [_result(item) for item in content], False
    else:
        results = [_content(message, where)]
    if not opened:
        yield _marker("<|observation|>", trained=stop)
    for result in results:
        yield _marker("<tool_response>")
        yield Segment(result)
        yield _marker("</tool_response>")


def _is_parts(content: Sequence[Any]) -> bool:
    """Whether a tool's content is one result in parts; the released template would print such parts as Python dicts."""
    return bool(content) and all(
        isinstance(item, Mapping) and "type" in item and "output" not in item for item in content)


def _result(item: Any) -> str:
    output = item["output"] if isinstance(item, Mapping) and "output" in item else item
    return "" if output is None else str(output)
