"""Directories of safetensors files, one or sharded with an index: read and written tensor by tensor.

The safetensors library reads no FP8 and writes only what is whole in memory, so the format (eight bytes of header
length, a JSON header, the bytes of the tensors) is read and written here. Nothing is believed that a file says of
itself before it is checked against the size of the file.
"""

import collections
import dataclasses
import json
import math
import os
import pathlib
import struct
from typing import Any, BinaryIO, Iterable, Iterator, NamedTuple, Sequence

import ml_dtypes
import numpy as np

from glm5_jax.checkpoint.errors import CheckpointError, short

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5 * 2**30
HEADER_LIMIT = 100 * 2**20  # of the format itself
_MOST_FAULTS = 100  # of one file: a broken one would fill the memory with complaints

DTYPES = {name: np.dtype(dtype) for name, dtype in {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "BOOL": "bool",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8"}.items()}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Tensor(NamedTuple):
    """What a header says of a tensor."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclasses.dataclass(frozen=True)
class Reader:
    """The tensors of a directory, by name; `open_directory` makes it from headers alone."""

    directory: pathlib.Path
    tensors: dict[str, Tensor]
    _places: dict[str, tuple[pathlib.Path, int]]  # file and first byte

    def read(self, name: str) -> np.ndarray:
        """The tensor, mapped from its file: what is touched of it is in memory, as long as the array lives."""
        tensor, (file, offset) = self.tensors[name], self._places[name]
        if not tensor.nbytes:
            return np.empty(tensor.shape, tensor.dtype)
        return np.memmap(file, tensor.dtype, "r", offset, tensor.shape)


def open_directory(directory: str | os.PathLike[str]) -> Reader:
    """Reads the headers of `model.safetensors`, or of the shards that the index names.

    Raises CheckpointError with every fault of index, headers and files.
    """
    directory = pathlib.Path(directory)
    weight_map = _weight_map(directory)
    files = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE]
    tensors: dict[str, Tensor] = {}
    places: dict[str, tuple[pathlib.Path, int]] = {}
    faults: list[str] = []
    for file in files:
        try:
            found = read_header(inside(directory, file))
        except CheckpointError as error:
            faults += error.faults
            continue
        for tensor, offset in found:
            if weight_map is not None and weight_map.get(tensor.name) != file:
                faults.append(f"{directory / file}: tensor {short(tensor.name)}: expected in the index under this file,"
                              f" found {weight_map.get(tensor.name, 'nothing')!r} there; write the index anew")
            tensors[tensor.name], places[tensor.name] = tensor, (directory / file, offset)
    if weight_map is not None and not faults:
        faults += [f"{directory / INDEX}: tensor {short(name)}: expected in {file}, found nothing there; write the "
                   f"index anew, or fetch that shard again"
                   for name, file in weight_map.items() if name not in tensors]
    if faults:
        raise CheckpointError(*faults)
    return Reader(directory, tensors, places)


def _weight_map(directory: pathlib.Path) -> dict[str, str] | None:
    """{tensor: file} of the index, or None where a single file holds everything."""
    path = directory / INDEX
    if not os.path.lexists(path):
        if os.path.isfile(directory / SINGLE):
            return None
        raise CheckpointError(f"{directory}: expected {SINGLE} or {INDEX}, found neither; is this the directory of a "
                              f"checkpoint in the released layout?")
    weight_map = read_json(inside(directory, INDEX)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(x, str) for x in weight_map.values()):
        raise CheckpointError(f"{path}: weight_map: expected the file of each tensor, found {short(weight_map)}")
    faults = []
    names_of: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        names_of.setdefault(file, []).append(name)
    for file, names in sorted(names_of.items()):
        what = f"{path}: {len(names)} tensors, such as {short(names[0])}, are said to be in {short(file)}"
        if file == ".." or "\\" in file or pathlib.PurePosixPath(file).name != file:
            faults.append(f"{what}: expected the name of a file in the same directory")
        elif not os.path.isfile(directory / file):
            faults.append(f"{what}: expected that file, found none; fetch it, or write the index anew")
    if faults:
        raise CheckpointError(*faults)
    return weight_map


def inside(directory: pathlib.Path, file: str) -> pathlib.Path:
    """The file, which may be a link within the directory, or into the blobs of a hub's cache, but nowhere else."""
    real, home = (pathlib.Path(os.path.realpath(path)) for path in (directory / file, directory))  # loops are no error
    allowed = [home] + ([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])
    if not any(real.is_relative_to(root) for root in allowed):
        raise CheckpointError(f"{directory / file}: expected a file of this directory, found a link to {real}; put the "
                              f"file itself there")
    return real


def read_header(path: pathlib.Path) -> list[tuple[Tensor, int]]:
    """The tensors of one file, each with its first byte; raises CheckpointError with every fault of the header."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            text = _header_text(path, file, size)
    except OSError as error:
        raise CheckpointError(f"{path}: expected a readable file, found: {error.strerror}") from error
    body = size - 8 - len(text)
    found: list[tuple[Tensor, int]] = []
    faults: list[str] = []
    for name, fields in _parse(path, text).items():
        if name == "__metadata__":
            continue
        fault = _entry_fault(fields, body)
        if fault:
            faults.append(f"{path}: tensor {short(name)}: {fault}")
        else:
            tensor = Tensor(name, DTYPES[fields["dtype"]], tuple(fields["shape"]))
            found.append((tensor, fields["data_offsets"][0]))
        if len(faults) >= _MOST_FAULTS:
            break
    if not faults:
        faults = _layout_faults(path, found, body)
    if faults:
        raise CheckpointError(*faults)
    return [(tensor, 8 + len(text) + begin) for tensor, begin in found]


def _header_text(path: pathlib.Path, file: BinaryIO, size: int) -> bytes:
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
    if not 2 <= length <= min(size - 8, HEADER_LIMIT):
        found = "no length" if length < 0 else f"the length {length}"
        raise CheckpointError(f"{path}: expected a header of 2 to {max(min(size - 8, HEADER_LIMIT), 2)} bytes in a "
                              f"file of {size}, found {found}; the file is cut short or no safetensors file: fetch it "
                              f"again")
    return file.read(length)


def _parse(path: pathlib.Path, text: bytes) -> dict[str, Any]:
    header = parse_json(path, text)
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: expected a header that is a JSON object, found {short(header)}")
    return header


def _entry_fault(fields: Any, body: int) -> str | None:
    """What is wrong with the entry of one tensor, in a file with `body` bytes after the header."""
    if not isinstance(fields, dict) or not {"dtype", "shape", "data_offsets"} <= fields.keys():
        return f"expected dtype, shape and data_offsets, found {short(fields)}"
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"dtype: expected one of {', '.join(DTYPES)}, found {short(dtype)}"
    for what, value in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(value, list) or not all(type(x) is int and 0 <= x < 2**63 for x in value):
            return f"{what}: expected a list of integers, 0 or more, found {short(value)}"
    if len(shape) > 8:
        return f"shape: expected at most 8 dimensions, found {len(shape)}"
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != needed:
        return f"data_offsets: expected {needed} bytes for {dtype} {shape}, found {short(offsets)}"
    if offsets[1] > body:
        return (f"expected bytes {offsets[0]} to {offsets[1]} of the body, which has {body}; the file is cut short: "
                f"fetch it again")
    return None


def _layout_faults(path: pathlib.Path, found: Sequence[tuple[Tensor, int]], body: int) -> list[str]:
    """The format wants the tensors to fill the body without gaps: a gap hides bytes, an overlap forges them."""
    end = 0
    for tensor, begin in sorted(found, key=lambda item: (item[1], item[1] + item[0].nbytes)):
        if begin != end:
            return [f"{path}: tensor {short(tensor.name)}: expected its bytes from {end} on, where the tensor before "
                    f"it ends, found {begin}; write the file anew"]
        end = begin + tensor.nbytes
    return [] if end == body else [f"{path}: expected {end} bytes after the header, found {body}; the file is cut "
                                   f"short or something was appended: fetch it again"]


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file; raises CheckpointError for anything else."""
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: expected a file, found none")
    try:
        if path.stat().st_size > HEADER_LIMIT:
            raise CheckpointError(f"{path}: expected at most {HEADER_LIMIT} bytes, found {path.stat().st_size}")
        value = parse_json(path, path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: expected a readable file, found: {error.strerror}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {short(value)}")
    return value


def parse_json(path: pathlib.Path, text: bytes) -> Any:
    """The JSON value of `text`; raises CheckpointError naming `path` and, for two entries of one name, the name."""
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            (name, times), = collections.Counter(name for name, _ in pairs).most_common(1)
            raise CheckpointError(f"{path}: expected one entry {short(name)}, found {times}")
        return value

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CheckpointError(f"{path}: expected JSON in UTF-8, found something else ({error}); fetch or write the "
                              f"file again") from error


def write(directory: str | os.PathLike[str], tensors: Sequence[Tensor], values: Iterable[np.ndarray], *,
          shard_bytes: int = SHARD_BYTES) -> None:
    """Writes `values`, one at a time and in the order of `tensors`, as one file, or as shards of at most `shard_bytes`
    (more only for a single tensor) with an index; every file is on the disk when this returns.

    Raises ValueError where a value has not the dtype and shape announced.
    """
    directory = pathlib.Path(directory)
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    files = files if len(shards) > 1 else [SINGLE]
    source = iter(values)
    for file, shard in zip(files, shards):
        with open(directory / file, "wb") as stream:
            _write_file(stream, shard, source)
    if len(shards) > 1:
        weight_map = {tensor.name: file for file, shard in zip(files, shards) for tensor in shard}
        text = json.dumps({"metadata": {"total_size": sum(x.nbytes for x in tensors)}, "weight_map": weight_map},
                          indent=2)
        with open(directory / INDEX, "w", encoding="utf-8") as index:
            index.write(text + "\n")
            index.flush()
            os.fsync(index.fileno())


def _write_file(stream: BinaryIO, tensors: Sequence[Tensor], values: Iterator[np.ndarray]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        header[tensor.name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape),
                               "data_offsets": [end, end := end + tensor.nbytes]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(struct.pack("<Q", len(text)) + text)
    for tensor in tensors:
        value = next(values)
        if value.shape != tensor.shape or value.dtype != tensor.dtype:
            raise ValueError(f"tensor {tensor.name}: expected {tensor}, found {value.dtype} {list(value.shape)}")
        stream.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    stream.flush()
    os.fsync(stream.fileno())
