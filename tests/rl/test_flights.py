"""Groups in flight apart from the loop: the moments that a schedule seldom meets."""

import asyncio

import pytest

from glm5_jax.records import Completion, EndReason, Trajectory, Turn
from glm5_jax.rl.flights import Flights
from glm5_jax.rl.ledger import Ledger, Order
from glm5_jax.rl.partial import Flight
from glm5_jax.rl.report import Played
from glm5_jax.rl.schedule import Ticket
from tests.rl import harness


def rollout(order, id, count):
    """With so many tokens; ten are the whole."""
    over = count == 10
    completion = Completion([7] * count, [-0.5] * count, [1] * count, "stop" if over else "abort")
    turn = Turn([{"role": "user", "content": "?"}], {"role": "assistant", "content": ""}, (1,), completion)
    return Trajectory(id, order.task, order.seed, [turn] if count else [], "done" if over else "aborted")


class Slow:
    """Each rollout takes ten seconds, or ends when it is called back, with one token for each second."""

    def __init__(self):
        self.begun, self.told, self.recalled = [], [], set()

    async def play(self, order, id, so_far):
        self.begun.append(id)
        count = len(so_far.turns[0].completion.ids) if so_far else 0
        while count < 10 and id not in self.recalled:
            await asyncio.sleep(1)
            count += 1
        self.recalled.discard(id)
        return rollout(order, id, count)

    def call_back(self, ids):
        self.recalled |= set(ids) & set(self.begun)

    def played(self, group, task):
        self.told.append((group, task))

    def ended(self, group, task, consumed):
        self.told.append((group, task, consumed))


@pytest.fixture
def ledger(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as found:
        yield found


def in_flight(ledger, number, size=2):
    order = Order(f"sums-{number}", "sums", number, size, 1)
    ledger.dispatch(order)
    return Flight.of(order, Ticket(order.id, number, 0))


def go(ledger, scenario, at_once=3):
    """Runs `scenario(flights, players)`, then stops the flights."""
    players = Slow()

    async def main():
        flights = Flights(ledger, players, at_once, {1: 0}, asyncio.Event())
        await scenario(flights)
        await flights.stop()
        assert flights.playing == 0
        return asyncio.get_running_loop().time()

    return players, harness.run(main)


async def seconds(flights, count):
    await asyncio.sleep(count)
    flights.collect()
    flights.start()


def test_what_is_called_back_before_it_began_does_not_begin(ledger):
    async def scenario(flights):
        flights.enter(in_flight(ledger, 0))
        flights.start()
        flights.hold()
        await seconds(flights, 0.5)
        assert flights.playing == 0 and flights.held == 1

    players, now = go(ledger, scenario)
    assert players.begun == [] and now == 0.5
    assert ledger.trajectories("sums-0") == ()


def test_what_is_resumed_before_its_end_is_known_is_played(ledger):
    async def scenario(flights):
        flights.enter(in_flight(ledger, 0))
        flights.start()
        flights.hold()
        flights.resume(version=0)
        await seconds(flights, 0.5)
        assert flights.playing == 2
        await seconds(flights, 10.5)
        assert [one.id for one in flights.done] == ["sums-0"]

    players, _ = go(ledger, scenario)
    assert sorted(players.begun) == ["sums-0-0", "sums-0-1"]


def test_what_is_resumed_while_it_still_ends_is_played_on(ledger):
    async def scenario(flights):
        flights.enter(in_flight(ledger, 0))
        flights.start()
        await asyncio.sleep(3.5)
        flights.hold()
        flights.resume(version=0)
        flights.start()
        assert flights.queued == 0 and flights.playing == 2  # each is played once
        await seconds(flights, 1)
        assert [len(one.turns[0].completion.ids) for one in ledger.trajectories("sums-0")] == [4, 4]
        assert flights.playing == 2
        await seconds(flights, 7)
        assert [one.id for one in flights.done] == ["sums-0"] and len(flights) == 1

    players, _ = go(ledger, scenario)
    assert sorted(players.begun) == ["sums-0-0", "sums-0-0", "sums-0-1", "sums-0-1"]
    assert all(len(one.turns[0].completion.ids) == 10 for one in ledger.trajectories("sums-0"))


def test_the_time_of_a_rollout_is_that_of_its_being_played(ledger):
    """Not that of its being called back, nor, like its tokens, that before a restart."""
    async def scenario(flights):
        one = in_flight(ledger, 0)
        before = rollout(one.order, "sums-0-1", 6)
        ledger.record(one.order.id, before)
        flights.enter(Flight.of(one.order, one.ticket, [before]))
        flights.start()
        await asyncio.sleep(2.5)
        flights.hold()
        await seconds(flights, 20)
        flights.resume(version=0)
        flights.start()
        await seconds(flights, 20)
        flights.take(1, flights.done)
        assert flights.since.played == {"sums-0-0": Played(10, 10.0), "sums-0-1": Played(4, 4.0)}

    go(ledger, scenario)


def test_a_group_that_is_given_up_ends_its_rollouts_and_counts_their_tokens(ledger):
    async def scenario(flights):
        one = in_flight(ledger, 0)
        flights.enter(one)
        flights.start()
        await asyncio.sleep(2.5)
        flights.give_up(one.ticket, "stale", "of long ago")
        assert len(flights) == 0 and flights.playing == 2
        await seconds(flights, 2)
        assert flights.playing == 0 and flights.since.discarded == 6 and flights.since.dropped == {"stale": 1}

    players, _ = go(ledger, scenario)
    assert players.told == [("sums-0", "sums", False)] and ledger.balance().dropped == {"stale": 1}


def test_tokens_of_a_group_that_is_given_up_count_whatever_became_of_them(ledger):
    """One rollout has ended, one is partial and waits, one is partial and played on, one was not begun."""
    async def scenario(flights):
        order = Order("sums-0", "sums", 0, 4, 1)
        ledger.dispatch(order)
        recorded = [rollout(order, "sums-0-0", 10), rollout(order, "sums-0-1", 5), rollout(order, "sums-0-2", 3)]
        for one in recorded:
            ledger.record(order.id, one)
        flight = Flight.of(order, Ticket(order.id, 0, 0), recorded)
        flights.enter(flight)
        flights.start()
        assert (flights.playing, flights.queued) == (1, 2)
        await asyncio.sleep(1.5)
        flights.give_up(flight.ticket, "stale", "of long ago")
        assert flights.since.discarded == 10 + 3
        await seconds(flights, 1)
        assert flights.playing == 0 and flights.since.discarded == 10 + 3 + 7

    go(ledger, scenario, at_once=1)


def test_a_full_disk_ends_it_where_rollouts_end_together(ledger, monkeypatch):
    """What is left of those that have ended is entered, and nobody waits for them."""
    def full(*_):
        monkeypatch.undo()
        raise OSError("no space left on device")

    async def scenario(flights):
        flights.enter(in_flight(ledger, 0))
        flights.start()
        await asyncio.sleep(10.5)
        flights._changed.clear()  # as the loop does
        monkeypatch.setattr(ledger, "record", full)
        with pytest.raises(OSError, match="no space left"):
            flights.collect()
        assert flights.playing == 1

    go(ledger, scenario)
    assert [one.end for one in ledger.trajectories("sums-0")] == [EndReason.DONE]


def test_no_more_rollouts_at_once_than_there_is_room_for(ledger):
    async def scenario(flights):
        for number in range(3):
            flights.enter(in_flight(ledger, number))
        flights.start()
        assert (flights.playing, flights.queued) == (3, 3)
        await seconds(flights, 10.5)
        assert [one.id for one in flights.done] == ["sums-0"] and (flights.playing, flights.queued) == (3, 0)
        await seconds(flights, 2.5)

    go(ledger, scenario)
    assert {one.end for number in (1, 2) for one in ledger.trajectories(f"sums-{number}")} == {
        EndReason.DONE, EndReason.ABORTED}  # and what they had when all stopped is kept


def test_groups_of_later_versions_wait(ledger):
    async def scenario(flights):
        one = in_flight(ledger, 0)
        later = Flight.of(one.order, Ticket("sums-0", 0, version=2))
        flights.enter(later, hold=True)
        flights.resume(version=1)
        assert flights.held == 1 and flights.queued == 0
        flights.resume(version=2)
        assert flights.held == 0 and flights.queued == 2

    go(ledger, scenario)


def test_a_batch_is_in_order_of_dispatch(ledger):
    async def scenario(flights):
        two = [in_flight(ledger, number, size=1) for number in range(2)]
        for one in reversed(two):
            flights.enter(one)
        flights.start()
        await seconds(flights, 10.5)
        assert {one.id for one in flights.done} == {"sums-0", "sums-1"}
        assert [group.id for group in flights.take(1, flights.done[::-1])] == ["sums-0", "sums-1"]
        assert len(flights) == 0

    players, _ = go(ledger, scenario)
    assert players.told[-2:] == [("sums-0", "sums", True), ("sums-1", "sums", True)]
    assert set(players.told[:-2]) == {("sums-0", "sums"), ("sums-1", "sums")}
    assert [group.id for group in ledger.batch(1)] == ["sums-0", "sums-1"]
