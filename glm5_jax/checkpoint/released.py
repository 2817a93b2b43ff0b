"""The released layout, in and out: a directory with `config.json` and safetensors files, in bfloat16, float32 or FP8.

Tensors stream: reading holds one tensor beside the result, writing two of them beside the parameters.
"""

import collections
import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import shutil
from typing import Any, Callable, Iterable, Iterator, Mapping, TypeVar

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np
import tqdm

from glm5_jax.checkpoint import atomic, hf_config, hf_names, safetensors_io, streaming, validate
from glm5_jax.checkpoint.errors import CheckpointError, ConfigError
from glm5_jax.checkpoint.fp8 import E4M3, SCALE, QuantisationError, dequantise, is_quantised, quantise, scale_shape
from glm5_jax.checkpoint.hf_names import Entry
from glm5_jax.checkpoint.safetensors_io import Tensor
from glm5_jax.core import mesh as core_mesh
from glm5_jax.core.rundir import write_json
from glm5_jax.model import transformer
from glm5_jax.model.config import ModelConfig

T = TypeVar("T")
CONFIG = "config.json"
ROUTER_BIAS = "e_score_correction_bias"  # stays float32 in every checkpoint
BFLOAT16, FLOAT32 = np.dtype(jnp.bfloat16), np.dtype(np.float32)


@dataclasses.dataclass(frozen=True)
class Released:
    """A directory in the released layout, checked against its config; `open_released` makes it."""

    config: ModelConfig
    fields: Mapping[str, Any]  # config.json as it stands
    reader: safetensors_io.Reader
    block: tuple[int, int]

    def dtype_of(self, entry: Entry) -> np.dtype:
        """What `read` gives: the type of the file, bfloat16 for FP8 and float32 for float16."""
        stored = self.reader.tensors[entry.name].dtype
        return BFLOAT16 if stored == E4M3 else FLOAT32 if stored == np.float16 else stored

    def read(self, entry: Entry) -> np.ndarray:
        """The tensor, mapped from its file where nothing has to be computed."""
        value = self.reader.read(entry.name)
        if value.dtype == E4M3:
            return dequantise(value, self.reader.read(entry.name + SCALE), BFLOAT16, self.block)
        return value.astype(FLOAT32) if value.dtype == np.float16 else value


def open_released(directory: str | os.PathLike[str], *, dtype: str | None = None,
                  latent_norm_eps: float | None = None) -> Released:
    """Reads config and headers; raises CheckpointError (ConfigError for the config alone) naming every fault."""
    directory, dtype = pathlib.Path(directory).expanduser(), _known_dtype(dtype)
    atomic.recover(directory)
    where = str(directory / CONFIG)
    errors: list[CheckpointError] = []

    def attempt(step: Callable[[], T]) -> T | None:
        try:
            return step()
        except CheckpointError as error:
            errors.append(error)
            return None

    reader = attempt(lambda: safetensors_io.open_directory(directory))
    config = block = None
    if (fields := attempt(lambda: _fields(directory))) is not None:
        stated = fields
        block = attempt(lambda: hf_config.weight_block(stated, where=where))
        config = attempt(lambda: hf_config.from_json(stated, where=where, dtype=dtype, latent_norm_eps=latent_norm_eps))
    if fields is None or config is None or block is None or reader is None:
        kind = ConfigError if all(isinstance(error, ConfigError) for error in errors) else CheckpointError
        raise kind(*(fault for error in errors for fault in error.faults))
    if faults := validate.faults(str(directory), config, reader.tensors, block):
        raise CheckpointError(*faults)
    opened = Released(config, fields, reader, block)
    if dtype is None:  # the parameters keep theirs; the config names the one that most of them have
        sizes = ((opened.dtype_of(entry), reader.tensors[entry.name].nbytes) for entry in hf_names.entries(config))
        config = config.replace(param_dtype=_main_dtype(sizes))
    return dataclasses.replace(opened, config=config)


def _main_dtype(sizes: Iterable[tuple[np.dtype, int]]) -> str:
    """The dtype with the most bytes: config.json and ModelConfig name one."""
    sums: collections.Counter[np.dtype] = collections.Counter()
    for dtype, nbytes in sizes:
        sums[dtype] += nbytes
    return sums.most_common(1)[0][0].name


def _known_dtype(dtype: Any) -> str | None:
    """The name of a dtype that parameters may have; raises CheckpointError for another."""
    try:
        name = None if dtype is None else jnp.dtype(dtype).name
    except TypeError:
        name = repr(dtype)
    if name not in (None, "float32", "bfloat16"):
        raise CheckpointError(f"dtype: expected 'float32' or 'bfloat16', found {name}")
    return name


def _fields(directory: pathlib.Path) -> dict[str, Any]:
    try:
        return safetensors_io.read_json(safetensors_io.inside(directory, CONFIG))
    except CheckpointError as error:
        raise ConfigError(*error.faults) from error


def load_hf(directory: str | os.PathLike[str], *, dtype: str | None = None, latent_norm_eps: float | None = None,
            mesh: jax.sharding.Mesh | None = None, progress: bool = False) -> tuple[ModelConfig, Any]:
    """Reads a `glm_moe_dsa` directory, FP8 included: (config, params).

    `dtype` converts every parameter but the router's correction bias, and is the compute dtype of the config; by
    default each keeps its own, FP8 being read as bfloat16. With a `mesh` the parameters are split as
    `config.sharding` says, each process reading its part; else they are on the default device. `latent_norm_eps`
    defaults to what `save_hf` noted, and in checkpoints from elsewhere to rms_norm_eps, the choice of the training
    code; transformers computes with 1e-6. Raises CheckpointError naming every file, tensor and field at fault.
    """
    opened = open_released(directory, dtype=dtype, latent_norm_eps=latent_norm_eps)
    return opened.config, load(opened, dtype=dtype, mesh=mesh, progress=progress)


def load(opened: Released, *, dtype: str | None = None, mesh: jax.sharding.Mesh | None = None,
         progress: bool = False) -> Any:
    """The parameters of an opened directory, as `load_hf` gives them."""
    specs = transformer.param_specs(opened.config)
    shardings = None if mesh is None else core_mesh.param_shardings(specs, mesh, opened.config.sharding)
    whole = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params: dict[str, Any] = {}
    # On a mesh a tensor is read by every shard that holds some of it: how often in all is not known before.
    with _bar("reading", len(hf_names.entries(opened.config)) if mesh is None else None, progress) as bar:
        for path, pieces in hf_names.pieces(opened.config).items():
            sharding = whole if shardings is None else hf_names.leaf_at(shardings, path)
            node = params
            for key in path[:-1]:
                node = node.setdefault(key, {})
            node[path[-1]] = _leaf(opened, hf_names.leaf_at(specs, path).shape, pieces, dtype, sharding, bar)
    return params


def _leaf(opened: Released, shape: tuple[int, ...], pieces: tuple[hf_names.Piece, ...], dtype: str | None,
          sharding: jax.sharding.Sharding, bar: tqdm.tqdm) -> jax.Array:
    own, dtype = functools.reduce(np.promote_types, {opened.dtype_of(x.entry) for x in pieces}), _known_dtype(dtype)
    if dtype is not None and not pieces[0].entry.name.endswith(ROUTER_BIAS):
        own = jnp.dtype(dtype)

    def within(bounds: streaming.Bounds) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        for entry, part, at in pieces:
            if all(first <= i < end for i, (first, end) in zip(at, bounds)):
                local = tuple(i - first for i, (first, _) in zip(at, bounds))
                rest = tuple(slice(*bound) for bound in bounds[len(at):])
                yield local, entry.op.from_hf(opened.read(entry))[part][rest]
                bar.update(part == 0)

    return streaming.assemble(shape, own, sharding, within)


def save_hf(directory: str | os.PathLike[str], config: ModelConfig, params: Any, *, dtype: str | None = None,
            fp8: bool = False, fields: Mapping[str, Any] | None = None,
            companions: Iterable[str | os.PathLike[str]] = (), shard_bytes: int = safetensors_io.SHARD_BYTES,
            progress: bool = False) -> dict[str, QuantisationError]:
    """Writes `params` as a directory of the released layout, which transformers and inference engines load.

    The directory appears whole or not at all. An earlier checkpoint in it is replaced in one step; files beside it,
    such as a tokenizer, stay. `dtype` converts every parameter but the router's correction bias, which is always
    float32; by default each keeps its own. `fp8` writes the FP8 release: the matrices of the layers rounded to
    bfloat16 and quantised in blocks, the rest in bfloat16 or `dtype`; what that cost each of them is returned.
    `fields` are further fields of config.json, such as eos_token_id; `companions` are files to copy into the directory.
    Where parameters are spread over processes, all of them must call this, and the first one writes.

    Raises ValueError for parameters of another config, CheckpointError for a directory that holds something else, or
    for values that FP8 does not have.
    """
    directory, beside = pathlib.Path(directory).expanduser(), [pathlib.Path(file) for file in companions]
    hf_names.check_tree(config, params)
    _check_target(directory, beside)
    dtype = _known_dtype(dtype) or ("bfloat16" if fp8 else None)
    tensors, kept = _plan(config, params, dtype, fp8)
    errors: dict[str, QuantisationError] = {}
    with _bar("writing", len(hf_names.entries(config)), progress) as bar:
        values = _values(config, params, {tensor.name: tensor.dtype for tensor in tensors}, errors, bar)
        with _together(values):
            if jax.process_index() == 0:
                main = _main_dtype((tensor.dtype, tensor.nbytes) for tensor in tensors
                                   if tensor.dtype != E4M3 and not tensor.name.endswith(SCALE))
                stated = hf_config.merged(fields or {}, config, main)
                if fp8:
                    stated["quantization_config"] = hf_config.quantisation_json(kept)
                with atomic.replacing(directory) as partial:
                    safetensors_io.write(partial, tensors, values, shard_bytes=shard_bytes)
                    _keep_others(directory, partial)
                    for file in beside:
                        shutil.copy2(file, partial)
                    write_json(partial / CONFIG, stated)
    return errors


@contextlib.contextmanager
def _together(values: Iterator[np.ndarray]) -> Iterator[None]:
    """Every process makes all `values`, which they gather from each other, and fails where one of them does."""
    if jax.process_count() == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
        collections.deque(values, maxlen=0)
    except Exception as found:
        error = found
        with contextlib.suppress(CheckpointError):  # of a value, which the others meet too; the first error is told
            collections.deque(values, maxlen=0)
    failed = multihost_utils.process_allgather(np.array(error is not None))
    if error is None and failed.any():
        error = CheckpointError(f"process {int(failed.argmax())} could not write the checkpoint; see its error")
    if error is not None:
        raise error


def _check_target(directory: pathlib.Path, companions: list[pathlib.Path]) -> None:
    """Only what is a checkpoint of ours already may be replaced, and nothing may take the place of our files."""
    atomic.recover(directory)
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory}: expected a directory or nothing, found a file; choose another place")
    if directory.is_dir() and any(directory.iterdir()):
        try:
            ours = _fields(directory).get("model_type") == hf_config.FIXED["model_type"]
        except ConfigError:
            ours = False
        if not ours:
            raise CheckpointError(f"{directory}: expected a new or empty directory, or an earlier checkpoint to "
                                  f"replace, found other files; choose another place, or pass the files of the "
                                  f"tokenizer as companions")
    if wrong := [file.name for file in companions if _is_ours(file.name)]:
        raise CheckpointError(f"companions: expected files beside the checkpoint's own, found {wrong[0]}")


def _is_ours(name: str) -> bool:
    return name in (CONFIG, safetensors_io.INDEX) or bool(re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", name))


def _plan(config: ModelConfig, params: Any, dtype: str | None, fp8: bool) -> tuple[list[Tensor], list[str]]:
    """The tensors to write, and the modules that FP8 leaves alone."""
    tensors, kept = [], []
    for entry in hf_names.entries(config):
        if fp8 and is_quantised(entry.name, entry.shape):
            tensors += [Tensor(entry.name, E4M3, entry.shape),
                        Tensor(entry.name + SCALE, FLOAT32, scale_shape(entry.shape))]
            continue
        parts = [np.dtype(jnp.dtype(dtype or hf_names.leaf_at(params, path).dtype)) for path, _ in entry.slices]
        if wrong := [part for part in parts if part not in (FLOAT32, BFLOAT16)]:
            raise CheckpointError(f"tensor {entry.name}: expected parameters in float32 or bfloat16, found {wrong[0]}; "
                                  f"pass dtype='float32'")
        bias = entry.name.endswith(ROUTER_BIAS)
        tensors.append(Tensor(entry.name, FLOAT32 if bias else functools.reduce(np.promote_types, parts), entry.shape))
        kept.append(entry.name.removesuffix(".weight"))
    return tensors, kept


def _values(config: ModelConfig, params: Any, dtypes: Mapping[str, np.dtype], errors: dict[str, QuantisationError],
            bar: tqdm.tqdm) -> Iterator[np.ndarray]:
    """The values of the planned tensors in their order, each made when it is asked for."""
    for entry in hf_names.entries(config):
        value = entry.op.to_hf(*(streaming.to_host(hf_names.leaf_at(params, path), index)
                                 for path, index in entry.slices))
        if dtypes[entry.name] == E4M3:
            try:
                weight, scale_inv, errors[entry.name] = quantise(value.astype(BFLOAT16, copy=False))
            except ValueError as error:
                raise CheckpointError(f"tensor {entry.name}: {error}") from error
            yield weight
            yield scale_inv
        else:
            yield value.astype(dtypes[entry.name], copy=False)
        bar.update()


def _keep_others(directory: pathlib.Path, partial: pathlib.Path) -> None:
    """What a user put beside an earlier checkpoint stays."""
    for item in directory.iterdir() if directory.is_dir() else ():
        if item.is_dir() and not item.is_symlink():
            shutil.copytree(item, partial / item.name, symlinks=True)
        elif not _is_ours(item.name):
            shutil.copy2(item, partial / item.name, follow_symlinks=False)


def _bar(what: str, total: int | None, progress: bool) -> tqdm.tqdm:
    return tqdm.tqdm(desc=what, total=total, unit="tensor", disable=not progress, dynamic_ncols=True)
