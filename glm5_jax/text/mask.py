"""A conversation as token ids, each with its weight in the loss.

    ids, weights = encode(tokenizer, messages, tools)

Markers of the template become special tokens; text between two markers is encoded by itself, so that nothing a message
spells becomes a special token and no token reaches from what is learned into what is not. What a model has sampled is
kept as ids and never comes back through here.
"""

from typing import Any, Mapping, Sequence

from glm5_jax.text import template
from glm5_jax.text.template import Message
from glm5_jax.text.tokenizer import Tokenizer


def encode(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    add_generation_prompt: bool = False,
    enable_thinking: bool = True,
    clear_thinking: bool = True,
    erroneous: Sequence[tuple[int, int]] = (),
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation and their weights: 1 where the model has to learn the token, 0 elsewhere.

    The arguments before `erroneous` are those of `chat.render`; `chat.trained_spans` is what has weight 1. There are
    two ways to keep a mistake in context without learning it: `"weight": 0` on an assistant message takes out the whole
    turn with the marker that stops it; `erroneous` takes out parts of the rendered text, (start, end) in code points,
    and with them every token that holds a character of such a part. Raises ChatError for messages that cannot be
    rendered, ValueError for a part outside the text and for a tokenizer without the markers.
    """
    ids: list[int] = []
    weights: list[int] = []
    position = 0
    for segment in template.segments(messages, tools, add_generation_prompt=add_generation_prompt,
                                     enable_thinking=enable_thinking, clear_thinking=clear_thinking):
        tokens = ([(tokenizer.id_of(segment.text), 0, len(segment.text))] if segment.marker
                  else tokenizer.encode_spans(segment.text))
        for id, start, end in tokens:
            wrong = any(position + start < stop and begin < position + end for begin, stop in erroneous)
            ids.append(id)
            weights.append(int(segment.trained and not wrong))
        position += len(segment.text)
    for begin, stop in erroneous:
        if not 0 <= begin <= stop <= position:
            raise ValueError(f"erroneous: expected parts within 0..{position}, start before end; found {(begin, stop)}")
    return ids, weights
