"""Policies on their way from the trainer to the engines: numbered directories that appear whole and are checked.

A directory `policy-<number>` holds the parameters as safetensors and, in `policy.json`, their `PolicyVersion` with a
checksum over names, types, shapes and bytes. It is never written again, so that an engine which has read and checked it
serves exactly that policy; one that was half written, or changed on the way, is refused.
"""

import hashlib
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from glm5_jax.checkpoint import atomic, safetensors_io
from glm5_jax.checkpoint.safetensors_io import Tensor
from glm5_jax.core.params import path_name
from glm5_jax.records import PolicyVersion, from_json, to_json

RECORD = "policy.json"


class WeightsError(RuntimeError):
    """A policy that cannot be served: absent, damaged, or of another model."""


def publish(folder: str | os.PathLike[str], params: Any, *, number: int, step: int) -> PolicyVersion:
    """Writes the parameters as policy `number`, after `step` optimiser steps. Raises ValueError for a number that does
    not exceed all that are there. Every shard has to be on devices of this process."""
    newest = numbers(folder)[-1:]
    if newest and number <= newest[0]:
        raise ValueError(f"number: expected above {newest[0]}, the newest policy in {folder}, found {number}")
    named, digest = _named(params), hashlib.sha256()

    def values() -> Iterator[np.ndarray]:
        """One at a time: the host never holds them all."""
        for name, leaf in named:
            array = np.asarray(leaf)
            _add(digest, name, array)
            yield array

    with atomic.replacing(_directory(folder, number)) as directory:
        tensors = [Tensor(name, np.dtype(leaf.dtype), leaf.shape) for name, leaf in named]
        safetensors_io.write(directory, tensors, values())
        policy = PolicyVersion(number, step, digest.hexdigest())
        with open(directory / RECORD, "w", encoding="utf-8") as record:
            record.write(to_json(policy) + "\n")
            record.flush()
            os.fsync(record.fileno())
    return policy


def numbers(folder: str | os.PathLike[str]) -> list[int]:
    """The policies of a folder, oldest first; none where there is no folder."""
    folder = pathlib.Path(folder)
    there = folder.glob("policy-*/" + RECORD) if folder.is_dir() else ()
    found = [re.fullmatch(r"policy-(\d{8,})", path.parent.name) for path in there]
    return sorted(int(match[1]) for match in found if match)


def fetch(folder: str | os.PathLike[str], number: int, like: Any) -> tuple[PolicyVersion, Any]:
    """Policy `number` and its parameters, arrays of the host in the structure of `like` (arrays or their shapes).

    Raises WeightsError, naming what is wrong, unless every byte is what `publish` was given.
    """
    directory = _directory(folder, number)
    if not directory.is_dir():
        raise WeightsError(f"{directory}: expected a policy, found none; there are {numbers(folder)}")
    try:
        policy = from_json(PolicyVersion, (directory / RECORD).read_text(encoding="utf-8"))
        reader = safetensors_io.open_directory(directory)
        wanted = {name: Tensor(name, np.dtype(leaf.dtype), tuple(leaf.shape)) for name, leaf in _named(like)}
        if reader.tensors != wanted:
            name = min(name for name in reader.tensors.keys() | wanted if reader.tensors.get(name) != wanted.get(name))
            raise WeightsError(f"{directory}: {name}: expected {wanted.get(name, 'no such tensor')}, found "
                               f"{reader.tensors.get(name, 'none')}")
        arrays = {name: np.array(reader.read(name)) for name in wanted}
    except (OSError, ValueError, TypeError) as error:
        raise WeightsError(f"{directory}: expected a whole policy, found one that cannot be read: {error}") from error
    digest = hashlib.sha256()
    for name, array in arrays.items():
        _add(digest, name, array)
    found = digest.hexdigest()
    if (policy.number, policy.checksum) != (number, found):
        raise WeightsError(f"{directory}: expected policy {number} with checksum {policy.checksum}, found "
                           f"{policy.number} with {found if policy.number == number else 'another record'}")
    return policy, jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name, _ in _leaves(like)])


def prune(folder: str | os.PathLike[str], *, keep: int) -> list[int]:
    """Removes all but the newest `keep` policies; returns the numbers removed. Raises ValueError for fewer than 1."""
    if keep < 1:
        raise ValueError(f"keep: expected at least 1, found {keep}")
    gone = numbers(folder)[:-keep]
    for number in gone:
        directory = _directory(folder, number)
        (directory / RECORD).unlink(missing_ok=True)  # first: what is half removed is no policy any more
        shutil.rmtree(directory, ignore_errors=True)
    return gone


def _directory(folder: str | os.PathLike[str], number: int) -> pathlib.Path:
    return pathlib.Path(folder) / f"policy-{number:08d}"


def _named(tree: Any) -> list[tuple[str, Any]]:
    """By name, whatever containers the tree is made of."""
    return sorted(_leaves(tree), key=lambda named: named[0])


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _add(digest: Any, name: str, array: np.ndarray) -> None:
    digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
