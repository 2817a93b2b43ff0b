"""Of which task the next group is: weighted deficit round-robin over what is consumed.

Every second group makes up for what a task lacks of its share of the consumed groups, those in flight counted as if
they were: drops and delays are made good, and shares converge to the ratios. The groups between go round by ratio
alone, so that a task whose groups are all dropped, or one that comes back after a long time, takes those and its own
share of these at most.
"""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Claim:
    """What a task is to get, what it has, and whether it may have more now."""

    ratio: float
    has: int  # groups consumed or in flight
    room: bool


class RoundRobin:
    """The order of events decides alone; what is kept from call to call only smooths the rounds."""

    def __init__(self) -> None:
        self._credits: dict[str, float] = {}

    def next(self, number: int, claims: Mapping[str, Claim]) -> str | None:
        """The task of group `number`; None where none has room. Of equals the first takes it."""
        open_ones = {name: claim for name, claim in claims.items() if claim.room}
        if not open_ones:
            return None
        if number % 2:
            return min(open_ones, key=lambda name: (open_ones[name].has + 1) / open_ones[name].ratio)
        # Only those with room earn credit: who was away for long has not saved any up.
        credits = {name: self._credits.get(name, 0.0) + claim.ratio for name, claim in open_ones.items()}
        chosen = max(credits, key=lambda name: credits[name])
        credits[chosen] -= sum(claim.ratio for claim in open_ones.values())
        self._credits |= credits
        return chosen
