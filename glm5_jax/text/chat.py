"""Conversations to text and back, in the chat format of GLM-5 (GLM-4.7's too), character for character.

    messages = [
        {"role": "user", "content": "What is in /tmp?"},
        {"role": "assistant", "reasoning_content": "I should look.", "content": "",
         "tool_calls": [{"function": {"name": "ls", "arguments": {"path": "/tmp", "depth": 1}}}]},
        {"role": "tool", "content": "a.txt"},
    ]
    render(messages, add_generation_prompt=True)

gives, on one line,

    [gMASK]<sop><|user|>What is in /tmp?<|assistant|><think>I should look.</think><tool_call>ls<arg_key>path</arg_key>
    <arg_value>/tmp</arg_value><arg_key>depth</arg_key><arg_value>1</arg_value></tool_call><|observation|>
    <tool_response>a.txt</tool_response><|assistant|><think>

`trained_spans(messages)` covers what the model wrote there: "I should look." up to and with `<|observation|>`.

A message is a dict: role `system`, `user`, `assistant` or `tool`; `content` a string, a list of text parts, or null. An
assistant's has `reasoning_content` (a string; left out, a thought inside the content is found), `tool_calls`, each with
a name and `arguments` (a dict or its JSON text), and `weight`: 0 keeps the turn in context without learning it. The
content of a tool message may be a list of results, each a string or a dict with `output`. Other keys are left alone.

Text is for people and for tests. Tokens are made by `mask.encode`, where markers that a message spells stay text.
"""

from typing import Any, Iterable, Mapping, Sequence

from glm5_jax.text import reading, template
from glm5_jax.text.segments import from_ids, from_text, join
from glm5_jax.text.template import Message
from glm5_jax.text.tokenizer import Tokenizer


def render(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    add_generation_prompt: bool = False,
    enable_thinking: bool = True,
    clear_thinking: bool = True,
) -> str:
    """The text of a conversation.

    `tools` are printed as they are passed. `add_generation_prompt` ends the text where a completion begins, inside a
    thought or, without `enable_thinking`, behind a closed one. `clear_thinking` leaves out the reasoning of the turns
    before the last user message. Raises ChatError, a ValueError, naming the message and field that cannot be rendered.
    """
    return join(template.segments(messages, tools, add_generation_prompt=add_generation_prompt,
                                  enable_thinking=enable_thinking, clear_thinking=clear_thinking))


def trained_spans(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    add_generation_prompt: bool = False,
    enable_thinking: bool = True,
    clear_thinking: bool = True,
) -> list[tuple[int, int]]:
    """The parts of `render`'s text, given the same arguments, that the model has to learn: [(start, end)] code points.

    For each assistant message without weight 0: what follows the opening `<think>`, or the lone `</think>`, and the
    marker of the next message where that is a stop (`<|user|>`, `<|observation|>`). Spans are in order, not empty, and
    do not touch.
    """
    spans: list[tuple[int, int]] = []
    position = 0
    for segment in template.segments(messages, tools, add_generation_prompt=add_generation_prompt,
                                     enable_thinking=enable_thinking, clear_thinking=clear_thinking):
        start, position = position, position + len(segment.text)
        if not segment.trained or not segment.text:
            continue
        if spans and spans[-1][1] == start:
            start = spans.pop()[0]
        spans.append((start, position))
    return spans


def parse(text: str) -> list[dict[str, Any]]:
    """The messages of a rendered text, such that `render(parse(text), clear_thinking=False) == text`.

    This holds for every text that `render` made from messages without role markers in them; a generation prompt with
    `<think>` at the end is no message and is left out. A tools block comes back as a system message, argument values as
    `values.guessed` reads them. What `render` would never print as a call, such as one behind white space, is content:
    where the ids are known use `parse_ids`, and for one completion `stream`. Raises ChatError for any other text.
    """
    return reading.read(from_text(text), certain=False)


def parse_ids(tokenizer: Tokenizer, ids: Iterable[int]) -> list[dict[str, Any]]:
    """The messages of a conversation in token ids, where only special tokens are markers.

    Content and reasoning are as sampled, white space included. `<|endoftext|>` at the end of an assistant's turn is
    dropped; a stop marker at the very end begins an (empty) message. A tools block comes back as text, without its
    markers: encode it again from the tools. Raises ChatError for ids that are no conversation.
    """
    return reading.read(from_ids(tokenizer, ids), certain=True)
