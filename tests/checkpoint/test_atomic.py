"""A directory appears whole or not at all: after success, after an error, after kill -9 at every stage."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from glm5_jax.checkpoint import atomic


def fill(target, text, **parts):
    with atomic.replacing(target) as partial:
        (partial / "a").write_text(text)
        (partial / "b").write_text(text)


def read(target):
    return sorted((file.name, file.read_text()) for file in target.iterdir())


def test_it_takes_the_place_of_the_one_before(tmp_path):
    target = tmp_path / "deep" / "it"
    for text in ("one", "two", "three"):
        fill(target, text)
        assert read(target) == [("a", text), ("b", text)]
        assert os.listdir(tmp_path / "deep") == ["it"]


def test_an_error_leaves_everything_as_it_was(tmp_path):
    fill(tmp_path / "it", "one")
    with pytest.raises(RuntimeError):
        with atomic.replacing(tmp_path / "it") as partial:
            (partial / "a").write_text("half")
            raise RuntimeError
    assert read(tmp_path / "it") == [("a", "one"), ("b", "one")] and os.listdir(tmp_path) == ["it"]


def test_a_link_is_followed_and_a_file_is_refused(tmp_path):
    fill(tmp_path / "real", "one")
    (tmp_path / "link").symlink_to("real")
    fill(tmp_path / "link", "two")
    assert (tmp_path / "link").is_symlink() and read(tmp_path / "real") == [("a", "two"), ("b", "two")]
    with pytest.raises(NotADirectoryError, match="found a file"):
        fill(tmp_path / "real" / "a", "three")


def test_two_at_once_are_told_apart(tmp_path):
    with atomic.replacing(tmp_path / "it") as partial:
        (partial / "a").write_text("first")
        with pytest.raises(BlockingIOError, match="another process is writing it"):
            fill(tmp_path / "it", "second")
        atomic.recover(tmp_path / "it")  # a reader leaves the writer alone
    assert read(tmp_path / "it") == [("a", "first")]


# Dies at the n-th of the calls that change directories; where `swap` is false, as a system that cannot exchange two.
KILLED = """
    import os, signal, sys
    from glm5_jax.checkpoint import atomic
    target, stage, swap = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "swap"
    calls = 0

    def dying(function):
        def call(*arguments, **options):
            global calls
            calls += 1
            if calls == stage:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)
        return call

    atomic.os.rename, atomic.shutil.rmtree = dying(os.rename), dying(atomic.shutil.rmtree)
    atomic._exchange = dying(atomic._exchange) if swap else lambda *_: False
    with atomic.replacing(target) as partial:
        for name in "ab":
            (partial / name).write_text("new")
            os.kill(os.getpid(), signal.SIGKILL) if stage == 0 else None
    print("survived")
"""


@pytest.mark.parametrize("way", ["swap", "two renames"])
def test_killed_at_every_stage(way, tmp_path):
    outcomes = []
    for stage in range(9):
        target = tmp_path / f"it{stage}"
        fill(target, "old")
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), str(target), str(stage), way],
                              capture_output=True, text=True)
        atomic.recover(target)
        assert not [name for name in os.listdir(tmp_path) if name.endswith(".partial")]
        found = read(target)
        assert found in ([("a", "old"), ("b", "old")], [("a", "new"), ("b", "new")]), (stage, done.stderr)
        outcomes.append((done.returncode == -signal.SIGKILL, found[0][1]))
        fill(target, "next")
        assert read(target) == [("a", "next"), ("b", "next")]
        assert sorted(os.listdir(tmp_path)) == [f"it{i}" for i in range(stage + 1)]
    assert outcomes[0] == (True, "old") and outcomes[-1] == (False, "new")
    assert (True, "new") in outcomes and (True, "old") in outcomes[1:]


def test_a_writer_that_comes_late_waits_for_nobody_and_harms_nobody(tmp_path, monkeypatch):
    """The lock is held until the former directory is gone: the next writer cannot lose its files to that."""
    fill(tmp_path / "it", "one")
    refused = []
    rmtree = atomic.shutil.rmtree

    def late(path, **options):
        if not refused:
            refused.append(True)
            with pytest.raises(BlockingIOError):
                fill(tmp_path / "it", "late")
        rmtree(path, **options)

    monkeypatch.setattr(atomic.shutil, "rmtree", late)
    fill(tmp_path / "it", "two")
    monkeypatch.undo()
    assert refused and read(tmp_path / "it") == [("a", "two"), ("b", "two")] and os.listdir(tmp_path) == ["it"]


def test_what_cannot_be_replaced_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for target in (".", tmp_path / "here", tmp_path):
        with pytest.raises(OSError, match="found a mount point or the working directory"):
            fill(target, "one")
    monkeypatch.setattr(atomic.os.path, "ismount", lambda path: True)
    with pytest.raises(OSError, match="found a mount point or the working directory"):
        fill(tmp_path / "elsewhere", "one")


def test_the_mode_of_a_directory_stays(tmp_path):
    fill(tmp_path / "it", "one")
    (tmp_path / "it").chmod(0o700)
    fill(tmp_path / "it", "two")
    assert (tmp_path / "it").stat().st_mode & 0o777 == 0o700
