"""Checkpoints of a training run: Orbax behind four calls, each checkpoint whole or not there at all."""

import logging
import os
import pathlib
from typing import Any

from flax import traverse_util
import jax
import orbax.checkpoint as ocp

from glm5_jax.core import params as core_params


class Store:
    """The checkpoints of a directory, the newest `keep` of them, each a tree of arrays and a JSON value beside it.

    A save copies the arrays and writes in the background, so the caller may go on and donate them; `close` waits.
    Arrays are stored under their path, as in `params/layers/1/moe/router`, whatever classes the tree is made of.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep: expected at least 1, found {keep}")
        self.directory = pathlib.Path(directory).expanduser().resolve()
        logging.getLogger("absl").addFilter(_without_orbax_chatter)
        self._manager = ocp.CheckpointManager(
            self.directory, options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
            item_handlers={"state": ocp.StandardCheckpointHandler(), "extra": ocp.JsonCheckpointHandler()})

    def save(self, step: int, state: Any, extra: Any) -> None:
        """Saves `state` and the JSON value `extra` as `step`; an error of the writing shows at the next call."""
        self._manager.save(step, args=ocp.args.Composite(
            state=ocp.args.StandardSave(_nested(state)), extra=ocp.args.JsonSave({"value": extra})), force=True)

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
        self._check(step, _flat(target))
        restored = self._manager.restore(step, args=ocp.args.Composite(
            state=ocp.args.StandardRestore(target), extra=ocp.args.JsonRestore()))
        found = _flat(restored["state"])
        leaves, treedef = jax.tree_util.tree_flatten_with_path(abstract_state)
        state = jax.tree.unflatten(treedef, [found[core_params.path_name(path)] for path, _ in leaves])
        return state, restored["extra"]["value"]

    def close(self) -> None:
        """Waits until everything is written."""
        self._manager.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self, step: int, expected: dict[str, Any]) -> None:
        metadata = self._manager.item_metadata(step)["state"]
        found = _flat(getattr(metadata, "tree", metadata))
        for name in [*expected, *found]:
            here, there = (_describe(tree.get(name)) for tree in (expected, found))
            if here != there:
                raise ValueError(f"checkpoint {self.directory / str(step)} is of another model or optimiser: {name}: "
                                 f"expected {here}, found {there}; pass the config it was made with, or start anew in "
                                 f"another directory")


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
