"""Checks of the arrays an operation is given: rank, shape, dtype, before anything is traced."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Argument(NamedTuple):
    """An array by the name the caller knows it by, and one letter per axis: the same letter, the same size."""

    name: str
    array: Any
    axes: str
    kind: Any = jnp.floating


def check(op: str, *arguments: Argument) -> dict[str, int]:
    """The size of every axis letter. Raises ValueError naming the argument, what was expected and what was found."""
    sizes: dict[str, int] = {}
    for name, array, axes, kind in arguments:
        if not isinstance(array, (jax.Array, jax.ShapeDtypeStruct)) and not hasattr(array, "__array__"):
            raise ValueError(f"{op}: {name}: expected an array [{', '.join(axes)}], found {type(array).__name__}")
        shape = tuple(array.shape)
        wanted = [sizes.get(axis, axis) for axis in axes]
        if len(shape) != len(axes) or any(axis in sizes and sizes[axis] != n for axis, n in zip(axes, shape)):
            raise ValueError(f"{op}: {name}: expected shape [{', '.join(axes)}] = [{', '.join(map(str, wanted))}], "
                             f"found {list(shape)}")
        if not jnp.issubdtype(array.dtype, kind):
            raise ValueError(f"{op}: {name}: expected a dtype that is {kind.__name__}, found {array.dtype}")
        sizes.update(zip(axes, shape))
    return sizes


def check_same_dtype(op: str, name: str, array: jax.Array, other_name: str, other: jax.Array) -> None:
    """Raises ValueError where two arrays differ in dtype."""
    if array.dtype != other.dtype:
        raise ValueError(f"{op}: {name}: expected the dtype of {other_name}, {other.dtype}, found {array.dtype}")
