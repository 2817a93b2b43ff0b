"""Conversations to packed rows in which exactly what a model should say has weight.

    rows, report = pack(tokenizer, read("conversations.jsonl"), 4096)

A line of the file is an object with `messages` and, where needed, `tools`, `thinking` ("interleaved" or "preserved"),
`erroneous` (parts of the rendered text not to be learned, [start, end] in code points) and `metadata`, which is left
alone. Messages are those of `text.chat`; `"weight": 0` on one of an assistant keeps a mistake in context without
learning it.
"""

import dataclasses
import difflib
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from glm5_jax.data import packing
from glm5_jax.text import mask, values
from glm5_jax.text.template import Message
from glm5_jax.text.thinking import INTERLEAVED, PRESERVED, Thinking
from glm5_jax.text.tokenizer import Tokenizer

FIELDS = ("messages", "tools", "thinking", "erroneous", "metadata")
THINKING: Mapping[str, Thinking] = {"interleaved": INTERLEAVED, "preserved": PRESERVED}


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What is said, how it is rendered, and where it came from."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    thinking: Thinking = INTERLEAVED
    erroneous: tuple[tuple[int, int], ...] = ()
    place: str = "conversation"  # for errors and reports: file:line


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of the conversations, by their places."""

    kept: int                    # the cut ones included
    cut: tuple[str, ...]         # longer than a row, and only their beginning is kept
    over_long: tuple[str, ...]   # longer than a row, and dropped
    unlearned: tuple[str, ...]   # dropped, as no token of it (or of what is left of it) is to be learned
    tokens: int
    learned: int                 # tokens with weight 1


def read(path: str | os.PathLike[str]) -> tuple[Conversation, ...]:
    """The conversations of a JSONL file; blank lines are skipped.

    Raises OSError for a file that cannot be read, ValueError with the line's number for what is no conversation, and
    for an empty file. Whether messages can be rendered shows in `encode`.
    """
    with open(path, "rb") as file:
        found = tuple(_conversation(line, f"{os.fspath(path)}:{number}")
                      for number, line in enumerate(file, 1) if line.strip())
    if not found:
        raise ValueError(f"{path}: expected a conversation per line, found an empty file")
    return found


def by_turn(conversation: Conversation) -> tuple[Conversation, ...]:
    """One conversation per user turn: up to the next user's message, with only the last turn to be learned.

    Interleaved thinking leaves the reasoning of earlier turns out of what is rendered. So each turn is learned as it
    will be sampled: with its own reasoning, behind others without. Raises ValueError where parts are marked erroneous,
    whose places this would move.
    """
    if conversation.erroneous:
        raise ValueError(f"{conversation.place}: expected no erroneous parts, found {conversation.erroneous}; "
                         "give the messages weight 0")
    messages = conversation.messages
    users = [index for index, message in enumerate(messages) if message.get("role") == "user"]
    turns = []
    for start, stop in zip([0, *users], [*users, len(messages)]):
        if any(message.get("role") == "assistant" for message in messages[start:stop]):
            known = tuple({**message, "weight": 0} if message.get("role") == "assistant" else message
                          for message in messages[:start])
            turns.append(dataclasses.replace(conversation, messages=known + messages[start:stop]))
    return tuple(turns)


def encode(tokenizer: Tokenizer, conversation: Conversation) -> tuple[np.ndarray, np.ndarray]:
    """Ids, int32, and the weight of predicting each, float32 0 or 1, both [tokens], as `mask.encode` gives them.

    Where an assistant speaks last, the marker that stops it follows, as if somebody had answered: `<|observation|>`
    after a call, else `<|user|>`; so the last turn ends like every other. Raises ValueError naming the conversation.
    """
    try:
        ids, weights = mask.encode(tokenizer, conversation.messages, conversation.tools,
                                   erroneous=conversation.erroneous, **conversation.thinking.options())
    except ValueError as error:
        raise ValueError(f"{conversation.place}: {error}") from error
    last = conversation.messages[-1] if conversation.messages else {}
    if last.get("role") == "assistant":
        ids.append(tokenizer.id_of("<|observation|>" if last.get("tool_calls") else "<|user|>"))
        weights.append(int(last.get("weight", 1)))
    return np.array(ids, np.int32), np.array(weights, np.float32)


def pack(tokenizer: Tokenizer, conversations: Sequence[Conversation], length: int, *,
         over_long: Literal["drop", "cut"] = "drop") -> tuple[packing.Rows, Report]:
    """Rows of `length` tokens, each conversation whole and a segment of one row (`packing.pack_best_fit`).

    A conversation longer than a row is dropped, or with "cut" loses its end; the report names both, and those without
    anything to learn, which are dropped. Raises ValueError as `encode`, for an unknown `over_long`, and where nothing
    is left.
    """
    if over_long not in ("drop", "cut"):
        raise ValueError(f"over_long: expected 'drop' or 'cut', found {over_long!r}")
    ids, weights = [], []
    cut, dropped, unlearned = [], [], []
    for conversation in conversations:
        tokens, counts = encode(tokenizer, conversation)
        too_long = len(tokens) > length
        if too_long and over_long == "drop":
            dropped.append(conversation.place)
        elif not counts[:length].any():
            unlearned.append(conversation.place)
        else:
            if too_long:
                cut.append(conversation.place)
            ids.append(tokens[:length])
            weights.append(counts[:length])
    if not ids:
        raise ValueError(f"conversations: expected one to learn from in {length} tokens; of {len(conversations)}, "
                         f"{len(dropped)} are longer and {len(unlearned)} hold nothing to learn")
    report = Report(len(ids), tuple(cut), tuple(dropped), tuple(unlearned), sum(map(len, ids)),
                    int(sum(counts.sum() for counts in weights)))
    return packing.pack_best_fit(ids, length, loss_weights=weights), report


def _conversation(line: bytes, place: str) -> Conversation:
    try:
        record = values.load(line.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{place}: expected a JSON object in UTF-8, found: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{place}: expected a JSON object, found {type(record).__name__}")
    for name in record:
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, 1)
            raise ValueError(f"{place}: expected the fields {', '.join(FIELDS)}; found {name!r}, "
                             + (f"did you mean {near[0]!r}?" if near else "which belongs under 'metadata'"))
    messages, tools = _dicts(record, "messages", place), _dicts(record, "tools", place)
    if not messages:
        raise ValueError(f"{place}: expected at least one message in the field 'messages', found none")
    thinking = record.get("thinking", "interleaved")
    if not isinstance(thinking, str) or thinking not in THINKING:
        raise ValueError(f"{place}: expected one of {sorted(THINKING)} in the field 'thinking', found {thinking!r}")
    erroneous = record.get("erroneous") or []
    if not isinstance(erroneous, list) or not all(
            isinstance(part, list) and len(part) == 2 and all(type(edge) is int for edge in part)
            for part in erroneous):
        raise ValueError(f"{place}: expected [start, end] pairs in the field 'erroneous', found {erroneous!r:.80}")
    return Conversation(messages, tools, THINKING[thinking], tuple((start, end) for start, end in erroneous), place)


def _dicts(record: Mapping[str, Any], field: str, place: str) -> tuple[dict[str, Any], ...]:
    found = record.get(field) or []
    if not isinstance(found, list) or not all(isinstance(value, dict) for value in found):
        raise ValueError(f"{place}: expected a list of objects in the field {field!r}, found {found!r:.80}")
    return tuple(found)
