"""The ledger against a plain model of it, its refusals, its file, and processes killed while they write."""

import dataclasses
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading

import pytest

from glm5_jax.records import Completion, Failure, Group, PolicyVersion, Trajectory, Turn
from glm5_jax.rl.ledger import MIGRATIONS, Balance, Ledger, LedgerError, Order


def rollout(name: str, end: str = "done", *, tokens: int = 2, task: str = "sums", seed: int = 1) -> Trajectory:
    stop = "abort" if end == "aborted" else "stop"
    completion = Completion(range(tokens), [-0.5] * tokens, sorted(i // 2 for i in range(tokens)), stop)
    turn = Turn([{"role": "user", "content": "1 + 1?"}], {"role": "assistant", "content": "2"}, prompt=(5, 6),
                completion=completion, reward=float(end == "done"))
    failure = Failure("worker", "w3") if end == "failed" else None
    return Trajectory(name, task, seed, [turn], end, failure)


def order(name: str, size: int = 2) -> Order:
    return Order(name, "sums", 1, size, 0)


def complete(ledger: Ledger, name: str, size: int = 2) -> Group:
    """A dispatched group whose rollouts are done."""
    ledger.dispatch(order(name, size))
    for i in range(size):
        ledger.record(name, rollout(f"{name}-{i}"))
    return Group(name, size, ledger.trajectories(name))


@pytest.fixture
def ledger(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as found:
        yield found


def test_a_group_from_dispatch_to_consumption(ledger):
    group = complete(ledger, "a")
    assert ledger.in_flight() == [order("a")]
    ledger.consume(1, [group])
    assert ledger.balance() == Balance(dispatched=1, consumed=1, dropped={}, in_flight=0)
    assert ledger.batch(1) == [group] and ledger.batch(2) == []


def test_a_partial_rollout_comes_back_with_every_token_and_goes_on(ledger):
    ledger.dispatch(order("a"))
    partial = rollout("a-0", "aborted", tokens=5)
    ledger.record("a", partial)
    assert ledger.trajectories("a") == (partial,)
    with pytest.raises(LedgerError, match="expected what is recorded of it, 5 sampled tokens, and more; found 3"):
        ledger.record("a", rollout("a-0", "aborted", tokens=3))
    longer = rollout("a-0", "done", tokens=9)
    ledger.record("a", rollout("a-1"))
    ledger.record("a", longer)
    assert ledger.trajectories("a") == (longer, rollout("a-1"))
    with pytest.raises(LedgerError, match="rollout 'a-0': expected a new or a partial one .* ended with 'done'"):
        ledger.record("a", longer)


def test_the_order_of_rollouts_says_nothing_of_how_long_they_took(ledger):
    """So that what is repeated in the place of failed ones is not what ended first, the shortest."""
    ledger.dispatch(order("a", 3))
    for name, end in (("a-2", "done"), ("a-1", "aborted"), ("a-0", "done"), ("a-1", "done")):
        ledger.record("a", rollout(name, end))
    assert [one.id for one in ledger.trajectories("a")] == ["a-0", "a-1", "a-2"]


def test_repeats_stand_in_for_failures(ledger):
    ledger.dispatch(order("a", 3))
    for i, end in enumerate(("done", "failed", "done")):
        ledger.record("a", rollout(f"a-{i}", end))
    trajectories = ledger.trajectories("a")
    with pytest.raises(LedgerError, match="group 'a': expected 3 members, found 2"):
        ledger.consume(1, [Group("a", 3, trajectories)])
    group = Group("a", 3, trajectories, repeats=[2])
    ledger.consume(1, [group])
    assert ledger.batch(1) == [group]


def test_a_batch_is_consumed_whole_or_not_at_all(ledger):
    first, second = complete(ledger, "a"), complete(ledger, "b")
    ledger.consume(1, [first])
    before = ledger.balance()
    with pytest.raises(LedgerError, match="group 'a': expected one in flight, found one that step 1 consumed"):
        ledger.consume(2, [second, first])
    with pytest.raises(LedgerError, match="found one that was never dispatched"):
        ledger.consume(2, [second, dataclasses.replace(second, id="c")])
    other = dataclasses.replace(second, trajectories=[rollout("b-0"), rollout("b-2")])
    with pytest.raises(LedgerError, match="group 'b': expected the rollouts that were recorded"):
        ledger.consume(2, [other])
    assert ledger.balance() == before
    with pytest.raises(LedgerError, match="found one that step 2 consumed"):
        ledger.consume(2, [second, second])
    assert ledger.in_flight() == [order("b")]


def test_partial_and_missing_rollouts_are_no_batch(ledger):
    ledger.dispatch(order("a", 2))
    ledger.record("a", rollout("a-0"))
    one = ledger.trajectories("a")
    with pytest.raises(LedgerError, match="group 'a': expected 2 rollouts that have ended, found 1"):
        ledger.consume(1, [Group("a", 2, one, repeats=[0])])
    ledger.record("a", rollout("a-1", "aborted"))
    with pytest.raises(LedgerError, match=r"found 2, of which these are partial: \['a-1'\]"):
        ledger.consume(1, [Group("a", 2, ledger.trajectories("a"), repeats=[0])])


def test_a_step_has_one_batch(ledger):
    first, second = complete(ledger, "a"), complete(ledger, "b")
    ledger.consume(1, [first])
    with pytest.raises(LedgerError, match="step 1: expected one without a batch"):
        ledger.consume(1, [second])
    ledger.rewind(0)
    ledger.consume(1, [second])
    assert ledger.batch(1) == [second]


def test_lost_policies_are_not_served_again(ledger):
    for number, step in ((0, 0), (1, 4), (2, 8)):
        ledger.push(PolicyVersion(number, step))
    ledger.rewind(4)
    assert ledger.policy() == PolicyVersion(1, 4)
    with pytest.raises(LedgerError, match="policy 2: expected a number above 2"):
        ledger.push(PolicyVersion(2, 8))
    ledger.push(PolicyVersion(3, 8))
    assert ledger.policy() == PolicyVersion(3, 8)


def test_every_policy_stays_on_record(ledger):
    pushed = [PolicyVersion(1, 0), PolicyVersion(2, 4, "abc"), PolicyVersion(5, 8)]
    for policy in pushed:
        ledger.push(policy)
    ledger.rewind(0)
    assert ledger.policies() == pushed and ledger.policy() == pushed[0]


def test_the_books_of_each_task(ledger):
    for number in range(7):
        ledger.dispatch(dataclasses.replace(order(f"g{number}", 1), task=("sums", "maze")[number % 2]))
        ledger.record(f"g{number}", rollout(f"g{number}-0", task=("sums", "maze")[number % 2]))
    ledger.consume(1, [Group("g0", 1, ledger.trajectories("g0"))])
    ledger.consume(2, [Group("g1", 1, ledger.trajectories("g1"))])
    for name, reason in (("g2", "stale"), ("g4", "stale"), ("g3", "timeout")):
        ledger.drop(name, reason)
    assert ledger.tasks() == {"sums": Balance(4, 1, {"stale": 2}, 1), "maze": Balance(3, 1, {"timeout": 1}, 1)}
    ledger.rewind(1)
    assert ledger.tasks() == {"sums": Balance(4, 1, {"stale": 2}, 1), "maze": Balance(3, 0, {"timeout": 1}, 2)}


def test_a_full_disk_loses_nothing_that_was_written(ledger):
    complete(ledger, "a")
    ledger._connection.execute("PRAGMA max_page_count = 1")  # as many as there are
    with pytest.raises(sqlite3.OperationalError, match="full"):
        for number in range(1000):
            complete(ledger, f"b{number}")
    ledger._connection.execute("PRAGMA max_page_count = 100000")
    before = ledger.balance().dispatched
    complete(ledger, "c")
    assert ledger.balance().dispatched == before + 1


MAKER = """
import sys
from glm5_jax.rl.ledger import Ledger
sys.stdin.readline()
for number in range(20):
    Ledger(f"{sys.argv[1]}-{number}").close()
"""


def test_processes_that_make_one_file_at_once(tmp_path):
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    started = [subprocess.Popen([sys.executable, "-c", MAKER, str(tmp_path / "ledger")], cwd=root, text=True,
                                stdin=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)]
    for process in started:
        process.stdin.write("go\n")
        process.stdin.flush()
    ended = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], ended


def test_drops_are_counted_by_reason(ledger):
    for name in "abc":
        ledger.dispatch(order(name))
    ledger.drop("a", "stale", "5 versions old")
    ledger.drop("c", "environment")
    assert ledger.balance() == Balance(3, 0, {"stale": 1, "environment": 1}, 1)
    with pytest.raises(LedgerError, match="found one that was dropped for 'stale'"):
        ledger.drop("a", "stale")
    with pytest.raises(LedgerError, match="dropped for 'environment'"):
        ledger.record("c", rollout("c-0"))
    with pytest.raises(ValueError, match="reason: expected a word"):
        ledger.drop("b", "")


def test_what_lost_steps_consumed_is_in_flight_again(ledger):
    groups = [complete(ledger, name) for name in "abcd"]
    for step, group in enumerate(groups[:3], 1):
        ledger.consume(step, [group])
    ledger.drop("d", "stale")
    assert ledger.rewind(1) == 2
    assert [one.id for one in ledger.in_flight()] == ["b", "c"]
    ledger.consume(2, [groups[2]])  # another order than before
    assert ledger.batch(2) == [groups[2]] and ledger.batch(3) == []
    assert ledger.rewind(2) == 0
    assert ledger.balance() == Balance(4, 2, {"stale": 1}, 1)


@pytest.mark.parametrize("wrong, message", [
    (lambda it: it.dispatch(order("a")), "group 'a': expected an id that was never dispatched"),
    (lambda it: it.record("a", rollout("a-2")), "group 'a': expected at most 2 rollouts, found one more, 'a-2'"),
    (lambda it: it.record("a", rollout("a-0", task="chess")), "expected task and seed of group 'a', 'sums' and 1"),
    (lambda it: it.record("b", rollout("a-0")), "expected a new or a partial one of group 'b', found one of 'a'"),
    (lambda it: it.record("z", rollout("z-0")), "group 'z': expected one in flight, found one that was never"),
    (lambda it: it.push(PolicyVersion(3, 9)), "policy 3: expected a number above 3"),
])
def test_what_would_break_the_books_is_refused(ledger, wrong, message):
    complete(ledger, "a")
    ledger.dispatch(order("b"))
    ledger.push(PolicyVersion(3, 8, "abc"))
    before = ledger.balance(), ledger.trajectories("a"), ledger.policy()
    with pytest.raises(LedgerError, match=message):
        wrong(ledger)
    assert (ledger.balance(), ledger.trajectories("a"), ledger.policy()) == before


def test_rows_are_only_ever_added(ledger):
    ledger.consume(1, [complete(ledger, "a")])
    ledger.push(PolicyVersion(0, 0))
    ledger.rewind(0)
    with sqlite3.connect(ledger.path) as raw:
        for table in ("groups", "rollouts", "ends", "rewinds", "policies"):
            for statement in (f"DELETE FROM {table}", f"UPDATE {table} SET number = number + 1"):
                with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                    raw.execute(statement)
    raw.close()


class Model:
    """The books in plain Python."""

    def __init__(self):
        self.ends: dict[str, int | str | None] = {}

    def balance(self) -> Balance:
        ends = list(self.ends.values())
        dropped = {end: ends.count(end) for end in ends if isinstance(end, str)}
        return Balance(len(ends), sum(isinstance(end, int) for end in ends), dropped, ends.count(None))


@pytest.mark.parametrize("seed", range(5))
def test_any_sequence_of_calls_keeps_the_balance(tmp_path, seed):
    """Invariant 5, by random calls, with the file closed and opened in between."""
    rng, model, groups, step = random.Random(seed), Model(), {}, 0
    ledger = Ledger(tmp_path / "ledger.sqlite")
    for number in range(60):
        flying = [name for name, end in model.ends.items() if end is None]
        match rng.choice(["dispatch", "dispatch", "consume", "drop", "rewind", "reopen"]):
            case "dispatch":
                groups[f"g{number}"] = complete(ledger, f"g{number}")
                model.ends[f"g{number}"] = None
            case "consume" if flying:
                step += 1
                taken = rng.sample(flying, rng.randint(1, len(flying)))
                ledger.consume(step, [groups[name] for name in taken])
                model.ends |= {name: step for name in taken}
                assert [group.id for group in ledger.batch(step)] == taken
            case "drop" if flying:
                name, reason = rng.choice(flying), rng.choice(["stale", "environment"])
                ledger.drop(name, reason)
                model.ends[name] = reason
            case "rewind":
                step = rng.randint(0, step)
                lost = [name for name, end in model.ends.items() if isinstance(end, int) and end > step]
                assert ledger.rewind(step) == len(lost)
                model.ends |= dict.fromkeys(lost)
            case "reopen":
                ledger.close()
                ledger = Ledger(tmp_path / "ledger.sqlite")
        assert ledger.balance() == model.balance()
        assert {one.id for one in ledger.in_flight()} == {name for name, end in model.ends.items() if end is None}
    ledger.close()


def test_threads_consume_every_group_once(tmp_path):
    """Each thread with a ledger of its own, all after the same groups."""
    path, names, wins = tmp_path / "ledger.sqlite", [f"g{i}" for i in range(12)], []
    with Ledger(path) as ledger:
        groups = [complete(ledger, name) for name in names]

        def work(step: int) -> None:
            with Ledger(path) as own:
                for number, group in enumerate(groups):
                    try:
                        own.consume(100 * step + number, [group])
                        wins.append(group.id)
                    except LedgerError:
                        pass

        threads = [threading.Thread(target=work, args=[step]) for step in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(wins) == sorted(names)
        assert ledger.balance() == Balance(12, 12, {}, 0)


WRITER = """
import random, sys
from glm5_jax.rl.ledger import Ledger
from tests.rl.test_ledger import complete
ledger, first = Ledger(sys.argv[1]), int(sys.argv[2])
for number in range(first, first + 10_000):
    name = f"g{number}"
    print("dispatch", name, flush=True)
    group = complete(ledger, name)
    print("dispatched", name, flush=True)
    if number % 3:
        print("consume", name, flush=True)
        ledger.consume(number, [group])
        print("consumed", name, flush=True)
    else:
        print("drop", name, flush=True)
        ledger.drop(name, "stale")
        print("dropped", name, flush=True)
"""


def test_nothing_is_lost_or_doubled_by_kills(tmp_path):
    """Invariant 5: 20 processes killed at random moments; what one reported done is in the file, whole, once."""
    path, rng, said = tmp_path / "ledger.sqlite", random.Random(0), []
    Ledger(path).close()
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    for turn in range(20):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(turn * 10_000)], cwd=root, text=True,
                                   stdout=subprocess.PIPE)
        lines = [process.stdout.readline() for _ in range(rng.randint(1, 30))]
        process.send_signal(signal.SIGKILL)
        lines += process.communicate()[0].splitlines()
        said += [tuple(line.split()) for line in lines if len(line.split()) == 2]
    done = {word: {name for what, name in said if what == word} for word in ("dispatched", "consumed", "dropped")}
    begun = {word: {name for what, name in said if what == word} for word in ("dispatch", "consume", "drop")}
    with Ledger(path) as ledger:
        balance = ledger.balance()
        consumed = {group.id for number in range(200_000) if f"g{number}" in begun["consume"]
                    for group in ledger.batch(number)}
        assert done["consumed"] <= consumed <= begun["consume"] and balance.consumed == len(consumed)
        assert len(done["dropped"]) <= balance.dropped.get("stale", 0) <= len(begun["drop"])
        assert len(done["dispatched"]) <= balance.dispatched <= len(begun["dispatch"])
        assert balance.dispatched == balance.consumed + sum(balance.dropped.values()) + balance.in_flight
        for group in consumed:
            assert ledger.trajectories(group) == (rollout(f"{group}-0"), rollout(f"{group}-1"))
        assert min(len(done["consumed"]), len(done["dropped"])) > 5


def test_files_that_are_no_ledger(tmp_path):
    text, other, newer = tmp_path / "text", tmp_path / "other.sqlite", tmp_path / "newer.sqlite"
    text.write_text("no database, but long enough to be looked at" * 9)
    with sqlite3.connect(other) as raw:
        raw.execute("CREATE TABLE cats (name TEXT)")
    raw.close()
    Ledger(newer).close()
    with sqlite3.connect(newer) as raw:
        raw.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    raw.close()
    for path, message in ((text, "SQLite cannot read"), (other, "another SQLite database"), (newer, "upgrade to read")):
        before = path.read_bytes()
        with pytest.raises(LedgerError, match=message):
            Ledger(path)
        assert path.read_bytes() == before


def test_an_older_schema_is_migrated_with_its_rows(tmp_path, monkeypatch):
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        group = complete(ledger, "a")
    monkeypatch.setattr("glm5_jax.rl.ledger.MIGRATIONS", (*MIGRATIONS, "CREATE TABLE more (x INTEGER);\n"))
    with Ledger(path) as ledger:
        assert ledger.trajectories("a") == group.trajectories
    with sqlite3.connect(path) as raw:
        assert raw.execute("PRAGMA user_version").fetchone() == (2,)
        assert raw.execute("SELECT COUNT(*) FROM more").fetchone() == (0,)
    raw.close()


def test_a_migration_that_fails_changes_nothing(tmp_path, monkeypatch):
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        group = complete(ledger, "a")
    broken = "CREATE TABLE more (x INTEGER);\nCREATE TABLE groups (x INTEGER);\n"
    with monkeypatch.context() as patch:
        patch.setattr("glm5_jax.rl.ledger.MIGRATIONS", (*MIGRATIONS, broken))
        with pytest.raises(sqlite3.OperationalError, match="already exists"):
            Ledger(path)
    with Ledger(path) as ledger:
        assert ledger.trajectories("a") == group.trajectories
