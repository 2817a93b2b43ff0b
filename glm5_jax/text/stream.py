"""Completions read while they are written: from text that arrives in any pieces, or from token ids.

    events, stream = TextStream.begin().feed("so</think>Look:<tool_ca")  # "so", end of the thought, "Look:"
    events, stream = stream.feed("ll>ls</tool_call>")                    # the call "ls" and its end
    events = stream.close()                                              # nothing was left open

In text every spelled marker has to be taken for a real one; among ids only the special token is one. Streams are
values: feeding one returns the next.
"""

import dataclasses
import re
from typing import Iterable

from glm5_jax.text.grammar import Event, Kind, Mode, Reply, State, collect, finish, run
from glm5_jax.text.segments import Segment
from glm5_jax.text.tokenizer import STOP_TOKENS, Detokenizer, Tokenizer

MARKERS = ("</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
SPELLED = re.compile("(" + "|".join(MARKERS) + ")")


@dataclasses.dataclass(frozen=True)
class TextStream:
    """A completion that arrives as text, cut anywhere, without its stop token; begin with `TextStream.begin`."""

    state: State
    held: str = ""  # the end of the text so far, where it may be the beginning of a marker

    @classmethod
    def begin(cls, *, thinking: bool = True) -> "TextStream":
        """The stream behind a generation prompt with or without thinking."""
        return cls(_opening(thinking))

    def feed(self, chunk: str) -> tuple[list[Event], "TextStream"]:
        """The events of the next chunk, and the stream behind it."""
        text = self.held + chunk
        cut = _unfinished_marker(text)
        state, events = run(self.state, _split(text[:cut]))
        return events, TextStream(state, text[cut:])

    def close(self) -> list[Event]:
        """The events of what was held back, and the fault of a completion that ends inside something."""
        state, events = run(self.state, _split(self.held))
        return events + finish(state)


@dataclasses.dataclass(frozen=True)
class IdStream:
    """A completion that arrives as token ids, with its stop token if it has one; begin with `IdStream.begin`."""

    tokenizer: Tokenizer
    state: State
    letters: Detokenizer
    stopped: bool = False

    @classmethod
    def begin(cls, tokenizer: Tokenizer, *, thinking: bool = True) -> "IdStream":
        """The stream behind a generation prompt with or without thinking."""
        return cls(tokenizer, _opening(thinking), tokenizer.stream())

    def feed(self, ids: Iterable[int]) -> tuple[list[Event], "IdStream"]:
        """The events of the next ids, and the stream behind them; raises ValueError for an id after the stop token."""
        marker_of = {self.tokenizer.id_of(marker): marker for marker in MARKERS + STOP_TOKENS}
        segments: list[Segment] = []
        letters, stopped = self.letters, self.stopped
        stops: list[Event] = []
        for id in map(int, ids):
            if stopped:
                raise ValueError(f"feed: expected no id after the stop token, found {id}")
            if id not in marker_of:
                text, letters = letters.feed([id])
                segments += [Segment(text)] if text else []
                continue
            rest = letters.close()
            letters = self.tokenizer.stream()
            segments += [Segment(rest)] if rest else []
            stopped = marker_of[id] in STOP_TOKENS
            if stopped:
                stops.append(Event(Kind.STOP, marker_of[id]))
            else:
                segments.append(Segment(marker_of[id], marker=True))
        state, events = run(self.state, segments)
        return events + stops, IdStream(self.tokenizer, state, letters, stopped)

    def close(self) -> list[Event]:
        """The events of what was held back, and the fault of a completion that ends inside something."""
        rest = self.letters.close()
        state, events = run(self.state, [Segment(rest)] if rest else [])
        return events + finish(state)


def read_text(text: str, *, thinking: bool = True) -> Reply:
    """The reply of a whole completion, given as text without its stop token."""
    events, stream = TextStream.begin(thinking=thinking).feed(text)
    return collect(events + stream.close())


def read_ids(tokenizer: Tokenizer, ids: Iterable[int], *, thinking: bool = True) -> Reply:
    """The reply of a whole completion, given as the sampled ids; errors as of `IdStream.feed`."""
    events, stream = IdStream.begin(tokenizer, thinking=thinking).feed(ids)
    return collect(events + stream.close())


def _opening(thinking: bool) -> State:
    return State(Mode.THOUGHT if thinking else Mode.CONTENT)


def _split(text: str) -> list[Segment]:
    return [Segment(piece, marker=bool(index % 2)) for index, piece in enumerate(SPELLED.split(text)) if piece]


def _unfinished_marker(text: str) -> int:
    """Where an unfinished marker begins at the end of `text`; its length if there is none."""
    start = text.rfind("<")
    unfinished = start >= 0 and text[start:] not in MARKERS and any(m.startswith(text[start:]) for m in MARKERS)
    return start if unfinished else len(text)
