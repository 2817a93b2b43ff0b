"""A checkpoint of any kind behind one record: the released layout, FP8, an Orbax store, or the directory of a run."""

import dataclasses
import functools
import os
import pathlib
from typing import Any, Callable, Mapping

import jax
import numpy as np

from glm5_jax.checkpoint import hf_config, hf_names, released, safetensors_io, streaming
from glm5_jax.checkpoint.errors import CheckpointError
from glm5_jax.checkpoint.hf_names import Entry
from glm5_jax.checkpoint.store import Store
from glm5_jax.core import mesh as core_mesh, params as core_params
from glm5_jax.model import transformer
from glm5_jax.model.config import ModelConfig

COMPANIONS = "companions"  # what lay beside the weights that a store was imported from


@dataclasses.dataclass(frozen=True)
class Source:
    """What a checkpoint says of itself before its weights are read, and how to read them."""

    path: pathlib.Path
    config: ModelConfig
    fields: Mapping[str, Any]                   # of config.json, those included that this library does not know
    arrays: Mapping[str, jax.ShapeDtypeStruct]  # everything it holds, by name
    companions: tuple[pathlib.Path, ...]        # files beside the weights, such as the tokenizer's
    load: Callable[..., Any]                    # (mesh=None) -> parameters
    read: Callable[[Entry], np.ndarray]         # one tensor, in the released layout


def open_source(path: str | os.PathLike[str], *, dtype: str | None = None, step: int | None = None,
                progress: bool = False) -> Source:
    """Opens a directory with `config.json` and safetensors, a store of Orbax checkpoints, or a run with `checkpoints`.

    `dtype` converts what is loaded; `step` chooses a checkpoint of a store, by default the newest. Raises
    CheckpointError where there is none.
    """
    path = pathlib.Path(path).expanduser()
    if not path.is_dir():
        raise CheckpointError(f"{path}: expected the directory of a checkpoint, found "
                              f"{'a file' if path.exists() else 'nothing'}")
    released_here = any((path / name).is_file() for name in (safetensors_io.INDEX, safetensors_io.SINGLE))
    for directory in () if released_here else (path, path / "checkpoints"):
        if directory.is_dir() and any(item.name.isdigit() and item.is_dir() for item in directory.iterdir()):
            return _from_store(directory, dtype, step)
    if step is not None:
        raise CheckpointError(f"{path}: expected a store of checkpoints to take number {step} from, found none")
    return _from_released(path, dtype, progress)


def _from_released(path: pathlib.Path, dtype: str | None, progress: bool) -> Source:
    opened = released.open_released(path, dtype=dtype)
    arrays = {name: jax.ShapeDtypeStruct(tensor.shape, tensor.dtype) for name, tensor in opened.reader.tensors.items()}
    companions = _files(path, lambda file: file.suffix != ".safetensors"
                        and file.name not in (released.CONFIG, safetensors_io.INDEX))
    load = functools.partial(released.load, opened, dtype=dtype, progress=progress)
    return Source(path, opened.config, opened.fields, arrays, companions, load, opened.read)


def _from_store(path: pathlib.Path, dtype: str | None, step: int | None) -> Source:
    with Store(path, read_only=True) as store:
        step = store.latest_step() if step is None else step
        if step is None or not (path / str(step)).is_dir():
            raise CheckpointError(f"{path}: expected a checkpoint {'' if step is None else step}, found none")
        about, arrays = store.about(step), store.arrays(step)
    if not isinstance(about, dict) or "config" not in about:
        raise CheckpointError(f"{path / str(step)}: expected a checkpoint that names its config, found one that does "
                              f"not; save it with Store(..., about=hf_config.about(config))")
    config = hf_config.from_json(about["config"], where=f"{path / str(step)}: config")

    def load(mesh: jax.sharding.Mesh | None = None) -> Any:
        specs = transformer.param_specs(config)
        whole = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = (core_params.map_specs(lambda spec: whole, specs) if mesh is None
                     else core_mesh.param_shardings(specs, mesh, config.sharding))
        stored = {name.removeprefix("params/"): array.dtype for name, array in arrays.items()}
        target = jax.tree_util.tree_map_with_path(
            lambda path, spec, sharding: jax.ShapeDtypeStruct(
                spec.shape, stored.get(core_params.path_name(path), spec.dtype), sharding=sharding),
            specs, shardings, is_leaf=core_params.is_spec)
        with Store(path, read_only=True) as store:
            params = store.restore_params(step, target)
        if dtype is None:
            return params
        return jax.tree.map(lambda spec, leaf: leaf if "router_bias" in spec.tags else leaf.astype(dtype),
                            specs, params, is_leaf=core_params.is_spec)

    loaded = functools.cache(load)

    def read(entry: Entry) -> np.ndarray:
        return entry.op.to_hf(*(streaming.to_host(hf_names.leaf_at(loaded(), path), index)
                                for path, index in entry.slices))

    return Source(path, config if dtype is None else config.replace(dtype=dtype, param_dtype=dtype), about["config"],
                  arrays, _files(path / COMPANIONS, lambda file: True), loaded, read)


def _files(directory: pathlib.Path, wanted: Callable[[pathlib.Path], bool]) -> tuple[pathlib.Path, ...]:
    return tuple(sorted(file for file in directory.iterdir() if file.is_file() and wanted(file))
                 if directory.is_dir() else ())
