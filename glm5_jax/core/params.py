"""One tree of `ParamSpec` describes every parameter; initialisation, shardings, restore targets, optimiser groups and
counts are all read from it.

A spec tree is a nested dictionary whose leaves are `ParamSpec`. A parameter tree is the same dictionary with arrays.
"""

import dataclasses
import math
from typing import Any, Callable, Iterator, Literal

import jax
import jax.numpy as jnp
import numpy as np

Initializer = Literal["normal", "zeros", "ones"]

TAGS = frozenset({
    "matrix",       # a (stack of) 2-d weight: Muon applies
    "head_split",   # a matrix whose head axis separates independent blocks: Muon Split applies
    "embedding",    # token embedding
    "output_head",  # untied unembedding
    "norm",         # scale of a norm
    "bias",         # additive vector
    "indexer",      # belongs to a lightning indexer: trained by its KL alone
    "router",       # routing matrix
    "router_bias",  # correction bias: moved by the load rule, never by a gradient
    "expert",       # belongs to a routed expert
    "mtp",          # belongs to the multi-token-prediction layer
})


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """Everything that is known of a parameter before it exists.

    `axes` names each dimension logically (`core.mesh.ShardingRules` maps names to mesh axes); `init` is "normal" with
    standard deviation `scale`, "zeros" or "ones"; `tags` come from `TAGS`.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    dtype: Any = jnp.float32
    init: Initializer = "normal"
    scale: float = 0.02
    tags: frozenset[str] = frozenset()

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"ParamSpec.axes: expected one name per dimension of {self.shape}, found {self.axes}")
        if unknown := set(self.tags) - TAGS:
            raise ValueError(f"ParamSpec.tags: unknown {sorted(unknown)}; known are {sorted(TAGS)}")

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def is_spec(x: Any) -> bool:
    return isinstance(x, ParamSpec)


def map_specs(fn: Callable[[ParamSpec], Any], specs: Any) -> Any:
    """Applies `fn` to every spec of the tree."""
    return jax.tree.map(fn, specs, is_leaf=is_spec)


def with_tags(specs: Any, *tags: str) -> Any:
    """The same tree with `tags` added to every spec."""
    return map_specs(lambda s: dataclasses.replace(s, tags=s.tags | set(tags)), specs)


def stacked(specs: Any, *sizes: int) -> Any:
    """The same tree with leading layer axes of the given sizes, for `lax.scan`."""
    return map_specs(
        lambda s: dataclasses.replace(s, shape=(*sizes, *s.shape), axes=("layers",) * len(sizes) + s.axes), specs)


def count(specs: Any) -> int:
    """The number of parameters, without allocating any."""
    return sum(s.size for s in jax.tree.leaves(specs, is_leaf=is_spec))


def abstract(specs: Any) -> Any:
    """The tree as `jax.ShapeDtypeStruct`, the target of a restore or of an ahead-of-time compilation."""
    return map_specs(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), specs)


def path_name(path: tuple[Any, ...]) -> str:
    """`layers/3/attention/q_a` for a key path of `jax.tree_util`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


# Normal values come in blocks, each from its own key, so that one vectorised draw serves all small parameters:
# compiling a draw per parameter takes half a minute on a CPU.
_BLOCK = 512
_LARGE = 2**24  # elements from which on a parameter is drawn alone, in its own shape and sharding


def initialise(specs: Any, key: jax.Array) -> Any:
    """Draws the parameters. A leaf depends on the key, its path and its size alone: adding one moves no other."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(specs, is_leaf=is_spec)
    names = [(_stable_hash(path_name(path)), spec) for path, spec in leaves]
    small = [(name, spec) for name, spec in names if spec.init == "normal" and spec.size < _LARGE]
    blocks = [np.arange(-(-spec.size // _BLOCK)) for _, spec in small]
    owners = [np.full(len(index), name) for index, (name, _) in zip(blocks, small)]
    draws: Iterator[jax.Array] = iter(())
    if small:
        drawn = jax.vmap(lambda owner, block: jax.random.normal(
            jax.random.fold_in(jax.random.fold_in(key, owner), block), (_BLOCK,), jnp.float32))(
                np.concatenate(owners), np.concatenate(blocks))
        draws = iter(jnp.split(drawn, np.cumsum([len(index) for index in blocks])[:-1]))

    def leaf(name: np.uint32, spec: ParamSpec) -> jax.Array:
        if spec.init != "normal":
            return jnp.full(spec.shape, {"zeros": 0, "ones": 1}[spec.init], spec.dtype)
        if spec.size < _LARGE:
            value = next(draws).reshape(-1)[:spec.size].reshape(spec.shape)
        else:
            value = jax.random.normal(jax.random.fold_in(key, name), spec.shape, jnp.float32)
        return (spec.scale * value).astype(spec.dtype)

    return jax.tree.unflatten(treedef, [leaf(name, spec) for name, spec in names])


def _stable_hash(name: str) -> np.uint32:
    """FNV-1a over the path: the same on every machine and process, unlike `hash`."""
    value = 2166136261
    for byte in name.encode():
        value = (value ^ byte) * 16777619 % 2**32
    return np.uint32(value)
