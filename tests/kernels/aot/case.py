"""One thing to compile: what a `cases_*.py` file lists."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from targets import Target

BF16, F32, I32 = jnp.bfloat16, jnp.float32, jnp.int32


def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def no_spills(*kernels: str) -> Callable[[Target], dict[str, float]]:
    """Limits of GPU kernels: every register stays one."""
    return lambda target: {f"{kernel}/spilled": 0 for kernel in kernels}


@dataclasses.dataclass(frozen=True)
class Case:
    """A function of arrays, at the sizes that matter, with the platform it is compiled for.

    `limits` are what its figures may not exceed on any run, known or not: {"kernel/figure": limit by target}. `refused`
    gives the reason why a target cannot take it: compiling must then fail with exactly that text in the message.
    """

    name: str
    platform: str  # "tpu" | "cuda"
    function: Callable[..., Any]
    arguments: tuple[jax.ShapeDtypeStruct, ...]
    only: tuple[str, ...] = ()  # targets; none given: all of the platform
    limits: Callable[[Target], dict[str, float]] = lambda target: {}
    refused: dict[str, str] = dataclasses.field(default_factory=dict)
