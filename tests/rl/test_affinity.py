"""Invariant 11: one engine per session, balanced, and little moves when engines come and go."""

import math
import random
import subprocess
import sys

import pytest

from glm5_jax.rl.affinity import Affinity

ENGINES = [f"engine-{i}" for i in range(8)]
SESSIONS = [f"session-{i}" for i in range(4000)]


def routed(affinity: Affinity) -> dict[str, str]:
    return {session: affinity.route(session) for session in SESSIONS}


def test_a_session_stays_where_it_is():
    affinity = Affinity(ENGINES)
    first = routed(affinity)
    assert routed(affinity) == first and sum(affinity.loads.values()) == len(SESSIONS)


def test_no_engine_is_far_busier_than_the_others():
    for slack in (1.0, 1.25):
        affinity = Affinity(ENGINES, slack=slack)
        for count, session in enumerate(SESSIONS, 1):
            affinity.route(session)
            assert max(affinity.loads.values()) <= math.ceil(slack * count / len(ENGINES))


@pytest.mark.parametrize("slack", [1.25, 100.0])
def test_an_engine_that_leaves_moves_its_own_sessions_alone(slack):
    affinity = Affinity(ENGINES, slack=slack)
    before = routed(affinity)
    gone = affinity.remove("engine-3")
    assert gone == {session for session, engine in before.items() if engine == "engine-3"}
    after = routed(affinity)
    assert {session for session in SESSIONS if before[session] != after[session]} == gone
    assert 0.08 < len(gone) / len(SESSIONS) < 0.17  # about one of eight


def test_preferences_change_by_one_in_n_when_a_fleet_is_built_anew():
    """Without the bound on load the choice is of the names alone."""
    before, after = (routed(Affinity(names, slack=100.0)) for names in (ENGINES, [*ENGINES, "engine-8"]))
    moved = [session for session in SESSIONS if before[session] != after[session]]
    assert all(after[session] == "engine-8" for session in moved) and 0.07 < len(moved) / len(SESSIONS) < 0.15


def test_sessions_end_and_engines_join():
    affinity, rng, live = Affinity(ENGINES[:2]), random.Random(0), set()
    affinity.add("engine-9")
    for number in range(2000):
        if live and rng.random() < 0.5:
            live.remove(session := rng.choice(sorted(live)))
            affinity.release(session)
        else:
            live.add(session := f"s{number}")
            affinity.route(session)
        assert sum(affinity.loads.values()) == len(live)
    affinity.release("never seen")
    assert affinity.loads["engine-9"] > 0


def test_the_choice_is_the_same_in_every_process():
    code = ("from glm5_jax.rl.affinity import Affinity\n"
            "affinity = Affinity([f'engine-{i}' for i in range(8)], slack=100.0)\n"
            "print(*(affinity.route(f'session-{i}') for i in range(50)))")
    here = [Affinity(ENGINES, slack=100.0).route(session) for session in SESSIONS[:50]]
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert there == here


def test_what_makes_no_sense():
    with pytest.raises(ValueError, match="slack: expected at least 1, found 0.5"):
        Affinity(ENGINES, slack=0.5)
    with pytest.raises(LookupError, match="session 'a': expected an engine to route it to, found none"):
        Affinity([]).route("a")
    with pytest.raises(ValueError, match="engine 'engine-0': expected a new name"):
        Affinity(ENGINES).add("engine-0")
    with pytest.raises(LookupError, match=r"engine 'x': expected one of \['a'\]"):
        Affinity(["a"]).remove("x")
