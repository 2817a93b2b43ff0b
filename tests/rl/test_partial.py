"""What of a group is left, and what is played first."""

import pytest

from glm5_jax.records import Completion, Failure, Trajectory, Turn
from glm5_jax.rl.ledger import Ledger, Order
from glm5_jax.rl.partial import Flight, Queue
from glm5_jax.rl.schedule import Ticket


def rollout(id: str, end: str) -> Trajectory:
    completion = Completion((7,), (-0.5,), (0,), "abort" if end == "aborted" else "stop")
    turn = Turn([{"role": "user", "content": "?"}], {"role": "assistant", "content": ""}, (1,), completion)
    return Trajectory(id, "sums", 1, [turn], end, Failure("worker", "w") if end == "failed" else None)


def flight(number: int, size: int = 3, **ends: str) -> Flight:
    id = f"sums-{number}"
    return Flight.of(Order(id, "sums", 1, size, 0), Ticket(id, number, 0),
                     [rollout(f"{id}-{name[1:]}", end) for name, end in ends.items()])


def test_a_group_rollout_by_rollout(tmp_path):
    """As the ledger has it."""
    order = Order("sums-4", "sums", 1, 12, 0)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.dispatch(order)
        for id, end in (("sums-4-10", "done"), ("sums-4-2", "failed"), ("sums-4-0", "aborted"), ("sums-4-1", "done")):
            ledger.record(order.id, rollout(id, end))
        one = Flight.of(order, Ticket(order.id, 4, 0), ledger.trajectories(order.id))
        assert [ended.id for ended in one.ended] == ["sums-4-1", "sums-4-10", "sums-4-2"]
        assert one.partial == ("sums-4-0",) and not one.over
        assert one.missing == tuple(f"sums-4-{i}" for i in (3, 4, 5, 6, 7, 8, 9, 11))
        for id in one.partial + one.missing:
            ledger.record(order.id, rollout(id, "done"))
        full = Flight.of(order, Ticket(order.id, 4, 0), ledger.trajectories(order.id))
        assert full.over and full.ended == ledger.trajectories(order.id)  # which is the order that a batch has to have


def test_a_rollout_of_another_group():
    with pytest.raises(ValueError, match=r"group 'sums-1': expected the rollouts \['sums-1-0'\], found \['sums-2-0'\]"):
        Flight.of(Order("sums-1", "sums", 1, 1, 0), Ticket("sums-1", 1, 0), [rollout("sums-2-0", "done")])


def played(queue: Queue) -> list[str]:
    return [queue.next()[1] for _ in range(len(queue))]


def test_partial_rollouts_come_first_and_then_the_oldest():
    queue = Queue()
    for one in (flight(3, _1="aborted"), flight(1), flight(2, _0="done", _2="aborted")):
        queue.add(one)
    assert played(queue) == ["sums-2-2", "sums-3-1", "sums-1-0", "sums-1-1", "sums-1-2", "sums-2-1", "sums-3-0",
                             "sums-3-2"]
    with pytest.raises(IndexError):
        queue.next()


def test_a_rollout_waits_once_and_not_while_it_is_played():
    queue, one = Queue(), flight(1)
    queue.add(one, but=["sums-1-1"])
    queue.add(one, but=["sums-1-1"])
    assert list(queue) == ["sums-1-0", "sums-1-2"] and len(queue) == 2
    assert queue.next() == ("sums-1", "sums-1-0")
    queue.add(one, but=["sums-1-0", "sums-1-1"])
    assert played(queue) == ["sums-1-2"]


def test_a_group_that_is_called_back_waits_no_more():
    queue, one, two = Queue(), flight(1), flight(2)
    queue.add(one)
    queue.add(two)
    queue.remove("sums-1")
    queue.remove("sums-9")
    assert len(queue) == 3
    queue.add(flight(1, _0="aborted"))  # resumed
    assert played(queue)[:2] == ["sums-1-0", "sums-1-1"]
