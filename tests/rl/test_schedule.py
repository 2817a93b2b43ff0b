"""Each scheduler on views made by hand."""

import collections

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm5_jax.rl.schedule import Adaptive, April, Async, OneStepOff, Sync, Ticket, View


def tickets(*versions: int, first: int = 0) -> tuple[Ticket, ...]:
    return tuple(Ticket(f"g{first + i}", first + i, version) for i, version in enumerate(versions))


def view(version: int = 0, *, training: bool = False, running=(), done=(), dispatched: int | None = None,
         held: int = 0, idle=()) -> View:
    return View(version, training, len(running) + len(done) if dispatched is None else dispatched, tuple(running),
                tuple(done), held, idle)


def test_sync_waits_for_all_and_then_for_the_trainer():
    sync, two = Sync(2), tickets(0, 0)
    assert sync.admit(view()) == 2
    assert sync.admit(view(running=two)) == sync.admit(view(running=two[:1], done=two[1:])) == 0
    assert sync.batch(view(running=two[:1], done=two[1:])) == ()
    assert sync.batch(view(done=two)) == two and sync.batch(view(done=two, training=True)) == ()
    assert sync.admit(view(training=True)) == 0
    assert sync.admit(view(1, dispatched=2)) == 2
    assert sync.admit(view(done=two[:1])) == 1  # the other one was dropped


def test_one_step_off_is_one_batch_ahead():
    ahead = OneStepOff(2)
    assert ahead.admit(view()) == 2 and ahead.admit(view(running=tickets(0, 0))) == 0
    assert ahead.admit(view(training=True, dispatched=2)) == 2
    assert ahead.admit(view(1, dispatched=4)) == 0  # of weights 1: only once the batch of weights 0 is in training
    assert ahead.admit(view(1, training=True, dispatched=4)) == 2
    assert ahead.drains


def test_april_starts_more_and_resumes_what_it_called_back():
    april, four = April(2, 2.0), tickets(0, 0, 0, 0)
    assert april.admit(view()) == 4 and april.admit(view(1, held=3, dispatched=6)) == 1
    assert april.admit(view(1, held=5, dispatched=8)) == 0
    # Two ended at once: the one that is left over counts, and the round goes on.
    assert april.admit(view(1, done=tickets(0), held=2, dispatched=6)) == 1
    assert april.batch(view(running=four[:3], done=four[3:])) == ()
    assert april.batch(view(running=four[:1], done=four[1:])) == four[1:3] and april.calls_back


def test_async_admits_what_the_bound_allows():
    for bound in range(3):
        assert Async(2, bound).admit(view()) == 2 * (bound + 1)
        assert Async(2, bound).admit(view(3, dispatched=7, training=True)) == 2 * (bound + 4) - 7
    assert Async(2, 1).admit(view(dispatched=9)) == 0


def test_fifo_takes_what_is_done_first():
    done = tickets(0, 1, 0)
    assert Async(2, 1, "fifo").batch(view(5, done=done)) == done[:2]


def test_wait_takes_the_oldest_and_waits_for_what_would_be_too_old():
    wait, old = Async(2, 1), tickets(0, 0)
    new = tickets(1, 1, first=2)
    assert wait.batch(view(0, running=old[:1], done=(new[0], old[1]))) == (old[1], new[0])
    assert wait.batch(view(1, running=old[:1], done=(old[1], new[0]))) == ()  # at version 2 it would be two steps old
    assert wait.batch(view(1, running=new[1:], done=(new[0], *reversed(old)))) == old
    assert wait.expired(view(9, running=old)) == ()
    late = tickets(6, 6, 7, 7)  # of a time when the bound was higher
    assert wait.batch(view(10, done=late)) == late[:2] and wait.batch(view(10, done=late, running=late[3:])) == ()
    # Neither is too old yet, but of three groups of version 0 only two fit into the last step that may take them.
    three = tickets(0, 0, 0)
    assert wait.batch(view(0, running=three, done=tickets(0, 0, first=3))) == ()
    assert wait.batch(view(0, running=three[:2], done=tickets(0, 0, first=3))) == tickets(0, 0, first=3)


def test_drop_gives_up_what_is_too_old_and_no_more():
    drop, running, done = Async(1, 1, "drop"), tickets(0, 1), tickets(0, 2, first=2)
    assert drop.expired(view(1, running=running, done=done)) == ()
    assert drop.expired(view(2, running=running, done=done)) == (running[0], done[0])


@pytest.mark.parametrize("make, message", [
    (lambda: Sync(0), "groups: expected at least 1, found 0"),
    (lambda: April(2, 0.5), "over: expected at least 1, found 0.5"),
    (lambda: Async(2, -1), "bound: expected 0 or more, found -1"),
    (lambda: Adaptive(2, low=3, high=2), "high: expected at least low, 3, found 2"),
    (lambda: Adaptive(2, idle=1.0), "idle: expected 0 or more and below 1, found 1.0"),
    (lambda: Adaptive(2, every=0), "every: expected at least 1, found 0"),
    (lambda: Async(2, 1, "lifo"), "order: expected one of fifo, wait, drop, found 'lifo'"),
])
def test_schedulers_that_make_no_sense(make, message):
    with pytest.raises(ValueError, match=message):
        make()


ADAPTIVE = Adaptive(2, low=1, high=5, idle=0.05, gain=0.02, every=4, memory=6)


def follow(share, steps: int, scheduler: Adaptive = ADAPTIVE) -> list[int]:
    """The bound after each step of a trainer that waits for `share(bound)` of its time."""
    idle, bounds = (), []
    for _ in range(steps):
        bounds.append(scheduler.bound(View(len(idle), False, 0, (), (), idle=idle)))
        idle += (share(bounds[-1]),)
    return bounds


@given(idle=st.lists(st.floats(0, 1), max_size=200), every=st.integers(1, 7), memory=st.integers(1, 9),
       low=st.integers(0, 3), span=st.integers(0, 4))
def test_the_adaptive_bound_keeps_its_limits_and_moves_by_one(idle, every, memory, low, span):
    scheduler = Adaptive(2, low=low, high=low + span, every=every, memory=memory)
    bounds = [scheduler.bound(view(idle=tuple(idle[:count]))) for count in range(len(idle) + 1)]
    assert bounds[0] == low and all(low <= bound <= low + span for bound in bounds)
    for count, (before, after) in enumerate(zip(bounds, bounds[1:]), 1):
        assert abs(after - before) <= (count % every == 0)
    assert bounds[-1] == scheduler.bound(view(7, training=True, dispatched=30, idle=tuple(idle)))  # of nothing else


def test_the_adaptive_bound_is_as_low_as_throughput_allows():
    assert set(follow(lambda bound: 0.0, 200)) == {1}  # the trainer never waits
    late = follow(lambda bound: max(0.0, 0.6 - 0.2 * bound), 400)[40:]
    assert collections.Counter(late).most_common(1)[0][0] == 3 and max(late) == 3  # nothing is saved beyond 3
    alone = collections.Counter(follow(lambda bound: 0.5, 400))  # the engines are too slow, at any bound
    assert alone[1] > 300 and set(alone) == {1, 2}
    high = collections.Counter(follow(lambda bound: 1 - 0.1 * bound, 400)[40:])
    assert high[5] > 250 and set(high) <= {4, 5}


def test_the_adaptive_bound_forgets_what_it_knew():
    """When the work changes, so does the bound."""
    shares = iter([lambda bound: max(0.0, 0.6 - 0.2 * bound)] * 100 + [lambda bound: 0.0] * 100 +
                  [lambda bound: max(0.0, 0.6 - 0.2 * bound)] * 100)
    bounds = follow(lambda bound: next(shares)(bound), 300)
    assert bounds[90] == 3 and bounds[190] == 1 and bounds[290] == 3


def test_adaptive_admits_by_its_bound_and_consumes_by_the_highest():
    grown = view(8, dispatched=0, idle=(0.5,) * 4)
    assert (ADAPTIVE.bound(view()), ADAPTIVE.bound(grown)) == (1, 2)
    assert ADAPTIVE.admit(grown) == 2 * (2 + 8 + 1) and ADAPTIVE.admit(view(8, dispatched=18)) == 2
    old, new = tickets(0, 0), tickets(4, 4, first=2)
    assert ADAPTIVE.batch(view(4, running=old, done=new)) == new  # as Async(2, 5): these may still wait
    assert ADAPTIVE.batch(view(5, running=old, done=new)) == ()
    assert ADAPTIVE.expired(view(99, running=old)) == () and not ADAPTIVE.drains


@given(data=st.data())
def test_adaptive_between_equal_limits_is_async(data):
    bound = data.draw(st.integers(0, 3))
    running, done = (tickets(*sorted(data.draw(st.lists(st.integers(0, 6), max_size=6))), first=first)
                     for first in (0, 10))
    one = view(data.draw(st.integers(0, 8)), training=data.draw(st.booleans()), running=running, done=done,
               idle=tuple(data.draw(st.lists(st.floats(0, 1), max_size=30))))
    adaptive, fixed = Adaptive(2, low=bound, high=bound, every=2), Async(2, bound)
    for question in ("expired", "batch", "admit"):
        assert getattr(adaptive, question)(one) == getattr(fixed, question)(one)
