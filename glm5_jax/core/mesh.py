"""The device mesh, and the one table that maps the name of a dimension to the mesh axes that split it.

Four mesh axes, always all present: `data` (batch, and the parameters in FSDP), `context` (time), `expert`, `tensor`.
"""

import dataclasses
import difflib
import math
from typing import Any, Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from glm5_jax.core import compat, params

AXES = ("data", "context", "expert", "tensor")

MeshAxes = str | tuple[str, ...] | None


def make_mesh(*, data: int = -1, context: int = 1, expert: int = 1, tensor: int = 1,
              devices: Sequence[jax.Device] | None = None, explicit: bool = False) -> Mesh:
    """Builds the mesh of all `devices` (default: all there are).

    A size of -1, for at most one axis, takes what is left. The axis types are Auto, or Explicit on request. Raises
    ValueError where the sizes do not multiply to the number of devices.
    """
    sizes = {"data": data, "context": context, "expert": expert, "tensor": tensor}
    devices = jax.devices() if devices is None else list(devices)
    if bad := {name: size for name, size in sizes.items() if size < 1 and size != -1}:
        raise ValueError(f"make_mesh: expected sizes >= 1, or -1 for the rest, found {bad}")
    filled = [name for name, size in sizes.items() if size == -1]
    if len(filled) > 1:
        raise ValueError(f"make_mesh: at most one axis can be -1, found {filled}")
    product = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % product if filled else len(devices) != product:
        needed = f"a multiple of {product}" if filled else f"{product}"
        raise ValueError(f"make_mesh: {sizes} needs {needed} devices, found {len(devices)}; "
                         f"change a size, or set one of them to -1")
    for name in filled:
        sizes[name] = len(devices) // product
    axis_type = AxisType.Explicit if explicit else AxisType.Auto
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(axis_type,) * len(AXES), devices=devices)


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Which mesh axes split each logical dimension: one, several (major first), or None for a whole copy everywhere."""

    # activations
    batch: MeshAxes = "data"
    time: MeshAxes = "context"
    act_embed: MeshAxes = None
    act_heads: MeshAxes = "tensor"
    act_vocab: MeshAxes = "tensor"
    act_experts: MeshAxes = "expert"
    act_mlp: MeshAxes = "tensor"
    # parameters
    vocab: MeshAxes = "tensor"
    embed: MeshAxes = "data"  # FSDP
    heads: MeshAxes = "tensor"
    head_dim: MeshAxes = None
    q_rank: MeshAxes = None
    kv_rank: MeshAxes = None
    mlp: MeshAxes = "tensor"
    experts: MeshAxes = "expert"
    expert_mlp: MeshAxes = "tensor"
    index_heads: MeshAxes = None
    layers: MeshAxes = None
    norm: MeshAxes = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            axes = getattr(self, field.name)
            if unknown := [axis for axis in _as_tuple(axes) if axis not in AXES]:
                raise ValueError(f"ShardingRules.{field.name}: unknown mesh axis {unknown[0]!r} in {axes!r}; "
                                 f"known are {AXES}")


def spec(rules: ShardingRules, logical_axes: Sequence[str | None]) -> PartitionSpec:
    """Turns one logical name per dimension (None: not split) into a PartitionSpec.

    Raises ValueError for a name that is no field of `rules`, and where two dimensions would use the same mesh axis.
    """
    entries: list[MeshAxes] = []
    used: dict[str, str] = {}
    for name in logical_axes:
        if name is None:
            entries.append(None)
            continue
        axes = _as_tuple(_lookup(rules, name))
        for axis in axes:
            if axis in used:
                raise ValueError(f"logical axes {tuple(logical_axes)}: both {used[axis]!r} and {name!r} are split by "
                                 f"mesh axis {axis!r}; change one of the two in ShardingRules, or pass None for it")
            used[axis] = name
        entries.append(axes[0] if len(axes) == 1 else axes or None)
    return PartitionSpec(*entries)


def param_shardings(specs: Any, mesh: Mesh, rules: ShardingRules) -> Any:
    """The tree of `NamedSharding` that belongs to a tree of `ParamSpec`.

    Raises ValueError, naming the parameter, for a dimension that its mesh axes do not divide.
    """
    def leaf(path: tuple[Any, ...], param: params.ParamSpec) -> NamedSharding:
        where = f"parameter {params.path_name(path)}"
        try:
            pspec = spec(rules, param.axes)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        _check_divisible(where, param.shape, param.axes, pspec, mesh.shape)
        return NamedSharding(mesh, pspec)

    return jax.tree_util.tree_map_with_path(leaf, specs, is_leaf=params.is_spec)


def constrain(x: jax.Array, *logical_axes: str | None, rules: ShardingRules) -> jax.Array:
    """Splits `x` over the ambient mesh (`jax.set_mesh`) as the rules say, with one logical name or None per dimension.

    The same call serves Auto axes (a hint to the partitioner), Explicit axes (a reshard) and the inside of a
    `shard_map`, whose Manual axes are already split and are left alone. Without a mesh, or on one device, `x` is
    returned as it is, but the names are checked all the same. Outside jit `x` must live on the mesh already, as every
    array made under `jax.set_mesh` does. Raises ValueError for a wrong rank, an unknown name, a
    mesh axis used twice, and a dimension that its mesh axes do not divide.
    """
    if len(logical_axes) != x.ndim:
        raise ValueError(f"constrain: expected one logical axis per dimension of shape {x.shape}, found {logical_axes}")
    pspec = spec(rules, logical_axes)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    if missing := set(AXES) - set(mesh.axis_names):
        raise ValueError(f"constrain: the ambient mesh has axes {mesh.axis_names} but lacks {sorted(missing)}; "
                         f"build it with make_mesh")
    types = dict(zip(mesh.axis_names, mesh.axis_types))

    def only(*kinds: AxisType) -> PartitionSpec:
        return PartitionSpec(*(tuple(a for a in _as_tuple(entry) if types[a] in kinds) or None for entry in pspec))

    _check_divisible("constrain", x.shape, logical_axes, only(AxisType.Auto, AxisType.Explicit), mesh.shape)
    if AxisType.Explicit in types.values():
        x = jax.sharding.reshard(x, only(AxisType.Explicit))
    beside_manual = AxisType.Manual in types.values()
    if AxisType.Auto in types.values() and (not beside_manual or compat.constrains_beside_manual_axes()):
        x = jax.lax.with_sharding_constraint(x, only(AxisType.Auto))
    return x


def _as_tuple(axes: MeshAxes) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _lookup(rules: ShardingRules, name: str) -> MeshAxes:
    known = [field.name for field in dataclasses.fields(rules)]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown logical axis {name!r}: did you mean {near!r}? Known are {', '.join(known)}")
    return getattr(rules, name)


def _check_divisible(where: str, shape: tuple[int, ...], logical_axes: Sequence[str | None], pspec: PartitionSpec,
                     mesh_shape: Mapping[str, int]) -> None:
    for i, (size, name, entry) in enumerate(zip(shape, logical_axes, pspec)):
        axes = _as_tuple(entry)
        ways = math.prod(mesh_shape[axis] for axis in axes)
        if size % ways:
            raise ValueError(f"{where}: dimension {i} ({name!r}) of shape {tuple(shape)} has size {size}, which mesh "
                             f"axis {' x '.join(axes)} of size {ways} does not divide; change the mesh, or "
                             f"ShardingRules.{name}")
