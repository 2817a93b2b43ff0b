"""Conversations as the tokens that were really sent and sampled: no sampled token is ever made from text again.

A call of a session continues an earlier one where its messages begin with that call's and its reply, and the template
shows them as it did then: its prompt is then that call's prompt, the sampled ids, and the tokens of what is new.
Anything else, as a thought that the template leaves out or a message that was edited, is a fork: a context of its own,
made from the messages. In it, too, nothing is learned but what is sampled behind it.

Clients do not send a reply back letter by letter. It is taken for the same where the template prints the same for it,
where its thought is left out, where its text is another normal form of Unicode, and where the arguments of its calls
are the same JSON values. The session then goes on with what it had itself.
"""

import dataclasses
import functools
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from glm5_jax.records import Completion, Message, Turn
from glm5_jax.text import template, values
from glm5_jax.text.segments import Segment
from glm5_jax.text.tokenizer import Tokenizer

Form = tuple[str | None, tuple[tuple[str, bool], ...]]  # a thought, None where none was given, and all else as printed


@dataclasses.dataclass(frozen=True)
class Rendering:
    """What decides, besides the messages, how a conversation is printed."""

    tools: tuple[Message, ...]
    clear_thinking: bool

    def segments(self, messages: Sequence[Message]) -> list[Segment]:
        return list(template.segments(messages, self.tools, clear_thinking=self.clear_thinking))

    def prompt(self, messages: Sequence[Message], enable_thinking: bool) -> list[Segment]:
        return list(template.segments(messages, self.tools, clear_thinking=self.clear_thinking,
                                      add_generation_prompt=True, enable_thinking=enable_thinking))


@dataclasses.dataclass(frozen=True)
class Question:
    """What a call asks: all its messages and ids, and which earlier call of the session it continues."""

    messages: tuple[Message, ...]
    ids: tuple[int, ...]
    extends: int | None = None
    rendering: Rendering | None = None  # None where it is not known, or there was none


@dataclasses.dataclass(frozen=True)
class Call:
    """A question and what came back; `number` counts the calls of the session from 0, in the order of their start."""

    question: Question
    reply: Message
    completion: Completion
    number: int = 0

    @property
    def ids(self) -> tuple[int, ...]:
        return self.question.ids + self.completion.ids

    @property
    def messages(self) -> tuple[Message, ...]:
        return (*self.question.messages, self.reply)

    @functools.cached_property
    def forms(self) -> tuple[tuple[Form, ...], ...]:
        return tuple(map(_forms, self.messages))

    def rendered(self, rendering: Rendering) -> "Call":
        return dataclasses.replace(self, question=dataclasses.replace(self.question, rendering=rendering))


def ask(tokenizer: Tokenizer, calls: Sequence[Call], messages: Sequence[Message], tools: Sequence[Message] = (), *,
        enable_thinking: bool = True, clear_thinking: bool = True) -> Question:
    """The prompt of the next chat behind `calls`; of those that it may continue, it continues the longest, the latest.

    Raises ChatError for messages that cannot be rendered, ValueError or TypeError for what no record can hold.
    """
    rendering = Rendering(tuple(tools), clear_thinking)
    whole = rendering.prompt(messages, enable_thinking)
    messages = Turn(tuple(messages), {"role": "assistant"}).messages  # copies of its own
    forms = tuple(map(_forms, messages))
    for index in _longest_first([len(call.messages) for call in calls]):
        call, known = calls[index], len(calls[index].messages)
        if known > len(messages) or not all(map(_echoes, forms, call.forms)):
            continue
        if call.question.rendering is None:
            if not _explains(tokenizer, calls, index, rendering):
                continue
            call = call.rendered(rendering)
        assert call.question.rendering is not None
        tools = call.question.rendering.tools
        present = dataclasses.replace(rendering, tools=tools) if _same_json(tools, rendering.tools) else rendering
        told = (*call.messages, *messages[known:])
        ids = _continued(tokenizer, call, present, told, enable_thinking)
        if ids is not None:
            return Question(told, ids, index, present)
    return Question(messages, tuple(_encode(tokenizer, whole)), None, rendering)


def ask_text(tokenizer: Tokenizer, calls: Sequence[Call], prompt: str | Sequence[int]) -> Question:
    """The prompt of a raw completion: ids as they are, or a text in which every spelled marker is that marker.

    It continues a call where it begins with all of its ids, or with their text, markers and stop included. On record
    its text stands as the message of a user. Raises ValueError for an empty one and for ids outside the vocabulary.
    """
    if not len(prompt):
        raise ValueError("prompt: expected at least one token, found none")
    for index in _longest_first([len(call.ids) for call in calls]):
        call, known = calls[index], len(calls[index].ids)
        if isinstance(prompt, str):
            before = tokenizer.decode(id for id in call.ids if id < tokenizer.vocab_size)  # a model may have more
            if not prompt.startswith(before):
                continue
            added = tuple(tokenizer.encode(prompt[len(before):], specials=True))
        else:
            if tuple(prompt[:known]) != call.ids:
                continue
            added = tuple(map(int, prompt[known:]))
        rest: Message = {"role": "user", "content": tokenizer.decode(added)}
        return Question((*call.messages, rest), call.ids + added, index)
    ids = tokenizer.encode(prompt, specials=True) if isinstance(prompt, str) else list(map(int, prompt))
    return Question(({"role": "user", "content": tokenizer.decode(ids)},), tuple(ids))


def turn(calls: Sequence[Call], call: Call) -> Turn:
    """The record of a call behind the earlier ones: what is new of its messages and ids."""
    question, parent = call.question, None if call.question.extends is None else calls[call.question.extends]
    told, known = (len(parent.messages), len(parent.ids)) if parent else (0, 0)
    return Turn(question.messages[told:], call.reply, question.ids[known:], call.completion, question.extends)


def restored(turns: Sequence[Turn]) -> list[Call]:
    """The calls that recorded turns tell of. Raises ValueError for a turn without tokens, or that extends a later one.
    """
    calls: list[Call] = []
    for i, one in enumerate(turns):
        if one.completion is None or one.extends is not None and one.extends >= i:
            raise ValueError(f"turns[{i}]: expected tokens, and to extend an earlier turn; found "
                             f"completion={one.completion}, extends={one.extends}")
        parent = None if one.extends is None else calls[one.extends]
        messages, ids = (parent.messages, parent.ids) if parent else ((), ())
        calls.append(Call(Question(messages + one.messages, ids + one.prompt, one.extends), one.reply, one.completion,
                          i))
    return calls


def _longest_first(lengths: Sequence[int]) -> list[int]:
    """The indices of the calls, of two that are equally long the later one first."""
    return sorted(range(len(lengths)), key=lambda index: (lengths[index], index), reverse=True)


def _continued(tokenizer: Tokenizer, parent: Call, rendering: Rendering, messages: Sequence[Message],
               enable_thinking: bool) -> tuple[int, ...] | None:
    """The ids of a prompt behind its parent, None where what the parent saw and said would be printed otherwise now."""
    assert parent.question.rendering is not None
    before = _printed(parent.question.rendering.segments(parent.messages))
    whole = rendering.prompt(messages, enable_thinking)
    if _printed(whole[:len(before)]) != before:
        return None
    return parent.ids + tuple(_behind(tokenizer, parent.completion.ids, whole[len(before):]))


def _explains(tokenizer: Tokenizer, calls: Sequence[Call], index: int, rendering: Rendering) -> bool:
    """Whether the ids of a restored call, and of all that it extends, are those that this rendering gives."""
    at: int | None = index
    while at is not None:
        question = calls[at].question
        parent = None if question.extends is None else calls[question.extends].rendered(rendering)
        prompts = [tuple(_encode(tokenizer, rendering.prompt(question.messages, thinking))) if parent is None else
                   _continued(tokenizer, parent, rendering, question.messages, thinking) for thinking in (True, False)]
        if question.ids not in prompts:
            return False
        at = question.extends
    return True


def _behind(tokenizer: Tokenizer, sampled: Sequence[int], new: Sequence[Segment]) -> list[int]:
    """The tokens behind a completion. A stop that was sampled is the marker of what follows, where it is the same; a
    completion that was cut off is closed by `<|endoftext|>`."""
    if not sampled or sampled[-1] not in tokenizer.stop_ids:
        return [tokenizer.eos_id, *_encode(tokenizer, new)]
    if new[0].marker and tokenizer.id_of(new[0].text) == sampled[-1]:
        new = new[1:]
    return _encode(tokenizer, new)


def _encode(tokenizer: Tokenizer, segments: Iterable[Segment]) -> list[int]:
    return [id for segment in segments for id in
            ([tokenizer.id_of(segment.text)] if segment.marker else tokenizer.encode(segment.text))]


def _printed(segments: Iterable[Segment]) -> tuple[tuple[str, bool], ...]:
    return tuple((segment.text, segment.marker) for segment in segments)


def _forms(message: Message) -> tuple[Form, ...]:
    """What a message says, whoever wrote it down: the last form is as the template reads it. Where no thought is given
    with it, one may still stand in the content, or the content may spell what closes a thought."""
    if message["role"] != "assistant":
        return ((None, _printed(template.segments([message]))),)
    listed = [{"name": inner["name"], "arguments": _canonical(_object(inner.get("arguments")))}
              for inner in (call.get("function") or call for call in message.get("tool_calls") or ())]
    message = {**message, "tool_calls": listed}
    if isinstance(message.get("reasoning_content"), str):
        return (_read(message),)
    return ((None, _read({**message, "reasoning_content": ""})[1]), _read(message))


def _read(message: Message) -> Form:
    shown = [(unicodedata.normalize("NFC", text), marker)
             for text, marker in _printed(template.segments([message], clear_thinking=False))]
    start = next(i for i, (text, marker) in enumerate(shown) if marker and text == "<|assistant|>") + 1
    if shown[start] == ("<think>", True):
        return shown[start + 1][0], tuple(shown[start + 3:])
    return "", tuple(shown[start + 1:])


def _echoes(sent: tuple[Form, ...], known: tuple[Form, ...]) -> bool:
    thought, rest = known[-1]
    return any(form[1] == rest and form[0] in (None, thought) for form in sent)


def _object(arguments: Any) -> Any:
    return values.load(arguments) if isinstance(arguments, str) else arguments or {}


def _canonical(value: Any) -> Any:
    """The JSON value in one way of writing it: keys in order, whole numbers without a point."""
    if isinstance(value, Mapping):
        return {key: _canonical(value[key]) for key in sorted(value)}
    if isinstance(value, (list, tuple)):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _same_json(one: Any, other: Any) -> bool:
    return values.dump(_canonical(one)) == values.dump(_canonical(other))
