"""What a long agent still sees: pure functions from a question and the rounds since to the messages of the next call.

A policy answers with a `View`. The episode sends `View.messages` and records that same tuple, and it keeps
`View.rounds` as the history of the next call, so that no message is sent that is not recorded. GLM-5, section 4.2.4.
"""

import dataclasses
from collections.abc import Callable, Sequence

from glm5_jax.records import Message

PLACEHOLDER = "Tool result is omitted to save tokens."
# The paper says 32k.
TOKENS = 32_768


@dataclasses.dataclass(frozen=True)
class Round:
    """One reply of the model, reasoning and calls included, and what the environment answered."""

    reply: Message
    observations: tuple[Message, ...]


@dataclasses.dataclass(frozen=True)
class View:
    """The messages to send, and the rounds to remember: unfolded ones, because what is folded changes every call."""

    messages: tuple[Message, ...]
    rounds: tuple[Round, ...]


Policy = Callable[[Sequence[Message], Sequence[Round]], View]
Count = Callable[[Sequence[Message]], int]


def keep_all(question: Sequence[Message], rounds: Sequence[Round]) -> View:
    """The whole history."""
    return View((*question, *(message for one in rounds for message in (one.reply, *one.observations))), tuple(rounds))


def keep_recent(question: Sequence[Message], rounds: Sequence[Round], *, k: int = 5) -> View:
    """The whole history, with the tool results of all but the last `k` rounds replaced by `PLACEHOLDER`.

    Replies stay whole, and so does what a user said. Raises ValueError if `k` is negative.
    """
    if k < 0:
        raise ValueError(f"k: expected 0 rounds or more to keep, found {k}")
    folded = [dataclasses.replace(one, observations=tuple(map(_fold, one.observations)))
              for one in rounds[:max(len(rounds) - k, 0)]]
    return View(keep_all(question, [*folded, *rounds[len(folded):]]).messages, tuple(rounds))


def discard_all(question: Sequence[Message], rounds: Sequence[Round], *, count: Count, limit: int = TOKENS) -> View:
    """The whole history, or the question alone once the history has more than `limit` tokens by `count`."""
    return _restart_past(limit, count, question, keep_all(question, rounds))


def hierarchical(question: Sequence[Message], rounds: Sequence[Round], *, count: Count, k: int = 5,
                 limit: int = TOKENS) -> View:
    """`keep_recent`, or the question alone once that has more than `limit` tokens by `count`."""
    return _restart_past(limit, count, question, keep_recent(question, rounds, k=k))


def _fold(message: Message) -> Message:
    return {**message, "content": PLACEHOLDER} if message["role"] == "tool" else message


def _restart_past(limit: int, count: Count, question: Sequence[Message], view: View) -> View:
    return View(tuple(question), ()) if count(view.messages) > limit else view
