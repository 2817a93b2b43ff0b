"""A tree of processes whose output, time and memory are bounded from outside: run to its end, or talked to by lines."""

import contextlib
import dataclasses
import enum
import math
import os
import resource
import selectors
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

from glm5_jax.envs.confine import Limits, Meter

# How often the memory is looked at.
_CHECK_S = 0.05
# The kernel takes its time to free a large tree.
_KILL_S = 30.0
_CHUNK = 65536
# What may still stand in a pipe when the tree is gone: Linux lets nobody without privileges have a larger one.
_PIPE = 2**20


class Outcome(enum.StrEnum):
    """How a process ended."""

    EXIT = "exit"
    """By itself; `returncode` says how."""
    TIMEOUT = "timeout"
    """By the limit on wall-clock or processor time."""
    MEMORY = "memory"
    """By the limit on memory."""
    OUTPUT = "output"
    """By the limit on output."""
    BLOCKED = "blocked"
    """By SIGSYS: it made a system call that the sandbox forbids, or runs a shell whose last command did."""
    KILLED = "killed"
    """From outside: somebody killed the sandbox itself, or the thread that started it has ended."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What a process did."""

    outcome: Outcome
    returncode: int | None
    """As a shell tells it: 0 to 255, 128 + the number of the signal that killed it; None where a limit did, or somebody
    from outside."""
    stdout: str
    stderr: str
    """Both cut at the limit on output, and decoded as UTF-8 with U+FFFD for what is not."""
    seconds: float
    """Wall-clock time since the command was let go."""
    memory_by: str
    """Who kept count of the memory: "cgroup", or "watch" where none could be made."""


@dataclasses.dataclass(frozen=True)
class Reply:
    """What came back for one line."""

    outcome: Outcome | None
    """None while the process lives; else how it ended."""
    returncode: int | None
    line: str | None
    """One line of stdout without its end, or None where there was none."""
    stderr: str
    """What came on stderr meanwhile, cut at the limit on output."""
    truncated: bool


class Process:
    """A running tree; use it as a context manager, for the end of the block kills all of it.

    Sandboxed processes also die when the thread that started them ends: start and use one in the same thread.
    """

    def __init__(self, popen: subprocess.Popen, limits: Limits, *, leader: int, kill: Callable[[], None], meter: Meter,
                 exit_code: Callable[[int, str], int | None], resources: contextlib.ExitStack) -> None:
        """`leader`: pidfd of the process whose end is the end of the tree. `kill` kills the tree. `exit_code` makes
        Popen's return code, given stderr, into a shell's, or None for a tree killed from outside. `resources` are
        closed when all is over."""
        assert popen.stdin and popen.stdout and popen.stderr
        self._popen, self._limits, self._leader, self._kill = popen, limits, leader, kill
        self._meter, self._exit_code, self._resources = meter, exit_code, resources
        self._start = time.monotonic()
        self._ended = self._closed = False
        self._code: int | None = None
        self._largest = 0
        # A child starts with the peak of the process it was forked from, until it has a larger one of its own.
        self._inherited = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self._input = bytearray()
        self._stdin = popen.stdin.fileno()
        self._stdout = _Stream(popen.stdout.fileno(), limits.output_bytes)
        self._stderr = _Stream(popen.stderr.fileno(), limits.output_bytes)
        self._selector = selectors.DefaultSelector()
        for fd in (self._stdin, self._stdout.fd, self._stderr.fd):
            os.set_blocking(fd, False)
        for stream in (self._stdout, self._stderr):
            self._selector.register(stream.fd, selectors.EVENT_READ, stream)
        self._selector.register(leader, selectors.EVENT_READ)

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def finish(self, stdin: str = "") -> Result:
        """Sends `stdin` and its end, and waits for the end of the tree or a limit, which kills the rest of it."""
        self._stdout.strict = self._stderr.strict = True
        self._send(stdin.encode())
        outcome = self._pump(self._start + self._limits.wall_s, lambda: False, end_input=True)
        assert outcome is not None
        outcome, code = self._settle(outcome)
        return Result(outcome, code, self._stdout.text(), self._stderr.text(), time.monotonic() - self._start,
                      self._meter.name)

    def exchange(self, line: str, *, wall_s: float | None = None) -> Reply:
        """Sends a line and waits for one on stdout, `wall_s` seconds at most (default: the limit of that name).

        A limit that is hit kills the tree; on stderr, what is over the limit is dropped instead. Raises ValueError for
        a line end within the line, a time that is not finite, or a process that has ended.
        """
        if wall_s is not None and not math.isfinite(wall_s):
            raise ValueError(f"wall_s: expected a finite number of seconds, found {wall_s!r}")
        if "\n" in line:
            raise ValueError("line: expected no line end within it")
        if self._closed:
            raise ValueError("exchange: expected a running process, found one that has ended; start another")
        self._stdout.strict, self._stderr.strict = True, False
        self._stderr.clear()
        self._send(line.encode() + b"\n")
        deadline = time.monotonic() + (self._limits.wall_s if wall_s is None else wall_s)
        outcome = self._pump(deadline, lambda: b"\n" in self._stdout.kept)
        code = None
        if outcome is None:
            self._stderr.drain()
        else:
            outcome, code = self._settle(outcome)
        reply = None
        if b"\n" in self._stdout.kept:
            head, _, rest = bytes(self._stdout.kept).partition(b"\n")
            self._stdout.kept[:] = rest
            reply = head.decode(errors="replace")
        return Reply(outcome, code, reply, self._stderr.text(), self._stderr.truncated)

    def close(self) -> None:
        """Kills what still runs, waits until it is gone, and frees everything; may be called twice."""
        if self._closed:
            return
        self._closed = True
        with self._resources:
            self._reap()
            for pipe in (self._popen.stdin, self._popen.stdout, self._popen.stderr):
                if pipe is not None:
                    pipe.close()
            self._selector.close()

    def _send(self, data: bytes) -> None:
        self._input += data
        if self._stdin not in self._selector.get_map():
            self._selector.register(self._stdin, selectors.EVENT_WRITE)

    def _pump(self, deadline: float, done: Callable[[], bool], end_input: bool = False) -> Outcome | None:
        """Moves bytes until `done` (None), the end of the tree, or a limit."""
        check = 0.0
        while not done():
            now = time.monotonic()
            if now >= deadline:
                return Outcome.TIMEOUT
            if now >= check:
                if self._meter.exceeded():
                    return Outcome.MEMORY
                check = now + _CHECK_S
            for key, _ in self._selector.select(min(deadline - now, _CHECK_S)):
                if key.fd == self._leader:
                    self._selector.unregister(self._leader)
                    self._ended = True
                elif key.fd == self._stdin:
                    self._feed(end_input)
                elif not key.data.read():
                    self._selector.unregister(key.fd)
            if self._ended:
                self._stdout.drain()
                self._stderr.drain()
            if any(stream.strict and stream.truncated for stream in (self._stdout, self._stderr)):
                return Outcome.OUTPUT
            if self._ended:
                return Outcome.EXIT
        return None

    def _feed(self, end_input: bool) -> None:
        """Writes what the pipe takes; a process that does not read its input may do without."""
        try:
            sent = os.write(self._stdin, self._input[:_CHUNK]) if self._input else 0
            del self._input[:sent]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self._input.clear()
        if not self._input:
            self._selector.unregister(self._stdin)
            if end_input:
                assert self._popen.stdin
                self._popen.stdin.close()

    def _settle(self, outcome: Outcome) -> tuple[Outcome, int | None]:
        """The final outcome and return code of a tree that ended or must end now; closes everything."""
        with contextlib.closing(self):
            if outcome is not Outcome.EXIT:
                return outcome, None
            code = self._reap()
            if self._meter.exceeded(self._largest):
                return Outcome.MEMORY, None
            shells = self._exit_code(code, self._stderr.text())
            if shells is None:
                return Outcome.KILLED, None
            if shells == 128 + signal.SIGXCPU:
                return Outcome.TIMEOUT, None
            return (Outcome.BLOCKED if shells == 128 + signal.SIGSYS else Outcome.EXIT), shells

    def _reap(self) -> int:
        """Kills what is left, and waits for the child as Popen.wait does, but learns the largest process's size too."""
        if self._code is None:
            self._kill()
            if not self._ended:
                with selectors.DefaultSelector() as selector:
                    selector.register(self._leader, selectors.EVENT_READ)
                    selector.select(_KILL_S)
                # Popen.kill would first look whether the child has ended, and take its status away.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._popen.pid, signal.SIGKILL)
            status = 0
            # Where SIGCHLD is ignored, the kernel keeps no status; Popen takes it for 0 too.
            with contextlib.suppress(ChildProcessError):
                _, status, usage = os.wait4(self._popen.pid, 0)
                self._largest = usage.ru_maxrss * 1024 if usage.ru_maxrss > self._inherited else 0
            self._code = self._popen.returncode = os.waitstatus_to_exitcode(status)
        return self._code


class _Stream:
    """The reading end of a pipe, of which the first `cap` bytes are kept."""

    def __init__(self, fd: int, cap: int) -> None:
        self.fd, self._cap = fd, cap
        self.kept = bytearray()
        self.truncated = self.strict = False

    def read(self) -> int:
        """Takes one chunk; returns its length, 0 at the end."""
        data = os.read(self.fd, _CHUNK)
        room = self._cap - len(self.kept)
        self.truncated = self.truncated or len(data) > room
        self.kept += data[:room]
        return len(data)

    def drain(self) -> None:
        """Takes what is in the pipe now; bounded, because in plain mode a stray process may go on writing."""
        with contextlib.suppress(BlockingIOError):
            for _ in range(_PIPE // _CHUNK + 1):
                if not self.read():
                    break

    def clear(self) -> None:
        self.kept.clear()
        self.truncated = False

    def text(self) -> str:
        return self.kept.decode(errors="replace")
