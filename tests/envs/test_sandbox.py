"""The sandbox from a user's side, and from that of a guest who wants to get out.

Without bubblewrap these tests fail with its installation hint: a machine that cannot contain must not look as if it
did.
"""

import concurrent.futures
import dataclasses
import json
import os
import signal
import socket
import sys
import tempfile
import textwrap
import time
import uuid
from pathlib import Path

import pytest

from glm5_jax.envs import bubblewrap
from glm5_jax.envs.sandbox import Limits, Outcome, Sandbox, SandboxUnavailable

MIB = 2**20
# Generous, for a loaded machine: no test waits for it unless it is about time.
ROOMY = Limits(wall_s=60, memory_bytes=200 * MIB)

# Runs the steps that a guest attempts; prints {step: what came of it}.
ATTEMPT = """
import ctypes, json, os, socket, sys
found = {}
libc = ctypes.CDLL(None, use_errno=True)
def attempt(name, function, *arguments):
    try:
        found[name] = repr(function(*arguments))
    except Exception as error:
        found[name] = type(error).__name__
"""


def guest(body: str, *arguments: str, limits: Limits = ROOMY, **options) -> dict[str, str]:
    """What came of the attempts in `body`."""
    program = f"{ATTEMPT}\n{textwrap.dedent(body)}\nprint(json.dumps(found))"
    result = Sandbox(limits=limits).run(["python", "-c", program, *arguments], **options)
    assert result.outcome is Outcome.EXIT and result.returncode == 0, result
    return json.loads(result.stdout)


def running(marker: str) -> list[str]:
    """The host's processes that have `marker` on their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker.encode() in path.read_bytes():
                found.append(str(path))
        except OSError:
            pass
    return found


@pytest.fixture
def marker() -> str:
    return f"marker-{uuid.uuid4().hex}"


@pytest.fixture(params=["cgroup", "watch"])
def meter(request, monkeypatch) -> str:
    """Both ways to bound memory and processes; where no cgroup can be made, the second one twice."""
    if request.param == "watch":
        monkeypatch.setattr(bubblewrap, "open_cgroup", lambda limits: None)
    return request.param


def limited(**limits) -> Sandbox:
    return Sandbox(limits=dataclasses.replace(ROOMY, **limits))


# What it is for.

def test_a_command_has_files_input_and_output():
    program = "import sys; print(open('data/in.txt').read(), sys.stdin.read()); print('no', file=sys.stderr); exit(3)"
    result = Sandbox(limits=ROOMY).run(["python", "main.py"], stdin="standard",
                                       files={"main.py": program, "data/in.txt": b"file"})
    assert (result.outcome, result.returncode, result.stdout, result.stderr) == ("exit", 3, "file standard\n", "no\n")


def test_python_is_this_python_and_works():
    program = """if True:
        import multiprocessing, subprocess, sys, tempfile, threading
        threading.Thread(target=print, args=["thread"]).start()
        print(subprocess.run(["sh", "-c", "echo sh"], capture_output=True, text=True).stdout, end="")
        with multiprocessing.get_context("fork").Pool(2) as pool: print(pool.map(abs, [-1, 2]))
        with tempfile.TemporaryFile() as file: file.write(b"x")
        print(sys.version, sys.executable)
    """
    sandbox = Sandbox(limits=ROOMY)
    result = sandbox.run(["python", "-c", program])
    assert result.stdout == f"thread\nsh\n[1, 2]\n{sys.version} /opt/bin/python\n", result
    assert sandbox.run([sandbox.python, "-c", "import ctypes, json, sqlite3, ssl, zlib"]).returncode == 0


def test_large_input_and_output_pass_through():
    text = "0123456789" * 90_000
    result = Sandbox(limits=ROOMY).run(["cat"], stdin=text)
    assert result.stdout == text
    assert Sandbox(limits=ROOMY).run(["true"], stdin=text).returncode == 0


def test_return_codes_are_a_shells():
    sandbox = Sandbox(limits=ROOMY)
    missing = sandbox.run(["no-such-command"])
    assert (missing.outcome, missing.returncode) == (Outcome.EXIT, 127)
    assert "no-such-command" in missing.stderr
    killed = sandbox.run(["sh", "-c", "kill -9 $$"])
    assert (killed.outcome, killed.returncode) == (Outcome.EXIT, 137)


def test_added_variables_and_folders_are_seen():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "data.txt").write_text("shared")
        sandbox = Sandbox(limits=ROOMY, env={"NAME": "value"}, read_only={"/data": folder})
        result = sandbox.run(["sh", "-c", "echo $NAME; cat /data/data.txt; touch /data/new"])
        assert result.stdout == "value\nshared", result
        assert not (folder / "new").exists()


def test_sixteen_at_once():
    sandbox = Sandbox(limits=ROOMY)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        results = list(pool.map(lambda i: sandbox.run(["sh", "-c", f"echo {i} > a; cat a"]), range(32)))
    assert [result.stdout for result in results] == [f"{i}\n" for i in range(32)]


# Out of its file system.

def test_nothing_of_the_host_can_be_read(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    secret.chmod(0o644)
    found = guest("""
        secret = sys.argv[1]
        for name in (secret, "/proc/1/root" + secret, "/proc/self/cwd/../../.." + secret, "/etc/shadow",
                     "/etc/hostname", "/root", "/home", "/sys", "/var", "/proc/kcore", "/proc/kmsg"):
            attempt(name, open, name)
        attempt("top", lambda: sorted(os.listdir("/")))
        attempt("etc", lambda: sorted(os.listdir("/etc")))
        os.symlink(sys.argv[1], "link")
        attempt("link", open, "link")
        attempt("hardlink", os.link, "/usr/bin/env", "hard")
    """, str(secret))
    top = json.loads(found.pop("top").replace("'", '"'))
    assert set(top) <= set("bin dev etc lib lib32 lib64 libx32 opt proc sbin tmp usr work".split())
    etc = json.loads(found.pop("etc").replace("'", '"'))
    assert set(etc) <= {"alternatives", "group", "hosts", "ld.so.cache", "passwd"}
    assert set(found.values()) <= {"FileNotFoundError", "PermissionError", "OSError"}, found


def test_nothing_but_its_own_folders_can_be_written():
    found = guest("""
        def write(name):
            with open(name, "r+" if os.path.exists(name) else "w") as file:
                file.write("1")
        for name in ("/new", "/usr/new", "/opt/new", "/opt/bin/new", "/opt/python/new", "/etc/new", "/dev/new",
                     "/proc/new", "/etc/passwd", "/usr/bin/env", "/opt/bin/python", "/proc/self/exe", "/proc/1/exe",
                     "/proc/sys/kernel/core_pattern", "/proc/sys/vm/overcommit_memory", "/proc/sysrq-trigger",
                     "/proc/1/uid_map", "/proc/self/uid_map"):
            attempt(name, write, name)
        attempt("remove", os.remove, "/usr/bin/env")
        attempt("chmod", os.chmod, "/usr/bin/env", 0o777)
        os.symlink("/etc", "link")
        attempt("link", write, "link/passwd")
        mounts = [line.split()[1:4] for line in open("/proc/self/mounts")]
        writable = [where for where, kind, options in mounts if options.split(",")[0] != "ro"]
        for name in ("/work/new", "/tmp/new", "/dev/shm/new"):
            write(name)
        attempt("mounts", " ".join, writable)
    """)
    mounts = {name for name in found.pop("mounts").strip("'").split() if not name.startswith(("/dev/", "/proc"))}
    assert mounts == {"/work", "/tmp"}
    assert set(found.values()) <= {"FileNotFoundError", "PermissionError", "OSError"}, found


def test_the_environment_stays_outside(monkeypatch, marker):
    monkeypatch.setenv("SECRET", marker)
    result = Sandbox(limits=ROOMY).run(["sh", "-c", "env; cat /proc/*/environ /proc/*/cmdline; cat /proc/*/cwd/none"])
    assert "HOME=/work" in result.stdout
    assert marker not in result.stdout
    assert os.getcwd() not in result.stdout
    assert sys.base_prefix == "/usr" or sys.base_prefix not in result.stdout


def test_no_descriptor_is_inherited():
    with open("/etc/hostname") as file:
        os.set_inheritable(file.fileno(), True)
        found = guest("attempt('fds', lambda: [f for f in range(1000) if os.path.exists(f'/proc/self/fd/{f}')])",
                      files={"a": "b"})
    assert found["fds"] == "[0, 1, 2]"


def test_devices_cannot_be_had():
    found = guest("""
        import stat
        attempt("block", os.mknod, "disk", 0o600 | stat.S_IFBLK, os.makedev(8, 0))
        attempt("memory", os.mknod, "mem", 0o600 | stat.S_IFCHR, os.makedev(1, 1))
        for name in ("mem", "kmsg", "port", "sda", "vda", "fuse", "kvm", "net/tun"):
            attempt(name, open, "/dev/" + name)
        attempt("all", lambda: " ".join(sorted(os.listdir("/dev"))))
    """)
    allowed = "core fd full null ptmx pts random shm stderr stdin stdout tty urandom zero"
    assert set(found.pop("all").strip("'").split()) <= set(allowed.split())
    assert set(found.values()) <= {"PermissionError", "FileNotFoundError"}, found


# Out of its user, its processes, its network.

def test_it_is_nobody_for_the_hosts_kernel(marker):
    with Sandbox(limits=ROOMY).start(["sh", "-c", "read line; echo $line; read line", marker]) as process:
        assert process.exchange("up").line == "up"
        (cmdline,) = [path for path in running(marker) if Path(path).read_text().startswith("sh")]
        status = dict(line.split(":", 1) for line in Path(cmdline).with_name("status").read_text().splitlines())
    assert "0" not in status["Uid"].split() + status["Gid"].split()
    assert status["Groups"].split() == [] or os.geteuid() != 0
    assert {status[name].strip() for name in ("CapPrm", "CapEff", "CapBnd")} == {"0" * 16}
    assert (status["NoNewPrivs"].strip(), status["Seccomp"].strip()) == ("1", "2")


def test_setuid_gains_nothing():
    found = guest("""
        import shutil, subprocess
        for name in ("setuid", "setgid", "seteuid"):
            attempt(name, getattr(os, name), 0)
        attempt("groups", os.setgroups, [0])
        shutil.copy("/usr/bin/id", "id")
        os.chmod("id", 0o6755)
        attempt("own", lambda: subprocess.run(["./id", "-u"], capture_output=True, text=True).stdout)
        attempt("su", lambda: subprocess.run(["su", "-c", "id"], capture_output=True, stdin=-3).returncode != 0)
    """)
    assert found.pop("own") == repr("65534\n")
    assert found.pop("su") in ("True", "FileNotFoundError")
    assert set(found.values()) <= {"PermissionError", "OSError"}, found


@pytest.mark.parametrize("call", ["unshare(0x10000000)", "mount(b'a', b'/tmp', b'tmpfs', 0, 0)", "setns(0, 0)",
                                  "ptrace(0, 0, 0, 0)", "chroot(b'/tmp')", "umount2(b'/tmp', 0)"])
def test_forbidden_system_calls_are_blocked(call):
    result = Sandbox(limits=ROOMY).run(["python", "-c", f"import ctypes; ctypes.CDLL(None).{call}; print('survived')"])
    assert (result.outcome, result.stdout) == (Outcome.BLOCKED, "")


def test_a_shell_passes_the_block_on():
    assert Sandbox(limits=ROOMY).run(["sh", "-c", "unshare --user true"]).outcome is Outcome.BLOCKED


def test_the_network_is_out_of_reach(tmp_path):
    abstract = f"\0{uuid.uuid4().hex}"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as named, \
            socket.socket(socket.AF_UNIX) as unnamed:
        named.bind(str(tmp_path / "socket"))
        named.listen()
        unnamed.bind(abstract)
        unnamed.listen()
        found = guest("""
            def connect(family, address):
                with socket.socket(family) as client:
                    client.settimeout(20)
                    client.connect(address)
            port = int(sys.argv[1])
            attempt("loopback", connect, socket.AF_INET, ("127.0.0.1", port))
            attempt("outside", connect, socket.AF_INET, ("192.0.2.1", 80))
            attempt("outside6", connect, socket.AF_INET6, ("2001:db8::1", 80))
            attempt("named", connect, socket.AF_UNIX, sys.argv[2])
            attempt("abstract", connect, socket.AF_UNIX, chr(0) + sys.argv[3])
            attempt("vsock", socket.socket, 40, socket.SOCK_STREAM)
            attempt("packet", socket.socket, socket.AF_PACKET, socket.SOCK_RAW)
            attempt("raw", socket.socket, socket.AF_INET, socket.SOCK_RAW)
            attempt("names", socket.getaddrinfo, "example.org", 80)
            own = socket.create_server(("localhost", 0))
            attempt("own", connect, socket.AF_INET, own.getsockname())
        """, str(server.getsockname()[1]), str(tmp_path / "socket"), abstract[1:])
    assert found.pop("own") == "None"
    assert set(found.values()) <= {"ConnectionRefusedError", "OSError", "FileNotFoundError", "PermissionError",
                                   "gaierror"}, found


def test_the_parent_cannot_be_killed(marker):
    program = "import os, signal; signal.signal(15, signal.SIG_IGN)\n" + "\n".join(
        f"try: os.kill({pid}, {number})\nexcept OSError as error: print(error)"
        for number in (15, 9) for pid in ("1", "os.getppid()", str(os.getpid()), "-1"))
    result = Sandbox(limits=ROOMY).run(["python", "-c", program, marker])
    assert result.outcome is Outcome.EXIT
    assert not running(marker)


def test_nothing_is_typed_into_a_terminal():
    found = guest("""
        import fcntl, pty, termios
        ours, theirs = pty.openpty()
        attempt("works", termios.tcgetattr, theirs)
        attempt("type", fcntl.ioctl, theirs, termios.TIOCSTI, b"x")
        attempt("terminal", open, "/dev/tty")
    """)
    assert found.pop("works").startswith("[")
    assert found == {"type": "PermissionError", "terminal": "OSError"}


# Beyond its limits.


def test_a_fork_bomb_fizzles_out(meter, marker):
    bomb = "import os\nos.setsid()\nwhile True:\n  try: os.fork()\n  except OSError: pass"
    result = limited(wall_s=1.5, processes=30).run(["python", "-c", bomb, marker])
    assert result.outcome is Outcome.TIMEOUT
    assert not running(marker)


def test_processes_are_counted(meter):
    program = """if True:
        import os, time
        made = 0
        try:
            while os.fork(): made += 1
            time.sleep(100)
        except OSError: print(made)
    """
    made = int(limited(processes=30).run(["python", "-c", program]).stdout)
    assert 20 < made < 30


def test_the_first_process_is_bound_like_the_rest(meter):
    limits = dataclasses.replace(ROOMY, processes=30, open_files=70, file_bytes=5 * MIB, cpu_s=7)
    result = Sandbox(limits=limits).run(["cat", "/proc/1/limits", "/proc/self/limits"])
    found = [line.split("  ")[0] + line[25:37].rstrip() for line in result.stdout.splitlines()]
    wanted = {"Max cpu time": 7, "Max file size": 5 * MIB, "Max core file size": 1, "Max open files": 70}
    if result.memory_by == "watch":
        wanted |= {"Max processes": 30, "Max address space": 4 * limits.memory_bytes}
    assert [found.count(f"{name} {value}") for name, value in wanted.items()] == [2] * len(wanted), result.stdout


@pytest.mark.parametrize("stream", ["1", "2"])
def test_a_gigabyte_of_output_is_cut(stream, marker):
    result = limited(output_bytes=100_000).run(["sh", "-c", f"head -c 1000000000 /dev/zero >&{stream}; true", marker])
    assert result.outcome is Outcome.OUTPUT
    assert (len(result.stdout), len(result.stderr)) == ((100_000, 0) if stream == "1" else (0, 100_000))
    assert not running(marker)


def test_output_up_to_the_limit_is_kept():
    sandbox = limited(output_bytes=1000)
    assert len(sandbox.run(["head", "-c", "1000", "/dev/zero"]).stdout) == 1000
    assert sandbox.run(["head", "-c", "1001", "/dev/zero"]).outcome is Outcome.OUTPUT


@pytest.mark.parametrize("program", ["while True: held.append(b'x' * 10**6)",
                                     "os.fork(); os.fork()\nwhile True: held.append(b'x' * 10**6)"])
def test_allocating_without_end_is_stopped(meter, program, marker):
    result = limited(memory_bytes=60 * MIB).run(["python", "-c", f"import os; held = []\n{program}", marker])
    assert result.outcome is Outcome.MEMORY, result
    assert not running(marker)


def test_the_disk_cannot_be_filled():
    found = guest("""
        def fill(folder):
            total = 0
            try:
                for i in range(100):
                    with open(f"{folder}/{i}", "wb", buffering=0) as file:
                        total += file.write(bytes(10**6))
            except OSError as error:
                return total, type(error).__name__
        for folder in ("/work", "/tmp", "/dev/shm"):
            attempt(folder, fill, folder)
        attempt("one", lambda: open("/tmp/0", "wb").truncate(5 * 10**6))
        attempt("many", lambda: [open("/dev/null") for _ in range(1000)])
    """, limits=dataclasses.replace(ROOMY, file_bytes=4 * MIB))
    assert found.pop("one") == found.pop("many") == "OSError"
    for folder, text in found.items():
        total, error = json.loads(text.replace("(", "[").replace(")", "]").replace("'", '"'))
        assert 3 * MIB < total <= 4 * MIB and error == "OSError", folder


@pytest.mark.parametrize("command", [
    "sleep 1000",
    "trap '' TERM INT HUP; while true; do sleep 1000; done",
    "setsid sh -c 'sleep 1000' marker & wait",
    "exec >&- 2>&- <&-; sleep 1000",
])
def test_sleeping_past_the_limit_is_stopped(command, marker):
    result = limited(wall_s=0.5).run(["sh", "-c", command.replace("marker", marker), marker])
    assert (result.outcome, result.returncode) == (Outcome.TIMEOUT, None)
    assert not running(marker)


def test_processor_time_is_limited(marker):
    result = limited(cpu_s=1).run(["python", "-c", "while True: pass", marker])
    assert result.outcome is Outcome.TIMEOUT
    assert not running(marker)


def test_a_daemon_does_not_survive_its_command(marker):
    daemon = "import os, time\nif os.fork() == 0:\n os.setsid()\n if os.fork() == 0:\n  time.sleep(1000)\n os._exit(0)"
    result = Sandbox(limits=ROOMY).run(["python", "-c", f"{daemon}\nprint('done')", marker])
    assert (result.outcome, result.stdout) == (Outcome.EXIT, "done\n")
    assert not running(marker)


def test_nothing_is_left_open_in_this_process():
    def run():
        for command in (["true"], ["no-such-command"], ["yes"]):
            Sandbox(limits=ROOMY).run(command, files={"a": "b"})
    run()
    before = set(os.listdir("/proc/self/fd"))
    run()
    assert len(os.listdir("/proc/self/fd")) <= len(before)


@pytest.mark.parametrize("command, code", [("exit 3", 3), ("kill -9 $$", 137)])
def test_a_host_may_ignore_the_end_of_its_children(command, code):
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        result = Sandbox(limits=ROOMY).run(["sh", "-c", command])
        assert limited(wall_s=0.5).run(["sleep", "1000"]).outcome is Outcome.TIMEOUT
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert (result.outcome, result.returncode) == (Outcome.EXIT, code)


def test_the_least_limits_are_enough_to_start(meter):
    least = Limits(wall_s=60, memory_bytes=MIB, processes=2, file_bytes=4096, open_files=40)
    result = Sandbox(limits=least).run(["true"], files={str(i): "" for i in range(8)})
    assert (result.outcome, result.returncode) == (Outcome.EXIT, 0), result


# Talking to a process.

def test_lines_are_exchanged_until_the_block_is_left(marker):
    program = "while read a; do echo $a >&2; echo got $a; done"
    with Sandbox(limits=ROOMY).start(["sh", "-c", program, marker]) as process:
        assert len(running(marker)) > 0
        replies = [process.exchange(line) for line in ("one", "two")]
        with pytest.raises(ValueError, match="line end"):
            process.exchange("a\nb")
    assert [(reply.outcome, reply.line, reply.stderr) for reply in replies] == [
        (None, "got one", "one\n"), (None, "got two", "two\n")]
    assert not running(marker)
    with pytest.raises(ValueError, match="ended"):
        process.exchange("three")


@pytest.mark.parametrize("program, outcome", [
    ("sleep 1000", Outcome.TIMEOUT),
    ("read a; exit 7", Outcome.EXIT),
    ("read a; head -c 1000000 /dev/zero; sleep 1000", Outcome.OUTPUT),
])
def test_an_exchange_tells_how_the_process_ended(program, outcome, marker):
    with limited(output_bytes=1000).start(["sh", "-c", program, marker]) as process:
        reply = process.exchange("go", wall_s=0.5 if outcome is Outcome.TIMEOUT else 60)
        assert not running(marker)
    assert (reply.outcome, reply.returncode) == (outcome, 7 if outcome is Outcome.EXIT else None)


def test_stderr_of_an_exchange_is_cut():
    program = "while read a; do head -c 5000 /dev/zero >&2; echo ok; done"
    with limited(output_bytes=1000).start(["sh", "-c", program]) as process:
        first, second = process.exchange("a"), process.exchange("b")
    assert [(len(r.stderr), r.truncated, r.line) for r in (first, second)] == [(1000, True, "ok")] * 2


def test_a_sandbox_killed_from_outside_is_told(marker):
    with Sandbox(limits=ROOMY).start(["sh", "-c", "read a; echo ready; sleep 1000", marker]) as process:
        assert process.exchange("").line == "ready"
        os.kill(process._popen.pid, signal.SIGKILL)
        result = process.finish()
    assert (result.outcome, result.returncode) == (Outcome.KILLED, None)
    assert not running(marker)


# Without bubblewrap.

def test_a_missing_bubblewrap_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxUnavailable, match="install the package"):
        Sandbox().run(["true"])


def test_an_unusable_bubblewrap_is_an_error(monkeypatch):
    program = bubblewrap.find_program
    monkeypatch.setattr(bubblewrap, "find_program", lambda name: program("false" if name == "bwrap" else name))
    with pytest.raises(SandboxUnavailable, match="user namespaces"):
        Sandbox().run(["true"])


def test_bubblewraps_own_complaint_is_passed_on(tmp_path):
    with pytest.raises(SandboxUnavailable, match="not-there"):
        Sandbox(read_only={"/data": tmp_path / "not-there"}).run(["true"])


def test_plain_mode_warns_and_keeps_to_the_limits(marker):
    with pytest.warns(UserWarning, match="protects nothing"):
        sandbox = Sandbox(mode="subprocess", limits=dataclasses.replace(ROOMY, wall_s=60, output_bytes=1000))
    result = sandbox.run(["python", "main.py"], stdin="in", files={
        "main.py": "import os, sys; print(sys.version, sys.stdin.read(), os.environ.get('USER'))"})
    assert (result.outcome, result.stdout) == (Outcome.EXIT, f"{sys.version} in None\n")
    assert sandbox.run(["no-such-command"]).returncode == 127
    assert sandbox.run(["sh", "-c", "kill -9 $$"]).returncode == 137
    assert sandbox.run(["sh", "-c", "sleep 1000 & yes", marker]).outcome is Outcome.OUTPUT
    assert sandbox.run([sandbox.python, "-c", "held = []\nwhile True: held.append(b'x' * 10**6)"]).outcome == "memory"
    with pytest.warns(UserWarning):
        hasty = dataclasses.replace(sandbox, limits=Limits(wall_s=0.5))
    assert hasty.run(["sh", "-c", f"sh -c 'sleep 1000' {marker} & wait"]).outcome is Outcome.TIMEOUT
    # The group was killed, but nobody waits for those of it that are not the command itself.
    for _ in range(600):
        if not running(marker):
            break
        time.sleep(0.05)
    assert not running(marker)


def test_a_large_host_is_not_mistaken_for_a_large_guest():
    """The kernel hands the peak of a process on to its children."""
    ballast = b"x" * (150 * MIB)
    with pytest.warns(UserWarning):
        sandbox = Sandbox(mode="subprocess", limits=dataclasses.replace(ROOMY, memory_bytes=100 * MIB))
    assert sandbox.run(["python", "-c", "print(1)"]).outcome is Outcome.EXIT
    del ballast


@pytest.mark.parametrize("make, message", [
    (lambda: Sandbox(mode="docker"), "mode"),
    (lambda: Sandbox(read_only={"data": "/usr"}), "absolute"),
    (lambda: Sandbox().run("ls"), "list"),
    (lambda: Sandbox().run([]), "list"),
    (lambda: Sandbox().run(["a\0b"]), "NUL"),
    (lambda: Sandbox().run(["true"], files={"../up": ""}), "working directory"),
    (lambda: Sandbox().run(["true"], files={"/top": ""}), "working directory"),
    (lambda: Sandbox().run(["true"], files={str(i): "" for i in range(200)}), "128 files"),
    (lambda: Sandbox(limits=Limits(file_bytes=5000)).run(["true"], files={"a": "x" * 5001}), "file_bytes=5000"),
    (lambda: Sandbox(limits=Limits(open_files=34)).run(["true"], files={"a": "", "b": "", "c": ""}), "open_files=34"),
    (lambda: Sandbox().run(["true"], files={"a": "", "a/b/c": ""}), "files: expected 'a' to be a file or a folder"),
    (lambda: Sandbox().run(["true"], files={"a": "", "./a": ""}), "files: .* found './a' a second time"),
    (lambda: Sandbox().run(["true"], files={"a/": ""}), "files: .* found 'a/'"),
    (lambda: Sandbox().run(["true"], files={"ä" * 128: ""}), "files: expected names of 255"),
    (lambda: Sandbox().run(["true"], files={"/".join("a" * 2001): ""}), "paths of 4000"),
    (lambda: Sandbox(env={"": "x"}), "Sandbox.env: expected names without ="),
    (lambda: Sandbox(env={"A=B": "x"}), "Sandbox.env: .*'A=B'"),
    (lambda: Sandbox(env={"A": "x\0"}), "Sandbox.env: .*values without NUL"),
    (lambda: Sandbox(env={"A": "x" * 2**17}), "Sandbox.env: .*pass it as a file"),
    (lambda: Sandbox().run(["true", "x" * 2**17]), "command: .*pass it as a file"),
])
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("wall_s", [float("nan"), float("inf")])
def test_the_time_of_an_exchange_is_finite(wall_s):
    with Sandbox(limits=ROOMY).start(["cat"]) as process:
        with pytest.raises(ValueError, match="wall_s"):
            process.exchange("a", wall_s=wall_s)
        assert process.exchange("b").line == "b"


def test_arguments_at_their_limits_pass():
    sandbox = dataclasses.replace(limited(), env={"A": "x" * (2**17 - 3)})
    result = sandbox.run(["sh", "-c", "cat */* && echo ${#A} ${#1}", "sh", "y" * (2**17 - 1)],
                         files={f"{'ä' * 127}/./{'b' * 255}": "in\n"})
    assert (result.stdout, result.stderr) == (f"in\n{2**17 - 3} {2**17 - 1}\n", "")
