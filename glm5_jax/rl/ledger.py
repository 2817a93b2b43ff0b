"""The ledger of rollouts: what was dispatched, what came of it, and where it went; durable, append-only, exactly once.

A group is dispatched; its rollouts are recorded as they get on, partial ones with their tokens, log-probs and versions;
and it ends once: consumed by a training step, or dropped for a reason. At all times

    dispatched = consumed + dropped + in flight

Training that goes back to a checkpoint takes its groups back with it (`rewind`): what the lost steps had consumed is in
flight again. Everything is one SQLite file in WAL mode, into which rows are only ever inserted; triggers refuse the
rest. A method returns when its rows are on the disk, and a process killed inside one leaves all of them or none. Many
threads and processes may use one file.
"""

import dataclasses
import pathlib
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from glm5_jax.records import EndReason, Group, PolicyVersion, Trajectory, from_json, to_json

PATIENCE_S = 30.0  # how long a writer waits for another one

# Schema number n is made of the first n scripts. A script that was published is never changed: a new one follows it.
MIGRATIONS = ("""
    CREATE TABLE groups (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, task TEXT NOT NULL, seed INTEGER NOT NULL,
                         size INTEGER NOT NULL, version INTEGER NOT NULL);
    CREATE TABLE rollouts (number INTEGER PRIMARY KEY, "group" TEXT NOT NULL REFERENCES groups(id), id TEXT NOT NULL,
                           "end" TEXT NOT NULL, trajectory TEXT NOT NULL);
    CREATE INDEX rollouts_of_group ON rollouts("group", id, number);
    CREATE INDEX rollouts_by_id ON rollouts(id);
    CREATE TABLE ends (number INTEGER PRIMARY KEY, "group" TEXT NOT NULL REFERENCES groups(id), step INTEGER,
                       repeats TEXT, reason TEXT, detail TEXT, CHECK ((step IS NULL) != (reason IS NULL)));
    CREATE INDEX ends_of_group ON ends("group");
    CREATE TABLE rewinds (number INTEGER PRIMARY KEY, step INTEGER NOT NULL, after INTEGER NOT NULL,
                          policy INTEGER NOT NULL);
    CREATE TABLE policies (number INTEGER PRIMARY KEY, step INTEGER NOT NULL, checksum TEXT NOT NULL);
    CREATE VIEW ended AS SELECT * FROM ends WHERE NOT EXISTS (
        SELECT 1 FROM rewinds WHERE ends.step > rewinds.step AND ends.number <= rewinds.after);
    CREATE VIEW in_flight AS SELECT * FROM groups WHERE NOT EXISTS (SELECT 1 FROM ended WHERE "group" = groups.id);
    CREATE VIEW standing AS SELECT * FROM policies WHERE NOT EXISTS (
        SELECT 1 FROM rewinds WHERE policies.step > rewinds.step AND policies.number <= rewinds.policy);
""" + "".join(f"""
    CREATE TRIGGER {table}_never_{word} BEFORE {word} ON {table}
        BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
""" for table in ("groups", "rollouts", "ends", "rewinds", "policies") for word in ("update", "delete")),)


class LedgerError(RuntimeError):
    """A request that would break the books, such as consuming a group twice; nothing of it was written."""


@dataclasses.dataclass(frozen=True)
class Order:
    """A dispatched group: which problem, how many rollouts, and the number of the policy of the moment."""

    id: str
    task: str
    seed: int
    size: int
    version: int


@dataclasses.dataclass(frozen=True)
class Balance:
    """Numbers of groups; `dropped` by reason."""

    dispatched: int
    consumed: int
    dropped: dict[str, int]
    in_flight: int


class Ledger:
    """The ledger in the file `path`, made where there is none. Raises LedgerError for a file that is none of ours."""

    def __init__(self, path: str | pathlib.Path):
        self.path = pathlib.Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(self.path, timeout=PATIENCE_S, isolation_level=None, check_same_thread=False)
        try:
            self._check_schema(self._connection)  # before a setting could touch what is somebody else's
            for setting in ("synchronous = FULL", "foreign_keys = ON"):
                self._connection.execute(f"PRAGMA {setting}")
            self._log_ahead()
            self._migrate()
        except BaseException as error:
            self._connection.close()
            if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
                raise LedgerError(f"{self.path}: expected a ledger, found what SQLite cannot read ({error})") from error
            raise

    def close(self) -> None:
        """Closes the file; what was written stays."""
        self._connection.close()

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def dispatch(self, order: Order) -> None:
        """Enters a new group. Raises LedgerError where its id was dispatched before."""
        with self._write() as db:
            if db.execute("SELECT 1 FROM groups WHERE id = ?", [order.id]).fetchone():
                raise LedgerError(f"group {order.id!r}: expected an id that was never dispatched")
            db.execute("INSERT INTO groups (id, task, seed, size, version) VALUES (?, ?, ?, ?, ?)",
                       dataclasses.astuple(order))

    def record(self, group: str, trajectory: Trajectory) -> None:
        """Enters how far a rollout of a group in flight has come: a partial one (end `aborted`) may be recorded again.

        Raises LedgerError where the group is not in flight, is full, is of another problem, or the rollout has ended.
        """
        with self._write() as db:
            order = self._open_order(db, group)
            if (trajectory.task, trajectory.seed) != (order.task, order.seed):
                raise LedgerError(f"rollout {trajectory.id!r}: expected task and seed of group {group!r}, "
                                  f"{order.task!r} and {order.seed}, found {trajectory.task!r} and {trajectory.seed}")
            known = db.execute('SELECT "group", "end", trajectory FROM rollouts WHERE id = ? '
                               "ORDER BY number DESC LIMIT 1",
                               [trajectory.id]).fetchone()
            if known is None:
                count, = db.execute('SELECT COUNT(DISTINCT id) FROM rollouts WHERE "group" = ?', [group]).fetchone()
                if count >= order.size:
                    raise LedgerError(f"group {group!r}: expected at most {order.size} rollouts, found one more, "
                                      f"{trajectory.id!r}")
            elif known[:2] != (group, EndReason.ABORTED.value):
                raise LedgerError(f"rollout {trajectory.id!r}: expected a new or a partial one of group {group!r}, "
                                  f"found one of {known[0]!r} that ended with {known[1]!r}")
            elif (had := from_json(Trajectory, known[2]).sampled) != (has := trajectory.sampled)[:len(had)] and (
                    trajectory.failure is None):
                raise LedgerError(f"rollout {trajectory.id!r}: expected what is recorded of it, {len(had)} sampled "
                                  f"tokens, and more; found {len(has)} that do not begin with them")
            db.execute('INSERT INTO rollouts ("group", id, "end", trajectory) VALUES (?, ?, ?, ?)',
                       [group, trajectory.id, trajectory.end.value, to_json(trajectory)])

    def consume(self, step: int, groups: Sequence[Group]) -> None:
        """Ends groups as the batch of training step `step`, all or none.

        Raises LedgerError where the step has a batch, a group is not in flight, not all of its rollouts have ended, it
        has too few members, or holds other rollouts than were recorded.
        """
        with self._write() as db:
            if db.execute("SELECT 1 FROM ended WHERE step = ?", [step]).fetchone():
                raise LedgerError(f"step {step}: expected one without a batch; `rewind` takes back what was lost")
            for group in groups:
                order = self._open_order(db, group.id)
                if len(group.members) != order.size:
                    raise LedgerError(f"group {group.id!r}: expected {order.size} members, found {len(group.members)}")
                if group.trajectories != self._trajectories(db, group.id):
                    raise LedgerError(f"group {group.id!r}: expected the rollouts that were recorded, found others")
                partial = [one.id for one in group.trajectories if one.end is EndReason.ABORTED]
                if partial or len(group.trajectories) != order.size:
                    raise LedgerError(f"group {group.id!r}: expected {order.size} rollouts that have ended, found "
                                      f"{len(group.trajectories)}, of which these are partial: {partial}")
                db.execute('INSERT INTO ends ("group", step, repeats) VALUES (?, ?, ?)',
                           [group.id, step, " ".join(map(str, group.repeats))])

    def drop(self, group: str, reason: str, detail: str = "") -> None:
        """Ends a group unused, for a reason that is counted. Raises LedgerError where it is not in flight."""
        if not reason:
            raise ValueError("reason: expected a word to count drops by, found ''")
        with self._write() as db:
            self._open_order(db, group)
            db.execute('INSERT INTO ends ("group", reason, detail) VALUES (?, ?, ?)', [group, reason, detail])

    def rewind(self, step: int) -> int:
        """Takes back what the steps after `step` consumed, and their policies, because training goes on from there.

        Returns how many groups are in flight again. The numbers of their policies are not used again.
        """
        with self._write() as db:
            undone, = db.execute("SELECT COUNT(*) FROM ended WHERE step > ?", [step]).fetchone()
            db.execute("INSERT INTO rewinds (step, after, policy) SELECT ?, "
                       "(SELECT COALESCE(MAX(number), 0) FROM ends), "
                       "(SELECT COALESCE(MAX(number), -1) FROM policies)", [step])
            return undone

    def push(self, policy: PolicyVersion) -> None:
        """Enters a new set of weights. Raises LedgerError where its number does not exceed all before."""
        with self._write() as db:
            newest, = db.execute("SELECT MAX(number) FROM policies").fetchone()
            if newest is not None and policy.number <= newest:
                raise LedgerError(f"policy {policy.number}: expected a number above {newest}, the newest so far")
            db.execute("INSERT INTO policies VALUES (?, ?, ?)", dataclasses.astuple(policy))

    def balance(self) -> Balance:
        """The books, counted from one state of the file."""
        with self._read() as db:
            dispatched, = db.execute("SELECT COUNT(*) FROM groups").fetchone()
            consumed, = db.execute("SELECT COUNT(*) FROM ended WHERE step IS NOT NULL").fetchone()
            in_flight, = db.execute("SELECT COUNT(*) FROM in_flight").fetchone()
            dropped = dict(db.execute("SELECT reason, COUNT(*) FROM ended WHERE reason IS NOT NULL GROUP BY reason"))
        return Balance(dispatched, consumed, dropped, in_flight)

    def tasks(self) -> dict[str, Balance]:
        """The books of each task."""
        found: dict[str, Balance] = {}
        with self._read() as db:
            rows = db.execute('SELECT task, step IS NOT NULL, reason, COUNT(*) FROM groups LEFT JOIN ended '
                              'ON ended."group" = groups.id GROUP BY 1, 2, 3 ORDER BY 1')
            for task, consumed, reason, count in rows:
                books = found.setdefault(task, Balance(0, 0, {}, 0))
                found[task] = Balance(
                    books.dispatched + count, books.consumed + count * consumed,
                    books.dropped | ({reason: count} if reason else {}),
                    books.in_flight + (0 if consumed or reason else count))
        return found

    def in_flight(self) -> list[Order]:
        """The groups that have not ended, in the order of dispatch."""
        with self._read() as db:
            return [Order(*row) for row in
                    db.execute("SELECT id, task, seed, size, version FROM in_flight ORDER BY number")]

    def policies(self) -> list[PolicyVersion]:
        """Every set of weights that was ever entered, those that a rewind took back too, by number."""
        with self._read() as db:
            return [PolicyVersion(*row) for row in
                    db.execute("SELECT number, step, checksum FROM policies ORDER BY number")]

    def trajectories(self, group: str) -> tuple[Trajectory, ...]:
        """The newest state of every rollout of a group, by id: the order says nothing of how long each took."""
        with self._read() as db:
            return self._trajectories(db, group)

    def batch(self, step: int) -> list[Group]:
        """What training step `step` consumed, in its order."""
        with self._read() as db:
            rows = db.execute('SELECT "group", size, repeats FROM ended JOIN groups ON groups.id = "group" '
                              "WHERE step = ? ORDER BY ended.number", [step]).fetchall()
            return [Group(group, size, self._trajectories(db, group), tuple(map(int, repeats.split())))
                    for group, size, repeats in rows]

    def policy(self) -> PolicyVersion | None:
        """The newest weights that no rewind has taken back, None where there are none."""
        with self._read() as db:
            row = db.execute("SELECT number, step, checksum FROM standing ORDER BY number DESC LIMIT 1").fetchone()
        return PolicyVersion(*row) if row else None

    def _trajectories(self, db: sqlite3.Connection, group: str) -> tuple[Trajectory, ...]:
        rows = db.execute("SELECT trajectory FROM rollouts WHERE number IN (SELECT MAX(number) FROM rollouts WHERE "
                          '"group" = ? GROUP BY id) ORDER BY id', [group])
        return tuple(from_json(Trajectory, text) for text, in rows)

    def _open_order(self, db: sqlite3.Connection, group: str) -> Order:
        row = db.execute("SELECT id, task, seed, size, version FROM in_flight WHERE id = ?", [group]).fetchone()
        if row is None:
            ended = db.execute('SELECT step, reason FROM ended WHERE "group" = ?', [group]).fetchone()
            what = ("one that was never dispatched" if ended is None else f"one that step {ended[0]} consumed"
                    if ended[1] is None else f"one that was dropped for {ended[1]!r}")
            raise LedgerError(f"group {group!r}: expected one in flight, found {what}")
        return Order(*row)

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, after every other writer's last commit."""
        with self._transaction("BEGIN IMMEDIATE") as db:
            yield db

    @contextmanager
    def _read(self) -> Iterator[sqlite3.Connection]:
        """One state of the file, whatever others write meanwhile."""
        with self._transaction("BEGIN") as db:
            yield db

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[Any]:
        with self._lock:
            self._connection.execute(begin)
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            finally:
                if self._connection.in_transaction:  # a full disk has rolled back already
                    self._connection.execute("ROLLBACK")

    def _log_ahead(self) -> None:
        """WAL mode. To change the mode SQLite does not wait for others that are opening the file: it is tried again."""
        give_up = time.monotonic() + PATIENCE_S
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > give_up:
                    raise
            time.sleep(0.01)

    def _check_schema(self, db: sqlite3.Connection) -> int:
        """The number of the file's schema, 0 for an empty file."""
        # In one statement: another process may just be making the file.
        found, tables = db.execute("SELECT user_version, (SELECT COUNT(*) FROM sqlite_master) FROM "
                                   "pragma_user_version").fetchone()
        if found == 0 and tables:
            raise LedgerError(f"{self.path}: expected a ledger, found another SQLite database")
        if found > len(MIGRATIONS):
            raise LedgerError(f"{self.path}: expected schema {len(MIGRATIONS)} or older, found {found}: "
                              f"a newer glm5_jax wrote it; upgrade to read it")
        return found

    def _migrate(self) -> None:
        with self._write() as db:
            found = self._check_schema(db)
            for script in MIGRATIONS[found:]:
                for statement in _statements(script):
                    db.execute(statement)
            if found < len(MIGRATIONS):
                db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")


def _statements(script: str) -> Iterator[str]:
    """The statements of a script one by one: `executescript` would commit what came before it."""
    statement = ""
    for line in script.splitlines():
        statement += line + "\n"
        if statement.strip() and sqlite3.complete_statement(statement):
            yield statement
            statement = ""
