"""The pieces of a conversation: text, and the markers that the template itself puts down.

A marker is one special token. The same characters inside a message are text and never become that token: whoever writes
`<|user|>` into a message forges nothing, as long as tokens are made from segments and not from the joined text.
"""

import dataclasses
import re
from typing import Iterable

from glm5_jax.text.tokenizer import EOS, Tokenizer

PREFIX = ("[gMASK]", "<sop>")
ROLE_OF = {"<|system|>": "system", "<|user|>": "user", "<|assistant|>": "assistant", "<|observation|>": "tool"}
MARKER_OF = {role: marker for marker, role in ROLE_OF.items()}
INNER_MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>",
                 "</arg_value>", "<tool_response>", "</tool_response>")
MARKERS = PREFIX + tuple(ROLE_OF) + INNER_MARKERS
SPELLED = re.compile("(" + "|".join(map(re.escape, MARKERS)) + ")")


@dataclasses.dataclass(frozen=True)
class Segment:
    """A piece of a conversation; `Segment("<think>", marker=True)` is the token, `Segment("<think>")` seven letters."""

    text: str
    marker: bool = False   # a special token put down by the template, or sampled by the model
    trained: bool = False  # the model is to learn to produce it


def join(segments: Iterable[Segment]) -> str:
    """The text of the segments."""
    return "".join(segment.text for segment in segments)


def from_text(text: str) -> list[Segment]:
    """Segments of a text, where every spelled marker has to be taken for a real one."""
    return [Segment(piece, marker=bool(index % 2)) for index, piece in enumerate(SPELLED.split(text)) if piece]


def from_ids(tokenizer: Tokenizer, ids: Iterable[int]) -> list[Segment]:
    """Segments of token ids, where only special tokens are markers (`<|endoftext|>` too), however text is spelled.

    Raises ValueError for an id outside the vocabulary, and for a tokenizer without the markers of the chat format.
    """
    marker_of = {tokenizer.id_of(marker): marker for marker in MARKERS + (EOS,)}
    segments: list[Segment] = []
    run: list[int] = []
    for id in map(int, ids):
        if id not in marker_of:
            run.append(id)
            continue
        segments += [Segment(tokenizer.decode(run))] if run else []
        segments.append(Segment(marker_of[id], marker=True))
        run = []
    return segments + ([Segment(tokenizer.decode(run))] if run else [])
