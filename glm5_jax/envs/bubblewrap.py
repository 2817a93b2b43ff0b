"""Starts a command under bubblewrap: what the guest sees, who it is, and how the host gets hold of it in time."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from glm5_jax.envs import seccomp
from glm5_jax.envs.confine import (Limits, SandboxUnavailable, Watch, find_program, open_cgroup,
                                   rlimit_command)
from glm5_jax.envs.process import Process

WORK = "/work"
_PYTHON_HOME = "/opt/python"
_NOBODY = "65534"
_START_S = 30.0
_ETC = {
    "/etc/passwd": b"guest:x:65534:65534::/work:/bin/sh\n",
    "/etc/group": b"guest:x:65534:\n",
    "/etc/hosts": b"127.0.0.1 localhost\n::1 localhost\n",
}
# Gives an interpreter that only root can reach a second path, in a mount namespace that ends with the sandbox.
_SHOW = 'mount --bind "$1" /mnt && shift && exec "$@"'
# Within the new user namespace, where the kernel's count of a user's processes concerns the guest alone. Process 1 is
# bound too, for the guest may do with it as it likes.
_COUNT = 'prlimit --pid 1 --nproc="$0" && prlimit --pid $$ --nproc="$0" && exec "$@"'


def launch(command: Sequence[str], limits: Limits, files: Mapping[str, bytes], env: Mapping[str, str],
           read_only: Mapping[str, str | os.PathLike]) -> Process:
    """Starts `command` in a sandbox of its own; the arguments are those of `Sandbox`. Raises SandboxUnavailable."""
    with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
        passed: list[int] = []

        def give(fd: int) -> int:
            theirs.callback(os.close, fd)
            passed.append(fd)
            return fd

        def hand_over(data: bytes) -> str:
            """The number of a descriptor from which the child reads `data`."""
            fd = give(os.memfd_create("sandbox"))
            os.write(fd, data)
            os.lseek(fd, 0, os.SEEK_SET)
            return str(fd)

        status, status_child = os.pipe()
        ours.callback(os.close, status)
        give(status_child)
        gate_child, gate = os.pipe()
        ours.callback(os.close, gate)
        give(gate_child)
        prelude, home = _prelude()
        options = ["--json-status-fd", str(status_child), "--block-fd", str(gate_child),
                   "--seccomp", hand_over(_filter()), *_view(home, limits, read_only)]
        for path, data in {**_ETC, **{f"{WORK}/{name}": data for name, data in files.items()}}.items():
            options += ["--file", hand_over(data), path]
        for name, value in env.items():
            options += ["--setenv", name, value]
        options += ["--remount-ro", "/"]
        # Handed over unseen, for the guest may read the command line of its first process.
        arguments = hand_over(b"".join(option.encode() + b"\0" for option in options))
        group = open_cgroup(limits)
        if group is not None:
            ours.callback(group.close)
        bounds = rlimit_command(limits, counted=group is not None)
        count = [] if group is not None else ["/bin/sh", "-c", _COUNT, f"{limits.processes}:{limits.processes}"]
        outside = [*bounds, *prelude, find_program("bwrap"), "--args", arguments, "--"]
        popen = subprocess.Popen([*outside, *count, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE, bufsize=0, pass_fds=passed, env={"PATH": os.defpath}, cwd="/",
                                 start_new_session=True)
        theirs.close()
        pid = leader = None

        def kill() -> None:
            if leader is not None:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(leader, signal.SIGKILL)

        try:
            pid = _first_pid(status)
            leader = os.pidfd_open(pid)
            ours.callback(os.close, leader)
            if group is not None:
                group.add(pid)
            os.write(gate, b"1")
        except BaseException as error:
            kill()
            popen.kill()
            stderr = popen.communicate()[1].decode(errors="replace")
            if isinstance(error, (ProcessLookupError, BrokenPipeError, _NoStart)):
                raise _unavailable(stderr) from error
            raise

        def exit_code(code: int, stderr: str) -> int | None:
            # bubblewrap reports an exit code only where the command got to run, and gives a reason where it did not.
            for line in _rest(status).splitlines():
                if "exit-code" in (report := json.loads(line)):
                    return report["exit-code"]
            if code < 0 or not stderr.startswith("bwrap:"):
                return None
            if stderr.startswith("bwrap: execvp"):
                return 127
            raise _unavailable(stderr)

        return Process(popen, limits, leader=leader, kill=kill, meter=group or Watch(pid, limits.memory_bytes),
                       exit_code=exit_code, resources=ours.pop_all())


def python_path() -> str:
    """Where the guest finds the interpreter that runs this process."""
    home = _interpreter_home()
    program = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return f"{home if _within_usr(home) else _PYTHON_HOME}/bin/{program}"


def environment() -> dict[str, str]:
    """The guest's whole environment."""
    found = {"PATH": "/opt/bin:/usr/local/bin:/usr/bin:/bin", "HOME": WORK, "TMPDIR": "/tmp", "LANG": "C.UTF-8"}
    if not _within_usr(_interpreter_home()):
        # A shared libpython is looked for where it was built; that path does not exist inside.
        found["LD_LIBRARY_PATH"] = f"{_PYTHON_HOME}/lib"
    return found


def _view(home: str, limits: Limits, read_only: Mapping[str, str | os.PathLike]) -> list[str]:
    """The options that make namespaces and the file system."""
    options = ["--unshare-all", "--die-with-parent", "--new-session", "--hostname", "sandbox", "--clearenv",
               "--uid", _NOBODY, "--gid", _NOBODY, "--ro-bind", "/usr", "/usr"]
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        path = Path("/", name)
        if path.is_symlink():
            options += ["--symlink", os.readlink(path), str(path)]
        elif path.is_dir():
            options += ["--ro-bind", str(path), str(path)]
    for kept in ("/etc/ld.so.cache", "/etc/alternatives"):
        options += ["--ro-bind-try", kept, kept]
    if not _within_usr(home):
        options += ["--ro-bind", home, _PYTHON_HOME]
    for name in ("python", "python3"):
        options += ["--symlink", python_path(), f"/opt/bin/{name}"]
    for inside, outside in read_only.items():
        options += ["--ro-bind", str(Path(outside).resolve()), inside]
    options += ["--proc", "/proc", "--dev", "/dev"]
    for folder in ("/dev/shm", "/tmp", WORK):
        options += ["--size", str(limits.file_bytes), "--tmpfs", folder]
    return options + ["--remount-ro", "/dev", "--chdir", WORK]


def _prelude() -> tuple[list[str], str]:
    """The command that makes bubblewrap run without privileges, and the path of the interpreter's home for it.

    Root would stay root in the eyes of the host's kernel, which alone allows it to write below /proc/sys: it becomes
    nobody first. An interpreter below a folder that only root may enter is then out of reach, hence the second path.
    """
    home = _interpreter_home()
    if os.geteuid() != 0:
        return [], home
    drop = [find_program("setpriv"), f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups", "--"]
    if all(folder.stat().st_mode & 0o001 for folder in (Path(home), *Path(home).parents)):
        return drop, home
    return [find_program("unshare"), "--mount", "--", find_program("sh"), "-c", _SHOW, "sh", home, *drop], "/mnt"


def _interpreter_home() -> str:
    home = os.path.realpath(sys.base_prefix)
    program = Path(home, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}")
    if not program.exists():
        raise SandboxUnavailable(f"{program}: expected the interpreter of sys.base_prefix there, found none")
    return home


def _within_usr(home: str) -> bool:
    return PurePosixPath(home).is_relative_to("/usr")


def _filter() -> bytes:
    try:
        return seccomp.program()
    except ValueError as error:
        raise SandboxUnavailable(str(error)) from error


def _unavailable(stderr: str) -> SandboxUnavailable:
    found = stderr.strip() or "it ended without a word"
    return SandboxUnavailable(
        f"bubblewrap could not make a sandbox here: {found}. It needs version 0.7 or newer, and user namespaces for "
        "unprivileged users: ask for the sysctls user.max_user_namespaces > 0, kernel.unprivileged_userns_clone=1 and "
        "kernel.apparmor_restrict_unprivileged_userns=0, as far as they exist; in a container, for a seccomp profile "
        'that allows unshare and mount, and for an unmasked /proc. Sandbox(mode="subprocess") does without protection, '
        "for trusted code only")


class _NoStart(Exception):
    """The child ended, or took too long, before it told its process id."""


def _first_pid(status: int) -> int:
    """The id of the sandbox's first process, which waits at the gate."""
    text = b""
    poll = select.poll()
    poll.register(status, select.POLLIN)
    while b"\n" not in text:
        chunk = os.read(status, 4096) if poll.poll(_START_S * 1000) else b""
        if not chunk:
            raise _NoStart
        text += chunk
    return json.loads(text.splitlines()[0])["child-pid"]


def _rest(fd: int) -> bytes:
    text = b""
    while chunk := os.read(fd, 4096):
        text += chunk
    return text
