"""Starts a command as a plain child process: bounded in time, output and memory, and contained in nothing else."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from glm5_jax.envs.confine import Limits, Watch, rlimit_command
from glm5_jax.envs.process import Process


def launch(command: Sequence[str], limits: Limits, files: Mapping[str, bytes], env: Mapping[str, str]) -> Process:
    """Starts `command` in a new folder with `files`, which goes away with the process; the host's environment is not
    handed on, and `python` is the running interpreter, as under bubblewrap."""
    with contextlib.ExitStack() as resources:
        temporary = tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True)
        folder = Path(resources.enter_context(temporary))
        work, programs = folder / "work", folder / "bin"
        work.mkdir()
        programs.mkdir()
        for name, data in files.items():
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).write_bytes(data)
        for name in ("python", "python3"):
            (programs / name).symlink_to(python_path())
        own = {"PATH": f"{programs}:{os.defpath}", "HOME": str(work), "TMPDIR": str(folder), "LANG": "C.UTF-8"}
        return start(command, limits, own | dict(env), work, resources)


def python_path() -> str:
    return os.path.realpath(sys.executable)


def start(command: Sequence[str], limits: Limits, env: Mapping[str, str], folder: str | os.PathLike,
          resources: contextlib.ExitStack) -> Process:
    """Starts `command` in `folder`; the process takes `resources` over. Raises OSError where it cannot be run."""
    bounds = rlimit_command(limits, counted=False)
    popen = subprocess.Popen([*bounds, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, bufsize=0, env=env, cwd=folder, start_new_session=True)
    # Nobody has waited for the child yet, so its id is still its own, even if it has ended.
    leader = os.pidfd_open(popen.pid)
    resources.callback(os.close, leader)

    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(popen.pid, signal.SIGKILL)

    def exit_code(code: int, stderr: str) -> int:
        return code if code >= 0 else 128 - code

    return Process(popen, limits, leader=leader, kill=kill, meter=Watch(popen.pid, limits.memory_bytes),
                   exit_code=exit_code, resources=resources.pop_all())
