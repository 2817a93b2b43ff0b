"""Segments back to messages: the inverse of the template.

Whether the markers are real matters. Among token ids they are, and every one counts. In a text some may be letters that
a message happens to contain; of the readings that a text allows, the one is taken that renders to the same text again.
"""

from typing import Any, Iterable, Iterator, Sequence

from glm5_jax.text import values
from glm5_jax.text.grammar import Fault, Kind, Mode, State, collect, run, step
from glm5_jax.text.segments import PREFIX, ROLE_OF, Segment, join
from glm5_jax.text.template import ChatError
from glm5_jax.text.tokenizer import EOS

# Reasoning that renders as `<think></think>`; the empty string renders as a lone `</think>`.
EMPTY_THOUGHT = "\n"
Place = tuple[int, Mode, tuple[str, ...] | None]  # before which segment, inside of what, after which arguments
# What ends each stretch that may hold any marker.
CLOSING = {Mode.KEY: "</arg_key>", Mode.VALUE: "</arg_value>"}


def read(segments: Sequence[Segment], *, certain: bool) -> list[dict[str, Any]]:
    """The messages of a conversation; `certain` says that every marker is a real one.

    Raises ChatError where the segments are none that the template writes and no reading is left.
    """
    if [segment.text for segment in segments[:2]] != list(PREFIX):
        raise ChatError("text", f"to begin with {''.join(PREFIX)}", repr(join(segments)[:40]))
    messages: list[dict[str, Any]] = []
    turns = list(_turns(segments[2:]))
    for index, (role, body) in enumerate(turns):
        where = f"turn {index} ({role})"
        if role == "tool":
            messages += _tool_messages(body, where, after_tool=index > 0 and turns[index - 1][0] == "tool")
        elif role != "assistant":
            messages.append({"role": role, "content": join(body)})
        elif index < len(turns) - 1 or body != [Segment("<think>", marker=True)]:  # that is a generation prompt
            messages.append(_assistant(body, where, certain))
    return messages


def assistant_message(
    reasoning: str | None, content: str, calls: Iterable[tuple[str, dict[str, Any]]],
) -> dict[str, Any]:
    """The message of an assistant; `reasoning` is None if no thought was opened, "" for an empty one."""
    message: dict[str, Any] = {"role": "assistant", "content": content,
                               "reasoning_content": "" if reasoning is None else reasoning or EMPTY_THOUGHT}
    listed = [{"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    return message | {"tool_calls": listed} if listed else message


def _turns(segments: Sequence[Segment]) -> Iterator[tuple[str, list[Segment]]]:
    starts = [index for index, segment in enumerate(segments) if segment.marker and segment.text in ROLE_OF]
    if segments and starts[:1] != [0]:
        raise ChatError("text", f"one of {list(ROLE_OF)} behind the prefix", repr(join(segments)[:40]))
    for start, end in zip(starts, starts[1:] + [len(segments)]):
        yield ROLE_OF[segments[start].text], list(segments[start + 1:end])


def _is(segment: Segment, marker: str) -> bool:
    return segment.marker and segment.text == marker


def _tool_messages(body: list[Segment], where: str, after_tool: bool) -> list[dict[str, Any]]:
    if not body:
        return [{"role": "tool", "content": []}]
    if not (_is(body[0], "<tool_response>") and _is(body[-1], "</tool_response>") and len(body) > 1):
        raise ChatError(where, "<tool_response>...</tool_response>", repr(join(body)[:40]))
    cuts = [index for index in range(1, len(body) - 1)
            if _is(body[index], "</tool_response>") and _is(body[index + 1], "<tool_response>")]
    results = [join(body[start + 1:end]) for start, end in zip([0] + [cut + 1 for cut in cuts], cuts + [len(body) - 1])]
    messages: list[dict[str, Any]] = [{"role": "tool", "content": result} for result in results]
    if after_tool:  # only a list opens an observation of its own behind another
        messages[0]["content"] = [{"output": results[0]}]
    return messages


def _assistant(body: list[Segment], where: str, certain: bool) -> dict[str, Any]:
    if body and _is(body[-1], EOS):  # closes a completion that was cut off; never a marker in a text
        body = body[:-1]
    if not body or not (_is(body[0], "<think>") or _is(body[0], "</think>")):
        raise ChatError(where, "<think> or </think> first", repr(join(body)[:40]))
    opened = _is(body[0], "<think>")
    ends = [index for index, segment in enumerate(body) if _is(segment, "</think>")] if opened else [0]
    if not ends:
        raise ChatError(where, "a </think> that closes the thought", repr(join(body)[-40:]))
    exact = None if certain else next((end for end in ends if _stripped(body, 1, end)
                                       and _stripped(body, end + 1, len(body))), None)
    end = ends[0] if exact is None else exact
    answer = body[end + 1:]
    start = _calls_start(answer, any_space=exact is None)
    return assistant_message(join(body[1:end]) if opened else None, join(answer[:start]), _calls(answer[start:]))


def _stripped(body: list[Segment], start: int, end: int) -> bool:
    """Whether a part has no white space at its ends: the template strips reasoning and content."""
    return start >= end or not (body[start].text[0].isspace() or body[end - 1].text[-1].isspace())


def _calls_start(answer: list[Segment], any_space: bool) -> int:
    """Where the unbroken run of well-formed calls at the end begins, the length if there is none.

    Without `any_space` a run does not begin behind white space, where the template never prints a call.
    """
    last = {segment.text: index for index, segment in enumerate(answer) if segment.marker}
    lost: set[Place] = set()
    for start, segment in enumerate(answer):
        if not _is(segment, "<tool_call>") or not (any_space or _stripped(answer, 0, start)):
            continue
        if _only_calls(answer, start, last, lost):
            return start
    return len(answer)


def _only_calls(answer: list[Segment], start: int, last: dict[str, int], lost: set[Place]) -> bool:
    """Whether nothing but well-formed calls stands from `start` on.

    `lost` holds the places from where that was found to be wrong, and gets those passed here. What follows a place is
    settled by its mode alone, unless it is that an argument is given twice; then the arguments before it matter too.
    """
    state, duplicate = State(Mode.AFTER_CALL), False
    passed: list[Place] = []
    for index in range(start, len(answer)):
        place = (index, state.mode, state.keys)
        duplicate = place in lost
        closing = CLOSING.get(state.mode)
        if duplicate or (index, state.mode, None) in lost or closing and index > last.get(closing, -1):
            break
        passed.append(place)
        state, events = step(state, answer[index])
        faults = [event.fault for event in events if event.kind is Kind.FAULT]
        if faults:
            duplicate = Fault.DUPLICATE_ARGUMENT in faults
            break
    else:
        if state.mode is Mode.AFTER_CALL:
            return True
    # The key that is being read is no part of a place, and may be the one that is given twice.
    lost.update([place for place in passed if place[1] is not Mode.KEY] if duplicate else
                [(index, mode, None) for index, mode, _ in passed])
    return False


def _calls(segments: list[Segment]) -> list[tuple[str, dict[str, Any]]]:
    _, events = run(State(Mode.CONTENT), segments)
    return [(call.name, {name: values.guessed(raw) for name, raw in call.arguments}) for call in collect(events).calls]
