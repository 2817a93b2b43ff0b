"""Runs commands that nobody has read, such as a model's, under bubblewrap.

What is contained. The guest sees a file system of its own: /usr, the running Python, three folders in memory of bounded
size (/work, /tmp, /dev/shm), a minimal /dev, its own /proc, and a handful of made-up files in /etc; nothing else of the
host, not even its environment. It has no network but a loopback of its own, and its own process, IPC, host name and
user namespaces. Inside it is nobody; for the host's kernel it is the user who runs this, or nobody where that is
root; it has no capabilities and no way to gain any. A filter takes away the system calls that lead out of a sandbox.
Time, memory, processes, files and output are bounded, and when the command ends or hits a limit, everything it started
is killed before the result is returned. Should this process itself be killed, the kernel kills bubblewrap and with it
the guest; three things may stay behind: a bubblewrap that waits to be let go and never ran the command, empty folders
of cgroups, and, until its own limit on processor time, a guest that was being let go in that very moment or that has
tampered with its process 1.

What is not. The guest talks to the host's kernel: an error in it, or in the processor (caches, timing), is a way out;
where that matters, run the sandbox in a virtual machine. All that everybody may read below /usr and the Python's own
folder can be read, and the names of mounted folders can be learned. The processors are shared: a guest slows its
neighbours down within its time. Where no cgroup can be made (`Result.memory_by` is "watch"), memory is looked at twenty
times a second, a burst between two looks is bounded for each process alone, and what the kernel keeps for files in
memory is not counted. A guest without bubblewrap, `mode="subprocess"`, is contained in nothing: limits on time, output
and memory stop accidents, the number of processes has none, and a process that leaves its session survives.
"""

import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Literal

from glm5_jax.envs import bubblewrap, plain
from glm5_jax.envs.confine import Limits, SandboxUnavailable
from glm5_jax.envs.process import Outcome, Process, Reply, Result

__all__ = ["Limits", "Outcome", "Process", "Reply", "Result", "Sandbox", "SandboxUnavailable"]

# Each file is a descriptor of the process that starts the sandbox.
_MOST_FILES = 128
# What bubblewrap itself opens, with room to spare.
_OWN_FILES = 32
_LONGEST_NAME = 255
_LONGEST_PATH = 4000
# The kernel's limit for one argument, and for one variable with its name, the final NUL included.
_LONGEST_ARGUMENT = 2**17
_NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class Sandbox:
    """How commands are run; holds nothing open, so one may be shared by threads.

    A command finds its files in the working directory, and the running Python, without its site packages where that is
    a virtual environment, as `python`. `mode="subprocess"` runs commands without protection and warns of it.
    """

    mode: Literal["bubblewrap", "subprocess"] = "bubblewrap"
    limits: Limits = Limits()
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Added to the few variables that a guest has."""
    read_only: Mapping[str, str | os.PathLike] = dataclasses.field(default_factory=dict)
    """{absolute path inside: folder or file of the host} that the guest may read; under bubblewrap only. Where this
    process is root, every user must be able to reach them: the guest is nobody."""

    def __post_init__(self) -> None:
        if self.mode not in ("bubblewrap", "subprocess"):
            raise ValueError(f'Sandbox.mode: expected "bubblewrap" or "subprocess", found {self.mode!r}')
        for inside in self.read_only:
            if not inside.startswith("/") or ".." in PurePosixPath(inside).parts:
                raise ValueError(f"Sandbox.read_only: expected absolute paths inside, found {inside!r}")
        for name, value in self.env.items():
            if not name or "=" in name or "\0" in name + value:
                raise ValueError(f"Sandbox.env: expected names without = and NUL, and values without NUL, found "
                                 f"{name!r}: {value[:100]!r}")
            if len(f"{name}={value}".encode()) >= _LONGEST_ARGUMENT:
                raise ValueError(f"Sandbox.env: expected less than {_LONGEST_ARGUMENT} bytes each, found more in "
                                 f"{name[:100]!r}; pass it as a file")
        if self.mode == "subprocess":
            if self.read_only:
                raise ValueError("Sandbox.read_only: a plain subprocess sees the whole host; leave it empty")
            warnings.warn('Sandbox(mode="subprocess") protects nothing: a command can read, write and send whatever '
                          "this user can. Use it for trusted code only", stacklevel=3)

    @property
    def python(self) -> str:
        """The path of the interpreter as a command sees it."""
        return bubblewrap.python_path() if self.mode == "bubblewrap" else plain.python_path()

    def run(self, command: Sequence[str], *, stdin: str = "",
            files: Mapping[str, str | bytes] = _NOTHING) -> Result:
        """Runs a command to its end or to a limit, which kills all it started.

        `files`: {relative path: content} for the working directory, 128 files and `limits.file_bytes` at most. A
        command that is not found exits with 127. Raises SandboxUnavailable where this machine cannot make a sandbox,
        ValueError for arguments that no command can have.
        """
        with self.start(command, files=files) as process:
            return process.finish(stdin)

    def start(self, command: Sequence[str], *, files: Mapping[str, str | bytes] = _NOTHING) -> Process:
        """Starts a command to talk to; leave its `with` block and all it started is killed. Arguments as for `run`."""
        if isinstance(command, (str, bytes)) or not command:
            raise ValueError(f"command: expected a list such as ['python', 'main.py'], found {command!r}")
        for text in command:
            if "\0" in text:
                raise ValueError(f"command: expected text without NUL characters, found {text!r}")
            if len(os.fsencode(text)) >= _LONGEST_ARGUMENT:
                raise ValueError(f"command: expected less than {_LONGEST_ARGUMENT} bytes in each argument, found more "
                                 f"in the one that begins {text[:100]!r}; pass it as a file")
        content = self._checked(files)
        if self.mode == "subprocess":
            return plain.launch(command, self.limits, content, self.env)
        return bubblewrap.launch(command, self.limits, content, bubblewrap.environment() | dict(self.env),
                                 self.read_only)

    def _checked(self, files: Mapping[str, str | bytes]) -> dict[str, bytes]:
        content: dict[str, bytes] = {}
        for name, data in files.items():
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name or name.endswith("/"):
                raise ValueError(f"files: expected paths of files within the working directory, found {name!r}")
            if len(name.encode()) > _LONGEST_PATH or any(len(part.encode()) > _LONGEST_NAME for part in path.parts):
                raise ValueError(f"files: expected names of {_LONGEST_NAME} and paths of {_LONGEST_PATH} bytes at most,"
                                 f" found {name!r}")
            if str(path) in content:
                raise ValueError(f"files: expected each path once, found {name!r} a second time")
            content[str(path)] = data.encode() if isinstance(data, str) else data
        for name in content:
            for parent in map(str, PurePosixPath(name).parents):
                if parent in content:
                    raise ValueError(f"files: expected {parent!r} to be a file or a folder, found it beside {name!r}")
        if len(content) + _OWN_FILES > self.limits.open_files:
            raise ValueError(f"files: expected {self.limits.open_files - _OWN_FILES} at most with "
                             f"Limits.open_files={self.limits.open_files}, found {len(content)}")
        total = sum(map(len, content.values()))
        if len(content) > _MOST_FILES or total > self.limits.file_bytes:
            raise ValueError(f"files: expected {_MOST_FILES} files and Limits.file_bytes={self.limits.file_bytes} bytes"
                             f" at most, found {len(content)} files, {total} bytes; pack them, or use read_only")
        return content
