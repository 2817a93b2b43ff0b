"""Where the bounds on a tree are written, in made-up hierarchies of both versions; test_sandbox.py sees them act."""

import os
import subprocess
import sys

import pytest

from glm5_jax.envs.confine import Limits, SandboxUnavailable, Watch, find_program, open_cgroup, rlimit_command

LIMITS = Limits(memory_bytes=2_000_000, processes=7)


def hierarchy(tmp_path, own: str, **files: str):
    for name, text in files.items():
        path = tmp_path / "fs" / name.replace("__", ".").replace("_in_", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "own").write_text(own)
    return {"root": tmp_path / "fs", "own": tmp_path / "own"}


def content(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_version_1(tmp_path):
    where = hierarchy(tmp_path, "8:pids:/\n4:memory:/a\n0::/\n", memory_in_a_in_tasks="", pids_in_tasks="")
    group = open_cgroup(LIMITS, **where)
    memory, pids = group.folders
    assert (memory.parent, pids.parent) == (tmp_path / "fs/memory/a", tmp_path / "fs/pids")
    assert content(memory) == {"memory.limit_in_bytes": "2000000"}
    assert content(pids) == {"pids.max": "7"}
    group.add(12)
    assert (memory / "cgroup.procs").read_text() == (pids / "cgroup.procs").read_text() == "12"
    (memory / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 0\n")
    assert not group.exceeded()
    (memory / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 1\n")
    assert group.exceeded()


def test_version_2_beside_this_process(tmp_path):
    where = hierarchy(tmp_path, "0::/user/shell\n", user_in_cgroup__subtree_control="cpu memory pids\n",
                      user_in_cgroup__procs="", user_in_shell_in_cgroup__subtree_control="\n")
    group = open_cgroup(LIMITS, **where)
    (folder,) = group.folders
    assert folder.parent == tmp_path / "fs/user"
    assert content(folder) == {"memory.max": "2000000", "memory.oom.group": "1", "pids.max": "7"}
    (folder / "memory.events").write_text("low 0\noom 2\noom_kill 2\n")
    assert group.exceeded()


@pytest.mark.parametrize("own, control", [("0::/user/shell\n", "cpu memory"), ("0::/\n", "memory pids"), ("", "")])
def test_no_group_where_the_controllers_are_not_handed_down(tmp_path, own, control):
    where = hierarchy(tmp_path, own, user_in_cgroup__subtree_control=control, user_in_cgroup__procs="")
    assert open_cgroup(LIMITS, **where) is None


def test_a_group_that_is_left_behind_is_reported(tmp_path):
    where = hierarchy(tmp_path, "8:pids:/\n4:memory:/\n", memory_in_tasks="", pids_in_tasks="")
    group = open_cgroup(LIMITS, **where)
    with pytest.warns(UserWarning, match="could not be removed"):
        group.close()


def test_rlimits_reach_the_command():
    program = "import resource as r; print(*(r.getrlimit(k)[0] for k in (r.RLIMIT_FSIZE, r.RLIMIT_AS, r.RLIMIT_CPU)))"
    limits = Limits(file_bytes=5000, memory_bytes=2**30, cpu_s=2.5)
    command = rlimit_command(limits, counted=False)
    done = subprocess.run([*command, sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["5000", str(4 * 2**30), "3"], done.stderr
    assert not any(option.startswith("--as") for option in rlimit_command(limits, counted=True))


def test_watch_counts_the_tree_and_shared_pages_once():
    big = "import os, time; data = b'x' * 50_000_000; os.fork(); os.fork(); print(1, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", big], stdout=subprocess.PIPE, process_group=0) as process:
        for _ in range(4):
            process.stdout.readline()
        assert Watch(process.pid, 45_000_000).exceeded()
        assert not Watch(process.pid, 150_000_000).exceeded()
        os.killpg(process.pid, 9)
    assert Watch(process.pid, 100).exceeded(largest=200)
    assert not Watch(process.pid, 100).exceeded()


@pytest.mark.parametrize("name", ["wall_s", "cpu_s", "memory_bytes", "processes", "output_bytes"])
def test_limits_are_positive(name):
    with pytest.raises(ValueError, match=name):
        Limits(**{name: 0})
    with pytest.raises(ValueError, match=name):
        Limits(**{name: float("nan")})
    with pytest.raises(ValueError, match=name):
        Limits(**{name: float("inf")})


@pytest.mark.parametrize("name, least", [("memory_bytes", 2**20), ("processes", 2), ("file_bytes", 4096),
                                         ("open_files", 32), ("output_bytes", 1)])
def test_counts_are_integers_and_enough_to_start(name, least):
    Limits(**{name: least})
    for value in (least - 1, least + 0.5, float(least)):
        with pytest.raises(ValueError, match=f"Limits.{name}: expected an integer from {least}"):
            Limits(**{name: value})


def test_a_missing_program_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SandboxUnavailable, match="apt install bubblewrap"):
        find_program("bwrap")
    with pytest.raises(SandboxUnavailable, match="apt install util-linux"):
        find_program("prlimit")
