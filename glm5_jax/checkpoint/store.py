"""Checkpoints of a training run: Orbax behind four calls, each checkpoint whole or not there at all."""

import logging
import os
import pathlib
import shutil
from typing import Any

from flax import traverse_util
import jax
import orbax.checkpoint as ocp

from glm5_jax.core import params as core_params

_DELETED = ".deleted"
_UNFINISHED = "*.orbax-checkpoint-tmp*"


class Store:
    """The checkpoints of a directory, the newest `keep` of them, each a tree of arrays and a JSON value beside it.

    A save copies the arrays and writes in the background, so the caller may go on and donate them; `close` waits.
    Arrays are stored under their path, as in `params/layers/1/moe/router`, whatever classes the tree is made of.
    `about`, a JSON value, goes into each checkpoint too: what a reader has to know who was not there. Opening a store
    removes what a killed process left half written or half deleted, unless it is opened `read_only`.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int = 2, about: Any = None,
                 read_only: bool = False):
        if keep < 1:
            raise ValueError(f"keep: expected at least 1, found {keep}")
        self.directory = pathlib.Path(directory).expanduser().resolve()
        self._about, self._read_only = about, read_only
        logging.getLogger("absl").addFilter(_without_orbax_chatter)
        # A checkpoint is moved away in one step and deleted there: half of one is never where a checkpoint could be.
        options = (ocp.CheckpointManagerOptions(read_only=True) if read_only else ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, todelete_subdir=_DELETED))
        self._remove_unfinished()
        self._manager = ocp.CheckpointManager(
            self.directory, options=options,
            item_handlers={"state": ocp.StandardCheckpointHandler(), "extra": ocp.JsonCheckpointHandler()})

    def save(self, step: int, state: Any, extra: Any) -> None:
        """Saves `state` and the JSON value `extra` as `step`; an error of the writing shows at the next call."""
        self._manager.save(step, args=ocp.args.Composite(
            state=ocp.args.StandardSave(_nested(state)),
            extra=ocp.args.JsonSave({"value": extra, "about": self._about})), force=True)
        self._empty_deleted()

    def latest_step(self) -> int | None:
        """The newest step saved completely, or None; waits for a save under way."""
        self._manager.wait_until_finished()
        return self._manager.latest_step()

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, Any]:
        """The state and `extra` of `step`, in the tree, shapes, dtypes and shardings of `abstract_state`.

        Raises ValueError naming the first array that the checkpoint holds in another shape or dtype, or not at all.
        """
        self._manager.wait_until_finished()
        target = _nested(abstract_state)
        self._compare(step, _flat(target), self.arrays(step))
        restored = self._manager.restore(step, args=ocp.args.Composite(
            state=ocp.args.StandardRestore(target), extra=ocp.args.JsonRestore()))
        return _as_tree(abstract_state, _flat(restored["state"])), restored["extra"]["value"]

    def arrays(self, step: int) -> dict[str, jax.ShapeDtypeStruct]:
        """{path: shape and dtype} of what `step` holds, without reading it."""
        metadata = self._manager.item_metadata(step)["state"]
        return {name: jax.ShapeDtypeStruct(array.shape, array.dtype)
                for name, array in _flat(getattr(metadata, "tree", metadata)).items()}

    def about(self, step: int) -> Any:
        """What was said about `step` when it was saved."""
        return self._manager.restore(step, args=ocp.args.Composite(extra=ocp.args.JsonRestore()))["extra"].get("about")

    def restore_params(self, step: int, abstract_params: Any) -> Any:
        """The parameters of `step` alone, without the optimiser's state, in the tree and shardings given.

        Raises ValueError as `restore` does.
        """
        target = {"params": _nested(abstract_params)}
        found = {name: array for name, array in self.arrays(step).items() if name.startswith("params/")}
        self._compare(step, _flat(target), found)
        with ocp.PyTreeCheckpointer() as reader:
            restored = reader.restore(self.directory / str(step) / "state", args=ocp.args.PyTreeRestore(
                item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True))
        return _as_tree(abstract_params, _flat(restored["params"]))

    def close(self) -> None:
        """Waits until everything is written."""
        self._manager.close()
        self._empty_deleted()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _compare(self, step: int, expected: dict[str, Any], found: dict[str, Any]) -> None:
        for name in [*expected, *found]:
            here, there = (_describe(tree.get(name)) for tree in (expected, found))
            if here != there:
                raise ValueError(f"checkpoint {self.directory / str(step)} is of another model or optimiser: {name}: "
                                 f"expected {here}, found {there}; pass the config it was made with, or start anew in "
                                 f"another directory")

    def _remove_unfinished(self) -> None:
        """At once, while Orbax would do so in the background."""
        if not self._read_only and jax.process_index() == 0:
            for path in self.directory.glob(_UNFINISHED):
                shutil.rmtree(path)
        self._empty_deleted()

    def _empty_deleted(self) -> None:
        if not self._read_only and jax.process_index() == 0:
            shutil.rmtree(self.directory / _DELETED, ignore_errors=True)


def _as_tree(like: Any, arrays: dict[str, Any]) -> Any:
    leaves, treedef = jax.tree_util.tree_flatten_with_path(like)
    return jax.tree.unflatten(treedef, [arrays[core_params.path_name(path)] for path, _ in leaves])


def _nested(tree: Any) -> dict[str, Any]:
    """The arrays in nested dictionaries of strings, named by their path."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return traverse_util.unflatten_dict({core_params.path_name(path): leaf for path, leaf in leaves}, sep="/")


def _flat(tree: Any) -> dict[str, Any]:
    return traverse_util.flatten_dict(tree, sep="/")


def _describe(array: Any) -> str:
    return "nothing" if array is None else f"{array.dtype} {list(array.shape)}"


def _without_orbax_chatter(record: logging.LogRecord) -> bool:
    """Keeps Orbax's account of every step of a save out of the log, which it shares with all users of absl."""
    return record.levelno >= logging.WARNING or "orbax" not in record.pathname
