"""A slot as the host knows it: whose row of the cache it is, and how much of it counts."""

import dataclasses
from typing import Hashable

import numpy as np

from glm5_jax.infer.request import Result, Sampling
from glm5_jax.records import Completion, StopReason

STOP_IDS = 8  # per request


@dataclasses.dataclass(eq=False)
class Request:
    """One that waits or runs. `ids` are all that were sent; the last `drawn` of them an earlier run had sampled."""

    id: int
    ids: np.ndarray
    sampling: Sampling
    session: Hashable | None
    drawn: int
    reused: int = 0
    new: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    model_logprobs: list[float] = dataclasses.field(default_factory=list)
    versions: list[int] = dataclasses.field(default_factory=list)

    @property
    def left(self) -> int:
        return self.sampling.max_new_tokens - self.drawn - len(self.new)

    def result(self, stop: StopReason, since: int = 0) -> Result:
        of = lambda values: tuple(values[since:])
        completion = Completion(of(self.new), of(self.logprobs), of(self.versions), stop)
        return Result(self.id, completion, of(self.model_logprobs), self.reused)


@dataclasses.dataclass
class Slot:
    """A row of the cache: its ids, `length` of them, of which the cache holds the first `held`.

    Once its request is gone the row stays with the session of the request until somebody else needs it.
    """

    ids: np.ndarray
    length: int = 0
    held: int = 0
    request: Request | None = None
    session: Hashable | None = None
    left_at: int = 0
    spoiled: bool = False
    cut_back: bool = False  # and nothing fed since

    @property
    def ready(self) -> bool:
        """Whether only the newest id is not in the cache yet: the next token can be drawn."""
        return self.request is not None and self.held == self.length - 1

    def reusable(self, request: Request) -> int:
        """How many of the request's first ids the row holds; the last id is always fed anew, for its logits."""
        if request.session is None or request.session != self.session:
            return 0
        count = min(self.held, len(request.ids) - 1)
        differ = np.flatnonzero(self.ids[:count] != request.ids[:count])
        return int(differ[0]) if len(differ) else count

    def take(self, request: Request, drafts: int) -> None:
        """A row that is cut back is fed its last `drafts` tokens anew, for the MTP layer to know them."""
        held = self.reusable(request)
        self.cut_back |= held < self.held
        self.held = request.reused = max(held - drafts, 0) if self.cut_back else held
        self.length = len(request.ids)
        self.ids[:self.length] = request.ids
        self.request, self.session = request, request.session

    def leave(self, now: int) -> None:
        self.request, self.left_at = None, now

    def row(self) -> tuple:
        """The fields of `slots.Rows`; a slot that is not ready has no room."""
        if self.request is None or not self.ready:
            return (0,) * 8 + ((-1,) * STOP_IDS,)
        request, sampling = self.request, self.request.sampling
        stop_ids = sampling.stop_ids + (-1,) * (STOP_IDS - len(sampling.stop_ids))
        return (self.held, int(self.ids[self.held]), request.drawn + len(request.new), request.left,
                sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed, stop_ids)
