"""The three ways to think over many turns, and the check that a prompt continues what was sampled before it.

Interleaved: a thought stands before every answer and every call, and those of one user turn stay in its prompts.
Preserved: those of earlier user turns stay too. Turn-level: each turn is asked with or without a thought.

Prompt n + 1 should continue prompt n + completion n token by token: then caches stay warm, and one trajectory trains as
one sequence. Within a user turn it does, and with preserved thoughts across user turns as well. Where it does not,
`extend` says why; the sampled ids stay the truth, and the trainer begins a new sequence.
"""

import dataclasses
import enum
from typing import Any, Sequence

from glm5_jax.text.tokenizer import EOS, Tokenizer


@dataclasses.dataclass(frozen=True)
class Thinking:
    """How a conversation thinks: `chat.render(messages, **INTERLEAVED.options(think=True))`."""

    preserved: bool  # keep the reasoning of earlier user turns in the prompt

    def options(self, *, think: bool = True) -> dict[str, bool]:
        """The arguments of `chat.render` and `mask.encode`; `think` is the turn-level switch of the next completion."""
        return {"enable_thinking": think, "clear_thinking": not self.preserved}


INTERLEAVED = Thinking(preserved=False)
PRESERVED = Thinking(preserved=True)


class Cause(enum.Enum):
    """Why a prompt does not continue the tokens before it."""

    THOUGHT_CLEARED = "the reasoning of an earlier turn is left out: preserve it, or begin a new sequence"
    THOUGHT_ADDED = "reasoning that was left out before is shown: render a conversation in one mode throughout"
    EMPTY_THOUGHT = "an empty thought is left out: return reasoning_content as `reading.EMPTY_THOUGHT`"
    WHITE_SPACE = "white space differs: the format strips it around reasoning and content"
    STOP = "the completion ended with <|endoftext|>, which the format does not keep"
    SHORTER = "the prompt ends before the tokens it should continue"
    TOKENS = "the same text in other tokens: the completion was not sampled as the tokenizer cuts it"
    TEXT = "the text differs: messages were edited, or the completion was not in the format"


@dataclasses.dataclass(frozen=True)
class Extension:
    """The next prompt continues the history."""

    added: tuple[int, ...]  # what it adds: observations or a user's message, and the generation prompt


@dataclasses.dataclass(frozen=True)
class Break:
    """The next prompt departs from the history."""

    position: int      # index of the first token that differs
    in_prompt: bool    # whether that token belongs to the prompt, not to the completion
    cause: Cause
    expected: str      # how the history goes on there
    found: str         # how the next prompt goes on there


def extend(
    tokenizer: Tokenizer, prompt: Sequence[int], completion: Sequence[int], next_prompt: Sequence[int],
) -> Extension | Break:
    """Whether `next_prompt` continues `prompt` + `completion` (token ids), and if not, where and why it departs."""
    history = [*prompt, *completion]
    position = _agreement(history, next_prompt)
    if position == len(history):
        return Extension(tuple(next_prompt[position:]))
    return Break(
        position=position,
        in_prompt=position < len(prompt),
        cause=_cause(tokenizer, history, list(next_prompt), position),
        expected=tokenizer.decode(history[position:position + 16]),
        found=tokenizer.decode(next_prompt[position:position + 16]),
    )


def _cause(tokenizer: Tokenizer, history: list[int], prompt: list[int], position: int) -> Cause:
    if history[position] == tokenizer.id_of(EOS):
        return Cause.STOP
    if position == len(prompt):
        return Cause.SHORTER
    opened, closed = tokenizer.id_of("<think>"), tokenizer.id_of("</think>")
    match history[position], prompt[position]:
        case (a, b) if (a, b) == (opened, closed):
            return Cause.EMPTY_THOUGHT if history[position + 1:position + 2] == [closed] else Cause.THOUGHT_CLEARED
        case (a, b) if (a, b) == (closed, opened):
            return Cause.THOUGHT_ADDED
    text, other = tokenizer.decode(history[position:]), tokenizer.decode(prompt[position:])
    if other.startswith(text):
        return Cause.TOKENS
    first = _agreement(text, other)
    return Cause.WHITE_SPACE if text[first].isspace() or other[first:first + 1].isspace() else Cause.TEXT


def _agreement(left: Sequence[Any], right: Sequence[Any]) -> int:
    """How many items the two have in common at their beginning."""
    pairs = enumerate(zip(left, right))
    return next((index for index, (a, b) in pairs if a != b), min(len(left), len(right)))
