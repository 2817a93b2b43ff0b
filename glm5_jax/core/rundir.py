"""The directory of one run: what was asked, what it ran on, its metrics and its checkpoints."""

import dataclasses
from importlib import metadata
import json
import os
import pathlib
import platform
import subprocess
from typing import Any

import jax

_PACKAGES = {"jax": "jax", "jaxlib": "jaxlib", "flax": "flax", "optax": "optax", "orbax": "orbax-checkpoint",
             "numpy": "numpy"}


@dataclasses.dataclass(frozen=True)
class RunDir:
    """Holds `config.json` (resolved), `overrides.json`, `versions.json`, `metrics.jsonl` and `checkpoints`."""

    path: pathlib.Path

    @property
    def metrics(self) -> pathlib.Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> pathlib.Path:
        return self.path / "checkpoints"

    @classmethod
    def create(cls, workdir: str | os.PathLike, *, config: dict, overrides: dict) -> "RunDir":
        """Makes the directory and writes the records, or opens it again for the same config.

        `config` and `overrides` must hold JSON values (tuples count as lists). Only process 0 writes. Raises
        ValueError, with nothing changed, where the directory belongs to a run of another config, is no directory, or is
        a URL.
        When a run is resumed on other software or devices, `versions.json` describes the newest start and keeps the
        ones before under "earlier".
        """
        if "://" in os.fspath(workdir):
            raise ValueError(f"workdir {os.fspath(workdir)}: expected a local directory, found a URL")
        path = pathlib.Path(workdir).expanduser().resolve()
        if path.exists() and not path.is_dir():
            raise ValueError(f"workdir {path}: expected a directory, found a file; pass another --workdir")
        config, overrides = _as_json("config", config), _as_json("overrides", overrides)
        config_file, versions_file = path / "config.json", path / "versions.json"
        if config_file.exists():
            _check_same(path, _flat(_read(config_file)), _flat(config))
        path.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            write_json(versions_file, _with_earlier(versions(), versions_file))
            if not config_file.exists():
                write_json(path / "overrides.json", overrides)
                write_json(config_file, config)  # last: it marks the records as complete
        return cls(path)


def versions() -> dict[str, Any]:
    """What the run stands on: versions, platform, devices, and the git commit of the library where it has one."""
    record: dict[str, Any] = {"python": platform.python_version()}
    record |= {name: metadata.version(package) for name, package in _PACKAGES.items()}
    record |= {"platform": platform.platform(), "backend": jax.default_backend(),
               "devices": [f"{d.platform}:{d.id} {d.device_kind}" for d in jax.devices()]}
    return record | {"git": git_state(pathlib.Path(__file__))}


def git_state(file: pathlib.Path) -> dict[str, Any] | None:
    """`{"sha": ..., "dirty": ...}` of the checkout that tracks `file`, or None.

    A file that merely lies inside a checkout, such as a package in a virtual environment, has none.
    """
    tracked = _git(file.parent, "ls-files", "--error-unmatch", file.name)
    sha = _git(file.parent, "rev-parse", "HEAD")
    status = _git(file.parent, "status", "--porcelain")
    if tracked is None or sha is None or status is None:
        return None
    return {"sha": sha, "dirty": bool(status)}


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes the file whole or not at all, also when the process is killed half-way."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _git(directory: pathlib.Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=directory, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _with_earlier(record: dict[str, Any], file: pathlib.Path) -> dict[str, Any]:
    if not file.exists():
        return record
    last = _read(file)
    earlier = last.pop("earlier", [])
    if last != record:
        earlier = [*earlier, last]
    return record | ({"earlier": earlier} if earlier else {})


def _check_same(path: pathlib.Path, old: dict[str, str], new: dict[str, str]) -> None:
    different = [name for name in sorted(old | new) if old.get(name) != new.get(name)]
    if different:
        lines = "\n".join(f"  {name}: {old.get(name, 'absent')} -> {new.get(name, 'absent')}" for name in different)
        raise ValueError(f"workdir {path} holds a run of another config; the fields that differ (old -> new):\n{lines}"
                         f"\nPass another --workdir, or the same config to resume that run. Nothing was changed.")


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """{"a.b": "[1, 2]"} for {"a": {"b": [1, 2]}}."""
    if not isinstance(value, dict) or not value:
        return {prefix: json.dumps(value)}
    flat: dict[str, str] = {}
    for name, item in value.items():
        flat |= _flat(item, f"{prefix}.{name}" if prefix else name)
    return flat


def _as_json(name: str, value: Any) -> Any:
    """The value as it will be read back; errors name the field."""
    if isinstance(value, dict):
        return {str(key): _as_json(f"{name}.{key}", item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(f"{name}[{i}]", item) for i, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"{name}: expected a JSON value (dict, list, str, number, bool, None), "
                     f"found {type(value).__name__}: {value!r}")


def _read(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, found something else ({error}); "
                         f"restore the file, or pass another --workdir") from error
