import json
import os
import pathlib
import subprocess

import jax
import numpy as np
import pytest

from glm5_jax.core import rundir
from glm5_jax.core.rundir import RunDir, git_state, write_json

CONFIG = {"model": {"layers": 3, "pattern": "SSL", "empty": {}}, "betas": (0.9, 0.95), "seed": None, "lr": 1e-3}


def load(path: pathlib.Path):
    return json.loads(path.read_text())


def snapshot(path: pathlib.Path) -> dict[str, tuple[bytes, int]]:
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in path.iterdir()}


def git(directory: pathlib.Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(["git", *identity, *arguments], cwd=directory, check=True, capture_output=True,
                          text=True).stdout.strip()


def test_create_writes_the_records(tmp_path):
    run = RunDir.create(tmp_path / "deep" / "run", config=CONFIG, overrides={"lr": 1e-3})
    assert load(run.path / "config.json") == CONFIG | {"betas": [0.9, 0.95]}
    assert load(run.path / "overrides.json") == {"lr": 1e-3}
    record = load(run.path / "versions.json")
    assert set(record) == {"python", "jax", "jaxlib", "flax", "optax", "orbax", "numpy", "platform", "backend",
                           "devices", "git"}
    assert record["jax"] == jax.__version__ and record["numpy"] == np.__version__
    assert len(record["devices"]) == jax.device_count() and record["devices"][0].startswith("cpu:0")
    assert run.metrics == run.path / "metrics.jsonl" and run.checkpoints == run.path / "checkpoints"
    assert sorted(p.name for p in run.path.iterdir()) == ["config.json", "overrides.json", "versions.json"]


def test_relative_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = RunDir.create("here", config={}, overrides={})
    monkeypatch.chdir("/")
    assert run.path == (tmp_path / "here").resolve() and run.path.is_dir() and run.checkpoints.is_absolute()


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunDir.create("~/run", config={}, overrides={}).path == (tmp_path / "run").resolve()


def test_same_config_opens_again(tmp_path):
    run = RunDir.create(tmp_path, config=CONFIG, overrides={})
    run.metrics.write_text("kept\n")
    before = load(tmp_path / "versions.json")
    assert RunDir.create(tmp_path, config=CONFIG, overrides={"other": 1}) == run
    assert run.metrics.read_text() == "kept\n"
    assert load(tmp_path / "overrides.json") == {}
    assert load(tmp_path / "versions.json") == before


def test_other_config_is_refused_and_nothing_is_touched(tmp_path):
    RunDir.create(tmp_path, config=CONFIG, overrides={})
    before = snapshot(tmp_path)
    other = {"model": {"layers": 4, "pattern": "SSL", "new": True}, "betas": (0.9, 0.99), "seed": None, "lr": 1e-3}
    with pytest.raises(ValueError) as raised:
        RunDir.create(tmp_path, config=other, overrides={})
    lines = [line.strip() for line in str(raised.value).splitlines()]
    assert lines[1:-1] == ["betas: [0.9, 0.95] -> [0.9, 0.99]", "model.empty: {} -> absent", "model.layers: 3 -> 4",
                           "model.new: absent -> true"]
    assert str(tmp_path) in lines[0] and "another --workdir" in lines[-1] and "same config" in lines[-1]
    assert snapshot(tmp_path) == before


def test_resuming_on_other_software_keeps_the_record(tmp_path, monkeypatch):
    RunDir.create(tmp_path, config={}, overrides={})
    first = load(tmp_path / "versions.json")
    for _ in range(2):
        monkeypatch.setattr(rundir, "versions", lambda: first | {"jax": "99.0"})
        RunDir.create(tmp_path, config={}, overrides={})
        assert load(tmp_path / "versions.json") == first | {"jax": "99.0", "earlier": [first]}


def test_an_interrupted_creation_starts_over(tmp_path, monkeypatch):
    replace = os.replace

    def killed(source, target):
        if pathlib.Path(target).name == "config.json":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        RunDir.create(tmp_path, config={"a": 1}, overrides={})
    monkeypatch.setattr(os, "replace", replace)
    RunDir.create(tmp_path, config={"a": 2}, overrides={"a": 2})
    assert load(tmp_path / "config.json") == load(tmp_path / "overrides.json") == {"a": 2}


def test_write_json_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": 1, "b": object()})
    assert load(path) == {"a": 1}


@pytest.mark.parametrize("workdir, message", [("gs://bucket/run", "found a URL"), ("file", "found a file")])
def test_places_that_are_no_directory(tmp_path, monkeypatch, workdir, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=message):
        RunDir.create(workdir, config={}, overrides={})
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_values_that_are_not_json_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"config.model.sizes\[1\]: expected a JSON value .* found PosixPath"):
        RunDir.create(tmp_path / "run", config={"model": {"sizes": [1, pathlib.Path("/")]}}, overrides={})
    assert not (tmp_path / "run").exists()


def test_a_broken_config_file_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: expected JSON"):
        RunDir.create(tmp_path, config={}, overrides={})


def test_git_state(tmp_path):
    file = tmp_path / "tracked.py"
    file.write_text("a = 1\n")
    assert git_state(file) is None
    git(tmp_path, "init", "-q")
    assert git_state(file) is None
    git(tmp_path, "add", "tracked.py")
    git(tmp_path, "commit", "-q", "-m", "a")
    sha = git(tmp_path, "rev-parse", "HEAD")
    assert git_state(file) == {"sha": sha, "dirty": False}
    file.write_text("a = 2\n")
    assert git_state(file) == {"sha": sha, "dirty": True}
    (tmp_path / "installed.py").write_text("")
    assert git_state(tmp_path / "installed.py") is None


def test_git_state_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(pathlib.Path(rundir.__file__)) is None
