"""Directories of safetensors files: one file, or shards with an index."""

import json
import os
import pathlib
from typing import Iterator, Mapping

import numpy as np
import safetensors
import safetensors.numpy

from glm5_jax.core.rundir import write_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class CheckpointError(ValueError):
    """A checkpoint that is not what it should be: says which file or tensor, what was expected and what was found."""


class Reader:
    """Reads tensors of a directory by name; only the one asked for is in memory. Use as a context manager."""

    def __init__(self, directory: str | os.PathLike[str]):
        self._directory = pathlib.Path(directory)
        self._files = dict(_locate(self._directory))
        self._open: dict[str, safetensors.safe_open] = {}

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._files)

    def read(self, name: str) -> np.ndarray:
        file = self._files[name]
        if file not in self._open:
            self._open[file] = safetensors.safe_open(str(self._directory / file), framework="numpy").__enter__()
        return self._open[file].get_tensor(name)

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._open.values():
            handle.__exit__(None, None, None)
        self._open.clear()


def _locate(directory: pathlib.Path) -> Iterator[tuple[str, str]]:
    """(tensor, file) of a directory."""
    if (directory / INDEX).exists():
        for name, file in json.loads((directory / INDEX).read_text())["weight_map"].items():
            if pathlib.PurePath(file).name != file:
                raise CheckpointError(f"{directory / INDEX}: tensor {name} is said to be in {file!r}; expected the "
                                      f"name of a file in the same directory")
            yield name, file
    elif (directory / SINGLE).exists():
        with safetensors.safe_open(str(directory / SINGLE), framework="numpy") as handle:
            yield from ((name, SINGLE) for name in handle.keys())
    else:
        raise CheckpointError(f"{directory}: expected {SINGLE} or {INDEX}, found neither; is this the directory of a "
                              f"checkpoint in the released layout?")


def write(directory: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], *,
          shard_bytes: int = 5 * 2**30) -> None:
    """Writes the tensors as one file, or as shards of at most `shard_bytes` with an index; each file appears whole."""
    directory = pathlib.Path(directory)
    shards: list[dict[str, np.ndarray]] = [{}]
    filled = 0
    for name, value in tensors.items():
        if shards[-1] and filled + value.nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = value
        filled += value.nbytes
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else [SINGLE]
    for name, shard in zip(names, shards):
        temporary = directory / f".{name}.tmp"
        safetensors.numpy.save_file(shard, str(temporary), metadata={"format": "pt"})
        os.replace(temporary, directory / name)
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
        total = sum(value.nbytes for value in tensors.values())
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for stale in ({*directory.glob("model*.safetensors"), directory / INDEX}
                  - {directory / name for name in names} - ({directory / INDEX} if len(shards) > 1 else set())):
        stale.unlink(missing_ok=True)
