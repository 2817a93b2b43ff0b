"""Who is alive: members are asked at every beat, are out after some misses in a row, and in again once they answer."""

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Iterable


@dataclasses.dataclass(frozen=True)
class Pace:
    """How often members are asked, and with how much patience."""

    every_s: float = 10.0  # between the beats
    wait_s: float = 5.0  # for an answer
    missed: int = 3  # in a row, and the member is lost


class Heartbeat:
    """Asks members by name. One that misses too many beats is `lost`; the first answer after that makes it `back`. A
    miss is an answer that is late, or an exception; `back` may take its time, or refuse by an exception and be told
    again at the next beat. Nobody waits for anybody else."""

    def __init__(self, ask: Callable[[str], Awaitable[object]], pace: Pace, *, lost: Callable[[str], None],
                 back: Callable[[str], Awaitable[None]]):
        self._ask, self._pace, self._lost, self._back = ask, pace, lost, back
        self._misses: dict[str, int] = {}
        self._asked: set[str] = set()

    async def run(self, members: Callable[[], tuple[Iterable[str], Iterable[str]]]) -> None:
        """Beats until it is cancelled; `members` gives those inside and outside."""
        async with asyncio.TaskGroup() as group:
            while True:
                await asyncio.sleep(self._pace.every_s)
                for outside, names in enumerate(members()):
                    for name in sorted(set(names) - self._asked):
                        self._asked.add(name)
                        group.create_task(self._listen(name, bool(outside)))

    async def _listen(self, name: str, outside: bool) -> None:
        try:
            async with asyncio.timeout(self._pace.wait_s):
                await self._ask(name)
            self._misses.pop(name, None)
            if outside:
                await self._back(name)
        except Exception:
            self._misses[name] = self._misses.get(name, 0) + 1
            if not outside and self._misses[name] >= self._pace.missed:
                self._lost(name)
        finally:
            self._asked.discard(name)
