"""Completions read as they come: what each piece says, and the end that a stop string makes."""

import dataclasses
import re
from collections.abc import Sequence

from glm5_jax.records import Completion, Message, StopReason
from glm5_jax.text import tools
from glm5_jax.text.grammar import Event, Kind, collect
from glm5_jax.text.stream import IdStream
from glm5_jax.text.tokenizer import STOP_TOKENS, Tokenizer


class ChatReader:
    """What an assistant says behind a generation prompt, with or without thinking."""

    def __init__(self, tokenizer: Tokenizer, definitions: Sequence[Message], *, thinking: bool):
        self._definitions, self._stream = list(definitions), IdStream.begin(tokenizer, thinking=thinking)
        self._size = tokenizer.vocab_size

    def feed(self, ids: Sequence[int]) -> list[Event]:
        # A model's vocabulary may be padded beyond the tokenizer's: nobody can read such a token.
        events, self._stream = self._stream.feed([id for id in ids if id < self._size])
        return events

    def close(self) -> list[Event]:
        return self._stream.close()

    def reply(self, events: Sequence[Event]) -> tuple[Message, list[tools.CallError]]:
        return tools.understand(collect(events), self._definitions)


class TextReader:
    """The text of a raw completion; its events are content, and the stop."""

    def __init__(self, tokenizer: Tokenizer):
        self._size, self._letters = tokenizer.vocab_size, tokenizer.stream()
        self._stops = {tokenizer.id_of(stop): stop for stop in STOP_TOKENS}

    def feed(self, ids: Sequence[int]) -> list[Event]:
        ends = [Event(Kind.STOP, self._stops[id]) for id in ids if id in self._stops]
        text, self._letters = self._letters.feed([id for id in ids if id < self._size and id not in self._stops])
        events = [Event(Kind.CONTENT, text)] if text else []
        return events + self.close() + ends if ends else events

    def close(self) -> list[Event]:
        rest, self._letters = self._letters.close(), self._letters.tokenizer.stream()
        return [Event(Kind.CONTENT, rest)] if rest else []

    def reply(self, events: Sequence[Event]) -> tuple[Message, list[tools.CallError]]:
        return {"role": "assistant", "content": collect(events).content}, []


class StoppedReader:
    """A reader that ends, too, where one of some strings has come in the content: with the token that completes it.

    Events are held back while they may be the beginning of such a string, and end before it.
    """

    def __init__(self, reader: ChatReader | TextReader, strings: Sequence[str]):
        self._reader, self._strings = reader, tuple(strings)
        self._pattern = re.compile("|".join(map(re.escape, strings)))
        self._held: Event | None = None
        self.events: list[Event] = []
        self.found: str | None = None  # the string that ended it

    def read(self, part: Completion) -> tuple[list[Event], Completion]:
        """The events of the next piece, and the piece up to its end."""
        if not self._strings:
            return self._kept(self._reader.feed(part.ids)), part
        read: list[Event] = []
        for n, id in enumerate(part.ids, start=1):
            read += self._visible(self._reader.feed([id]))
            if self.found is not None:
                part = Completion(part.ids[:n], part.logprobs[:n], part.versions[:n], StopReason.STOP)
                break
        return self._kept(read), part

    def close(self) -> list[Event]:
        """The events of what was held back."""
        return [] if self.found is not None else self._kept(self._visible(self._reader.close()) + self._release())

    def reply(self) -> tuple[Message, list[tools.CallError]]:
        """The message that all events amount to, and what is wrong with it. Raises ValueError as `tools.check`."""
        return self._reader.reply(self.events)

    def _kept(self, events: list[Event]) -> list[Event]:
        self.events += events
        return events

    def _visible(self, events: Sequence[Event]) -> list[Event]:
        shown: list[Event] = []
        for event in events:
            if event.kind is not Kind.CONTENT:
                shown += [*self._release(), event]
                continue
            text = (self._held.text if self._held else "") + event.text
            match = self._pattern.search(text) if self._strings else None
            cut = match.start() if match else self._unfinished(text)
            shown += [dataclasses.replace(event, text=text[:cut])] if cut else []
            self._held = dataclasses.replace(event, text=text[cut:]) if text[cut:] and not match else None
            if match:
                self.found = match[0]
                break
        return shown

    def _release(self) -> list[Event]:
        held, self._held = self._held, None
        return [held] if held else []

    def _unfinished(self, text: str) -> int:
        """Where the beginning of a string may stand at the end of the text; its length if there is none."""
        longest = max(map(len, self._strings), default=0)
        return next((start for start in range(max(0, len(text) - longest + 1), len(text))
                     if any(string.startswith(text[start:]) for string in self._strings)), len(text))
