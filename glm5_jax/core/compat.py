"""The only place that knows the supported jax and flax versions apart."""

from importlib import metadata
import re

import jax

JAX_FLOOR = "0.7.2"
FLAX_FLOOR = "0.11.2"

# flax does not declare the newest jax it works with; these pairs were found by importing them.
_FLAX_NEEDED_FROM_JAX = {"0.12": "0.12.10"}


def check_versions() -> None:
    """Raises RuntimeError, in one paragraph with the remedy, where jax or flax is too old or they do not fit together.

    To be called once where a program starts. It reads the metadata of the installed packages and imports nothing.
    """
    jax_version, flax_version = metadata.version("jax"), metadata.version("flax")
    for name, found, floor in (("jax", jax_version, JAX_FLOOR), ("flax", flax_version, FLAX_FLOOR)):
        if _numbers(found) < _numbers(floor):
            raise RuntimeError(f"glm5_jax needs {name} >= {floor}, but {name} {found} is installed. "
                               f"Upgrade both together: pip install -U jax flax")
    pair = f"jax {jax_version} and flax {flax_version} do not fit together"
    for requirement in metadata.requires("flax") or ():
        if (match := re.match(r"jax\s*>=\s*([\d.]+)", requirement)) and _numbers(jax_version) < _numbers(match[1]):
            raise RuntimeError(f"{pair}: this flax needs jax >= {match[1]}. "
                               f"Upgrade both together: pip install -U jax flax")
    for jax_from, flax_needed in _FLAX_NEEDED_FROM_JAX.items():
        if _numbers(jax_version) >= _numbers(jax_from) and _numbers(flax_version) < _numbers(flax_needed):
            raise RuntimeError(f"{pair}: jax >= {jax_from} needs flax >= {flax_needed} (one was upgraded without the "
                               f"other). Upgrade both together: pip install -U jax flax")


def constrains_beside_manual_axes() -> bool:
    """Whether `with_sharding_constraint` works where a `shard_map` has made some, but not all, mesh axes manual.

    jax 0.7.2 raises NotImplementedError there; 0.10.2 is the next version known to accept it.
    """
    return _numbers(jax.__version__) >= (0, 10, 2)


def _numbers(version: str) -> tuple[int, ...]:
    """(0, 12, 1) for "0.12.1", "0.12.1.dev3+gabc" and "0.12.1rc1"."""
    match = re.match(r"\d+(\.\d+)*", version)
    if match is None:
        raise ValueError(f"version {version!r}: expected numbers separated by dots")
    return tuple(int(part) for part in match[0].split("."))
