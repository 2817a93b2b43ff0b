"""Which engine serves which session: always the same one, as long as it lives and is not far busier than the others.

Rendezvous hashing: of all engines a session prefers the one whose name and its own hash highest together, so that an
engine that leaves takes only its own sessions along, and one that joins takes only what will prefer it. An engine that
holds `slack` times its even share takes no further session; the next preferred one does.
"""

import hashlib
import math
from collections.abc import Iterable


class Affinity:
    """Sessions of engines, by name. Not for several threads."""

    def __init__(self, engines: Iterable[str], *, slack: float = 1.25):
        if not slack >= 1:
            raise ValueError(f"slack: expected at least 1, found {slack}")
        self.slack = slack
        self._sessions: dict[str, set[str]] = {engine: set() for engine in engines}
        self._engine_of: dict[str, str] = {}

    @property
    def loads(self) -> dict[str, int]:
        """Sessions of each engine."""
        return {engine: len(sessions) for engine, sessions in self._sessions.items()}

    def route(self, session: str) -> str:
        """The engine of a session, the same at every call until it leaves. Raises LookupError where there is none."""
        if session in self._engine_of:
            return self._engine_of[session]
        if not self._sessions:
            raise LookupError(f"session {session!r}: expected an engine to route it to, found none; add one")
        most = math.ceil(self.slack * (len(self._engine_of) + 1) / len(self._sessions))
        engine = max((name for name, own in self._sessions.items() if len(own) < most),
                     key=lambda name: _hash(name, session))
        self._sessions[engine].add(session)
        self._engine_of[session] = engine
        return engine

    def release(self, session: str) -> None:
        """Forgets a session that has ended; one that is unknown is no error."""
        engine = self._engine_of.pop(session, None)
        if engine is not None:
            self._sessions[engine].remove(session)

    def add(self, engine: str) -> None:
        """Lets an engine take part; sessions stay where their caches are. Raises ValueError where it already does."""
        if engine in self._sessions:
            raise ValueError(f"engine {engine!r}: expected a new name")
        self._sessions[engine] = set()

    def remove(self, engine: str) -> set[str]:
        """Takes an engine out; returns its sessions, which the next `route` moves. Raises LookupError if unknown."""
        if engine not in self._sessions:
            raise LookupError(f"engine {engine!r}: expected one of {sorted(self._sessions)}")
        moved = self._sessions.pop(engine)
        for session in moved:
            del self._engine_of[session]
        return moved


def _hash(engine: str, session: str) -> bytes:
    """The same in every process and version of Python, which `hash` is not."""
    return hashlib.blake2b(f"{len(engine)}:{engine}{session}".encode(), digest_size=16).digest()
