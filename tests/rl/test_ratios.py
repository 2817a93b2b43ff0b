"""Invariant 19: shares of consumed groups converge to the ratios whatever the tasks do, and nobody starves."""

import random

import pytest

from glm5_jax.rl.ratios import Claim, RoundRobin


class World:
    """Tasks with a success rate, a duration in events, and a cap; groups end in the order of their dues."""

    def __init__(self, ratios, *, most=8, success=None, slow=None, stuck=()):
        self.ratios, self.most, self.stuck = ratios, most, set(stuck)
        self.success, self.slow = success or {}, slow or {}
        self.consumed, self.running, self.dispatched = ({name: 0 for name in ratios} for _ in range(3))
        self.round, self.flight, self.now, self.number = RoundRobin(), [], 0, 0

    def dispatch(self):
        total = sum(self.ratios.values())
        claims = {name: Claim(ratio / total, self.consumed[name] + self.running[name], self.running[name] < self.most)
                  for name, ratio in self.ratios.items()}
        name = self.round.next(self.number, claims)
        if name is None:
            return None
        self.number += 1
        self.running[name] += 1
        self.dispatched[name] += 1
        self.flight.append((self.now + self.slow.get(name, 1), self.number, name))
        return name

    def run(self, groups, seed=0, at_once=12):
        """Consumes so many groups, with `at_once` in flight."""
        rng, goal = random.Random(seed), sum(self.consumed.values()) + groups
        while sum(self.consumed.values()) < goal:
            while len(self.flight) < at_once and self.dispatch():
                pass
            due = min(one for one in self.flight if one[2] not in self.stuck)
            self.flight.remove(due)
            self.now = max(self.now, due[0])
            self.running[due[2]] -= 1
            self.consumed[due[2]] += rng.random() < self.success.get(due[2], 1.0)

    def shares(self):
        total = sum(self.consumed.values())
        return {name: count / total for name, count in self.consumed.items()}


RATIOS = {"math": 5, "code": 3, "search": 2}


@pytest.mark.parametrize("trouble", [
    {}, {"slow": {"search": 9}}, {"slow": {"math": 5, "code": 2}}, {"success": {"search": 0.5}},
    {"success": {"math": 0.6, "code": 0.8}}, {"success": {"search": 0.4}, "slow": {"code": 7}}])
def test_shares_converge(trouble):
    """Far closer than the multinomial law, whose standard deviation would be 0.011 here."""
    world = World(RATIOS, most=12, **trouble)
    world.run(2000)
    for name, share in world.shares().items():
        assert abs(share - RATIOS[name] / 10) <= 12 / 2000  # what is in flight


def test_plain_turns_would_not_converge():
    """The test above has power: by dispatches alone the task that fails falls behind."""
    world = World(RATIOS, success={"math": 0.5})
    world.round.next = lambda number, claims, own=world.round.next: own(0, claims)
    world.run(2000)
    assert world.shares()["math"] < 0.4


def test_a_stuck_task_cannot_starve_the_rest():
    world = World(RATIOS, most=8, stuck={"code"})
    world.run(1000, at_once=16)
    assert world.consumed["code"] == 0 and world.running["code"] == 8
    assert abs(world.consumed["math"] / world.consumed["search"] - 5 / 2) < 0.05


def test_a_task_that_always_fails_takes_at_most_half_and_its_own():
    world = World(RATIOS, success={"code": 0.0})
    world.run(1000)
    assert world.dispatched["code"] <= 0.5 * (1 + 0.3) * world.number + 1
    assert abs(world.consumed["math"] / world.consumed["search"] - 5 / 2) < 0.05


def test_a_task_that_comes_back_catches_up_and_the_others_go_on():
    world = World(RATIOS, stuck={"search"})
    world.run(1000)
    world.stuck.clear()
    before = dict(world.consumed)
    world.run(100)
    assert world.consumed["search"] - before["search"] > 40  # its share would be 20
    assert world.consumed["math"] - before["math"] >= 20
    world.run(900)
    assert abs(world.shares()["search"] - 0.2) < 0.01


def test_the_order_of_events_decides_alone():
    one, two = World(RATIOS, success={"math": 0.7}, slow={"code": 3}), World(RATIOS, success={"math": 0.7},
                                                                             slow={"code": 3})
    for world in (one, two):
        world.run(300, seed=5)
    assert one.dispatched == two.dispatched and one.consumed == two.consumed


def test_going_on_from_the_counts_alone_stays_on_course():
    """What a restart forgets smooths the rounds and nothing else."""
    world = World(RATIOS)
    for _ in range(40):
        world.run(25)
        world.round = RoundRobin()
    assert all(abs(share - RATIOS[name] / 10) < 0.02 for name, share in world.shares().items())


def test_without_room_there_is_nothing():
    assert RoundRobin().next(0, {}) is None
    assert RoundRobin().next(1, {"math": Claim(1.0, 0, False)}) is None
