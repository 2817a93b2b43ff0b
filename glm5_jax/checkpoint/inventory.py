"""What a checkpoint holds, by module, from its headers alone."""

import math
import re
from typing import Iterable, Mapping, NamedTuple

import jax

from glm5_jax.checkpoint.fp8 import SCALE

# The first pattern that a name contains decides its module; names of the released layout and paths of ours.
_MODULES = (
    ("optimiser and step", r"^(?!model\.|lm_head|params/)"),
    ("multi-token prediction", r"^params/mtp/"),
    ("indexer", r"indexer"),
    ("routed experts", r"mlp\.experts\.|moe/experts/"),
    ("shared experts", r"shared_experts|moe/shared"),
    ("router", r"mlp\.gate\.|moe/router"),
    ("attention", r"self_attn|/attention/"),
    ("dense feed-forward", r"mlp[./]"),
    ("embedding", r"embed_tokens|embedding"),
    ("output head", r"lm_head|params/head|shared_head\.head"),
    ("norms", r"norm"),
    ("multi-token prediction", r"eh_proj"),
)


class Row(NamedTuple):
    """One line of the table: arrays of one module and type."""

    module: str
    dtype: str
    arrays: int
    elements: int
    bytes: int


def rows(arrays: Mapping[str, jax.ShapeDtypeStruct], *, mtp_layer: int | None = None) -> list[Row]:
    """Sums `arrays` by module and type; in the released layout `mtp_layer` is the number of the MTP layer."""
    sums: dict[tuple[str, str], list[int]] = {}
    for name, array in arrays.items():
        size, nbytes = math.prod(array.shape), math.prod(array.shape) * array.dtype.itemsize
        size *= not name.endswith(SCALE)  # scales take room, but are no parameters
        row = sums.setdefault((_module(name, mtp_layer), array.dtype.name), [0, 0, 0])
        for i, more in enumerate((1, size, nbytes)):
            row[i] += more
    order = list(dict.fromkeys(module for module, _ in _MODULES)) + ["other"]
    return sorted((Row(*key, *values) for key, values in sums.items()), key=lambda row: (order.index(row.module), row))


def _module(name: str, mtp_layer: int | None) -> str:
    if mtp_layer is not None and name.startswith(f"model.layers.{mtp_layer}."):
        return "multi-token prediction"
    return next((module for module, pattern in _MODULES if re.search(pattern, name)), "other")


def table(found: Iterable[Row]) -> str:
    """The rows as text, with their sum."""
    found = list(found)
    total = Row("total", "", sum(r.arrays for r in found), sum(r.elements for r in found), sum(r.bytes for r in found))
    lines = [("module", "type", "arrays", "parameters", "bytes")]
    lines += [(r.module, r.dtype, f"{r.arrays:,}", f"{r.elements:,}", _size(r.bytes)) for r in [*found, total]]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) if i < 2 else cell.rjust(width)
                               for i, (cell, width) in enumerate(zip(line, widths))).rstrip() for line in lines)


def _size(count: int) -> str:
    for unit, step in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= step:
            return f"{count / step:.2f} {unit}"
    return f"{count} B"
