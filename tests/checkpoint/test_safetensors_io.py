"""The file format: what the safetensors library writes and reads, and every way in which a file can be wrong."""

import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from glm5_jax.checkpoint import safetensors_io
from glm5_jax.checkpoint.errors import CheckpointError
from glm5_jax.checkpoint.safetensors_io import Tensor

RNG = np.random.default_rng(0)
ARRAYS = {
    "a.weight": RNG.normal(size=(3, 5)).astype(np.float32), "b": RNG.normal(size=(2, 2, 2)).astype(ml_dtypes.bfloat16),
    "half": RNG.normal(size=(4,)).astype(np.float16), "scalar": np.array(2.5, np.float64),
    "empty": np.zeros((0, 4), np.float32), "ids": np.arange(6, dtype=np.int64), "flags": np.array([True, False])}
FP8 = {"q": RNG.normal(size=(5, 7)).astype(ml_dtypes.float8_e4m3fn), "é": np.ones(3, np.float32)}


def same(actual, expected):
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert np.ascontiguousarray(actual).tobytes() == expected.tobytes()


def write(directory, arrays, **options):
    safetensors_io.write(directory, [Tensor(name, x.dtype, x.shape) for name, x in arrays.items()], arrays.values(),
                         **options)


def test_reads_what_the_library_writes(tmp_path):
    safetensors.numpy.save_file(ARRAYS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    reader = safetensors_io.open_directory(tmp_path)
    assert reader.tensors.keys() == ARRAYS.keys()
    for name, expected in ARRAYS.items():
        same(reader.read(name), expected)


def test_the_library_reads_what_is_written(tmp_path):
    write(tmp_path, ARRAYS)
    found = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert found.keys() == ARRAYS.keys()
    for name, expected in ARRAYS.items():
        same(found[name], expected)


@pytest.mark.parametrize("shard_bytes", [1, 40, 10**9])
def test_shards_come_back(shard_bytes, tmp_path):
    arrays = ARRAYS | FP8
    write(tmp_path, arrays, shard_bytes=shard_bytes)
    files = sorted(file for file in os.listdir(tmp_path) if file.endswith(".safetensors"))
    assert (len(files) > 1) == (shard_bytes < 10**9) == (tmp_path / safetensors_io.INDEX).exists()
    reader = safetensors_io.open_directory(tmp_path)
    for name, expected in arrays.items():
        same(reader.read(name), expected)


def test_a_tensor_is_read_from_its_file_when_it_is_asked_for(tmp_path):
    write(tmp_path, ARRAYS)
    assert isinstance(safetensors_io.open_directory(tmp_path).read("a.weight"), np.memmap)


def test_another_array_than_announced_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a: expected float32 \[2\], found float32 \[3\]"):
        safetensors_io.write(tmp_path, [Tensor("a", np.dtype(np.float32), (2,))], [np.zeros(3, np.float32)])


def raw(directory, header, body=b"", *, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(
        struct.pack("<Q", len(text) if length is None else length) + text + body)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


BODY = bytes(8)
HEADERS = {
    "not JSON": (b"{'a': 1}", BODY, "expected JSON"),
    "not UTF-8": (b'{"a\xff": 1}', BODY, "expected JSON in UTF-8"),
    "a list": (b"[1, 2, 3]", BODY, "a JSON object"),
    "nested without end": (b'{"a":' + b"[" * 200_000, BODY, "expected JSON"),
    "an entry twice": (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":1}', BODY, "one entry 'a', found 2"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, BODY, "expected dtype, shape and data_offsets"),
    "unknown dtype": ({"a": entry("F12")}, BODY, "dtype: expected one of .*, found 'F12'"),
    "dtype no name": ({"a": entry(["F32"])}, BODY, "dtype: expected"),
    "negative size": ({"a": entry(shape=(-2,))}, BODY, "shape: expected"),
    "size no integer": ({"a": entry(shape=(2.0,))}, BODY, "shape: expected"),
    "size true": ({"a": entry(shape=(True,), offsets=(0, 4))}, BODY, "shape: expected"),
    "size beyond numbers": ({"a": entry(shape=(2**63,))}, BODY, "shape: expected"),
    "many dimensions": ({"a": entry(shape=(1,) * 99, offsets=(0, 4))}, bytes(4), "at most 8 dimensions"),
    "product overflows": ({"a": entry(shape=(2**62, 2**62))}, BODY, "data_offsets: expected"),
    "wrong bytes": ({"a": entry(offsets=(0, 4))}, BODY, "expected 8 bytes"),
    "backwards": ({"a": entry(offsets=(8, 0))}, BODY, "data_offsets: expected"),
    "three offsets": ({"a": entry(offsets=(0, 4, 8))}, BODY, "data_offsets: expected"),
    "body cut short": ({"a": entry()}, BODY[:5], "cut short"),
    "bytes at the end": ({"a": entry()}, BODY + b"x", "expected 8 bytes after the header, found 9"),
    "a gap": ({"a": entry(offsets=(8, 16))}, BODY * 2, "a': expected its bytes from 0 on"),
    "an overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, BODY * 2, "b': expected its bytes from 8 on"),
}


@pytest.mark.parametrize("header, body, message", HEADERS.values(), ids=HEADERS)
def test_a_wrong_header(header, body, message, tmp_path):
    raw(tmp_path, header, body)
    with pytest.raises(CheckpointError, match=message) as error:
        safetensors_io.open_directory(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(error.value)


@pytest.mark.parametrize("length", [0, 1, 10**3, 2**40, 2**63, 2**64 - 1])
def test_a_hostile_header_length(length, tmp_path):
    raw(tmp_path, {"a": entry()}, BODY, length=length)
    with pytest.raises(CheckpointError, match=f"expected a header of 2 to .* found the length {length}"):
        safetensors_io.open_directory(tmp_path)


@pytest.mark.parametrize("size", [0, 3, 8, 20])
def test_a_file_cut_within_its_header(size, tmp_path):
    write(tmp_path, ARRAYS)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="cut short"):
        safetensors_io.open_directory(tmp_path)


def test_the_faults_of_all_files_together(tmp_path):
    write(tmp_path, ARRAYS, shard_bytes=1)
    for file in ("model-00001-of-00007.safetensors", "model-00003-of-00007.safetensors"):
        (tmp_path / file).write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="^2 faults: .*model-00001-of.*model-00003-of"):
        safetensors_io.open_directory(tmp_path)


def index(directory, weight_map):
    (directory / safetensors_io.INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("file", ["/etc/passwd", "../model.safetensors", "..", ".", "", "sub/model.safetensors",
                                  "sub\\model.safetensors", "gone.safetensors", "nul\0byte", "x" * 300, "\ud800"])
def test_an_index_names_files_of_its_directory(file, tmp_path):
    write(tmp_path, ARRAYS)
    (tmp_path / "sub").mkdir()
    index(tmp_path, {"a.weight": file})
    with pytest.raises(CheckpointError, match="1 tensors, such as 'a.weight', are said to be in"):
        safetensors_io.open_directory(tmp_path)


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 1}, {"a": ["model.safetensors"]}, "model.safetensors"])
def test_an_index_without_files(weight_map, tmp_path):
    index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match="weight_map: expected the file of each tensor"):
        safetensors_io.open_directory(tmp_path)


def test_index_and_shards_must_agree(tmp_path):
    write(tmp_path, {"a": np.zeros(2), "b": np.zeros(2)})
    index(tmp_path, {"a": "model.safetensors"})
    with pytest.raises(CheckpointError, match="tensor 'b': expected in the index under this file"):
        safetensors_io.open_directory(tmp_path)
    index(tmp_path, dict.fromkeys("abc", "model.safetensors"))
    with pytest.raises(CheckpointError, match="tensor 'c': expected in model.safetensors, found nothing there"):
        safetensors_io.open_directory(tmp_path)


def test_links_stay_within_the_directory(tmp_path):
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir(), inside.mkdir()
    write(outside, ARRAYS)
    (inside / "model.safetensors").symlink_to(outside / "model.safetensors")
    with pytest.raises(CheckpointError, match="found a link to .*outside"):
        safetensors_io.open_directory(inside)
    (inside / "model.safetensors").rename(inside / safetensors_io.INDEX)
    with pytest.raises(CheckpointError, match="index.json: expected a file of this directory, found a link to"):
        safetensors_io.open_directory(inside)
    (inside / safetensors_io.INDEX).rename(inside / "model.safetensors")
    (inside / "real").write_bytes((outside / "model.safetensors").read_bytes())
    (inside / "model.safetensors").unlink()
    (inside / "model.safetensors").symlink_to("real")
    assert safetensors_io.open_directory(inside).tensors.keys() == ARRAYS.keys()


def test_the_cache_of_a_hub_links_to_its_blobs(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    write(blobs, ARRAYS)
    (snapshot / "model.safetensors").symlink_to("../../blobs/model.safetensors")
    same(safetensors_io.open_directory(snapshot).read("a.weight"), ARRAYS["a.weight"])


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="found neither"):
        safetensors_io.open_directory(tmp_path)
