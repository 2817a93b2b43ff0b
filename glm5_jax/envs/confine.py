"""Bounds on the memory and the processes of a whole tree: a cgroup where one can be made, else rlimits and a watch."""

import contextlib
import dataclasses
import math
import numbers
import os
import resource
import secrets
import shutil
import time
import warnings
from pathlib import Path
from typing import Protocol

MIB = 2**20
# Address space is not memory: where nothing better is at hand, one process may reserve this many times its memory.
_RESERVE = 4
_PAGE = resource.getpagesize()
# Measured: with less, the sandbox itself cannot be set up.
_LEAST = {"memory_bytes": MIB, "processes": 2, "file_bytes": 4096, "open_files": 32}


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one sandbox may use; all but the seconds are integers. Below the least values named nothing starts."""

    wall_s: float = 10.0
    """Seconds of `run`, or of one `exchange`, before the whole tree is killed."""
    cpu_s: float = 60.0
    """Processor seconds of each process, over its whole life."""
    memory_bytes: int = 512 * MIB
    """Memory of the whole tree; with a cgroup, files in the sandbox count too. 1 MiB at least; Python takes 8."""
    processes: int = 64
    """Processes and threads at one time, one of bubblewrap's own included; more cannot be started. 2 at least."""
    output_bytes: int = MIB
    """Bytes kept of stdout and of stderr, each."""
    file_bytes: int = 64 * MIB
    """Size of one file, and of each of the three writable folders: /work, /tmp, /dev/shm. 4096 at least."""
    open_files: int = 256
    """Open files of each process; 32 at least, and one more for each file that a command is given."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("wall_s", "cpu_s"):
                if not 0 < value < math.inf:
                    raise ValueError(f"Limits.{field.name}: expected a positive, finite number, found {value!r}")
                continue
            least = _LEAST.get(field.name, 1)
            if not isinstance(value, numbers.Integral) or value < least:
                raise ValueError(f"Limits.{field.name}: expected an integer from {least} up, found {value!r}")


class SandboxUnavailable(RuntimeError):
    """This machine lacks, or forbids, something that a sandbox is made with."""


class Meter(Protocol):
    """Tells whether the tree went over its memory."""

    @property
    def name(self) -> str:
        """See `Result.memory_by`."""

    def exceeded(self, largest: int = 0) -> bool:
        """`largest`: bytes of the largest process that has ended, as far as its parent knows."""


def find_program(name: str) -> str:
    """The path of a program that a sandbox is made with; raises SandboxUnavailable where there is none."""
    path = shutil.which(name)
    if path is None:
        package = "bubblewrap" if name == "bwrap" else "util-linux"
        raise SandboxUnavailable(f"{name} is not on the PATH: install the package {package} (on Debian or Ubuntu, as "
                                 f"root: apt install {package})")
    return path


def rlimit_command(limits: Limits, *, counted: bool) -> list[str]:
    """The beginning of a command line (prlimit of util-linux) that gives the rest of it its bounds.

    `counted`: a cgroup keeps count of memory. The number of processes is not among the bounds: the kernel would count
    all those of the same user.
    """
    # 1, not 0: with 0 the kernel still starts the host's crash handler where core_pattern names one.
    wanted = {"core": (1, 1), "fsize": (limits.file_bytes,) * 2, "nofile": (limits.open_files,) * 2}
    # First SIGXCPU, which names the reason, a second later SIGKILL.
    wanted["cpu"] = (math.ceil(limits.cpu_s), math.ceil(limits.cpu_s) + 1)
    if not counted:
        wanted["as"] = (_RESERVE * limits.memory_bytes,) * 2
    return [find_program("prlimit"), *(_option(name, *values) for name, values in wanted.items()), "--"]


def _option(name: str, soft: int, hard: int) -> str:
    """One option; a hard limit that is lower already stays."""
    top = resource.getrlimit(getattr(resource, f"RLIMIT_{name.upper()}"))[1]
    if top != resource.RLIM_INFINITY:
        soft, hard = min(soft, top), min(hard, top)
    return f"--{name}={soft}:{hard}"


@dataclasses.dataclass(frozen=True)
class Cgroup:
    """A control group of one sandbox; under version 1 one folder for each of two controllers, under version 2 one.

    Where this process is killed, the empty folders stay until somebody removes them.
    """

    folders: tuple[Path, ...]
    events: Path
    name: str = "cgroup"

    def add(self, pid: int) -> None:
        for folder in self.folders:
            (folder / "cgroup.procs").write_text(str(pid))

    def exceeded(self, largest: int = 0) -> bool:
        """Whether the kernel has killed a process of the group for want of memory."""
        counts = dict(line.split() for line in self.events.read_text().splitlines())
        return int(counts.get("oom_kill", 0)) > 0

    def close(self) -> None:
        # A process that was just killed may take the kernel a moment to forget.
        for folder in self.folders:
            for _ in range(100):
                with contextlib.suppress(OSError):
                    folder.rmdir()
                    break
                time.sleep(0.01)
            else:
                warnings.warn(f"{folder}: the control group of a finished sandbox could not be removed", stacklevel=2)


def open_cgroup(limits: Limits, *, root: Path = Path("/sys/fs/cgroup"),
                own: Path = Path("/proc/self/cgroup")) -> Cgroup | None:
    """A new group with the bounds on memory and processes; None where this process may not make one.

    `root` is where the hierarchies are mounted, `own` lists the groups of this process.
    """
    name = f"sandbox-{secrets.token_hex(8)}"
    memory, processes = str(limits.memory_bytes), str(limits.processes)
    if homes := _homes_v1(root, own):
        in_memory, in_pids = (home / name for home in homes)
        group = Cgroup((in_memory, in_pids), in_memory / "memory.oom_control")
        wanted = {in_memory / "memory.limit_in_bytes": memory, in_pids / "pids.max": processes}
        swap = in_memory / "memory.memsw.limit_in_bytes", memory
    elif home := _home_v2(root, own):
        folder = home / name
        group = Cgroup((folder,), folder / "memory.events")
        wanted = {folder / "memory.max": memory, folder / "memory.oom.group": "1", folder / "pids.max": processes}
        swap = folder / "memory.swap.max", "0"
    else:
        return None
    try:
        for folder in group.folders:
            folder.mkdir()
        for file, text in wanted.items():
            file.write_text(text)
        if swap[0].exists():
            swap[0].write_text(swap[1])
    except OSError:
        for folder in group.folders:
            with contextlib.suppress(OSError):
                folder.rmdir()
        return None
    return group


def _lines(own: Path) -> list[list[str]]:
    try:
        return [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return []


def _homes_v1(root: Path, own: Path) -> tuple[Path, ...]:
    """The folders (memory, pids) of this process; in a container its path may not exist, but the mount's top does."""
    found = []
    for wanted in ("memory", "pids"):
        for _, controllers, path in _lines(own):
            if wanted in controllers.split(","):
                home = root / wanted / path.lstrip("/")
                found.append(home if home.is_dir() else root / wanted)
    return tuple(found) if len(found) == 2 and all(home.is_dir() for home in found) else ()


def _home_v2(root: Path, own: Path) -> Path | None:
    """A folder whose children have both controllers: under version 2 a group that holds processes has no such children,
    so that the parent of ours is tried too."""
    for number, _, path in _lines(own):
        if number == "0":
            here = root / path.lstrip("/")
            for home in (here, here.parent) if here != root else (here,):
                with contextlib.suppress(OSError):
                    controllers = (home / "cgroup.subtree_control").read_text().split()
                    if {"memory", "pids"} <= set(controllers) and os.access(home / "cgroup.procs", os.W_OK):
                        return home
    return None


class Watch:
    """Adds up the memory of a process and its descendants when asked; between two questions it sees nothing."""

    name = "watch"

    def __init__(self, pid: int, memory_bytes: int) -> None:
        self._pid, self._limit = pid, memory_bytes

    def exceeded(self, largest: int = 0) -> bool:
        if largest >= self._limit:
            return True
        tree = _tree(self._pid)
        # Pages that processes share count for each of them, so a sum above the limit is only a reason to look closer.
        return sum(map(_resident, tree)) > self._limit and sum(map(_proportional, tree)) > self._limit


def _tree(pid: int) -> list[int]:
    found, todo = [], [pid]
    while todo:
        pid = todo.pop()
        found.append(pid)
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                with contextlib.suppress(OSError):
                    todo += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return found


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except OSError:
        return 0


def _proportional(pid: int) -> int:
    """Bytes of a process, where a page that n processes share counts an nth; all of it where that may not be read."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except PermissionError:
        return _resident(pid)
    except OSError:
        pass  # it has ended in the meantime
    return 0
