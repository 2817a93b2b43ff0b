"""What draws tokens, as the gateway sees it, and the ways in which a call can fail to be served."""

import dataclasses
from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from glm5_jax.infer.request import Sampling
from glm5_jax.records import Completion


class Overloaded(RuntimeError):
    """There is no room for another call now; it may be tried again."""


class EngineLost(RuntimeError):
    """What drew the tokens failed under the call; it may be tried again, from the tokens that had come."""


class Closed(RuntimeError):
    """A call of something that has been closed."""


class UnknownSession(LookupError):
    """A session that was never opened, or has been closed."""


@dataclasses.dataclass(frozen=True)
class Totals:
    """What engines have done since they began, added up over them."""

    seconds: float = 0.0
    busy: float = 0.0  # seconds in which they drew or read
    drawn: int = 0  # tokens
    fed: int = 0  # tokens of prompts, through the model
    reused: int = 0  # tokens of prompts, found in a cache
    again: int = 0  # tokens fed once more because the weights had changed

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(*(x + y for x, y in zip(dataclasses.astuple(self), dataclasses.astuple(other))))


class Generator(Protocol):
    """An engine, or many behind one door."""

    max_len: int  # tokens of a whole context, prompt and completion

    def stream(self, ids: Sequence[int], sampling: Sampling, *, session: str,
               drawn: int = 0) -> AsyncGenerator[Completion, None]:
        """Pieces of the completion of `ids` as they are drawn; one may be empty.

        Every piece but the last has the stop ABORT, and their sum is the whole. The last `drawn` of the ids were
        sampled before the request was called back, and count as its first tokens. Closing the generator, or cancelling
        who waits for it, calls the request back and frees its slot.

        Raises RequestTooLong or ValueError for what can never run and Overloaded for what cannot run now, both before
        the first piece; EngineLost at any time; Closed.
        """
        ...

    def abort(self, session: str) -> None:
        """Calls the running streams of a session back: each ends with what it has, its last piece with stop ABORT."""
        ...

    def release(self, session: str) -> None:
        """No more of this session is to come: what is kept for it may go."""
        ...
