"""The tuned tile sizes: every entry is read, fits its kernel at GLM-5's sizes, and says what is wrong with it."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import blocks
from pallas_kernels.blocks import AttentionBlocks, SelectionBlocks, Tiles, tuned
from pallas_kernels.lightning_indexer import pallas_gpu as indexer_gpu
from pallas_kernels.lightning_indexer import pallas_tpu as indexer_tpu
from pallas_kernels.moe_dispatch import pallas_gpu as moe_gpu
from pallas_kernels.moe_dispatch.xla import RowTiles, heights_of
from pallas_kernels.sparse_mla import pallas_gpu as mla_gpu
from pallas_kernels.sparse_mla import pallas_tpu as mla_tpu

BF16, F32, I32 = jnp.bfloat16, jnp.float32, jnp.int32
RECORDS = {
    ("index_scores", "pallas_tpu", "all"): Tiles,
    ("index_scores", "pallas_gpu", "all"): Tiles,
    ("select_topk", "xla", "all"): SelectionBlocks,
    ("select_topk", "pallas_tpu", "all"): Tiles,
    ("select_topk", "pallas_gpu", "many queries"): Tiles,
    ("select_topk", "pallas_gpu", "few queries"): Tiles,
    ("sparse_mla", "xla", "cpu"): AttentionBlocks,
    ("sparse_mla", "xla", "tpu"): AttentionBlocks,
    ("sparse_mla", "xla", "cuda"): AttentionBlocks,
    ("sparse_mla", "pallas_tpu", "all"): Tiles,
    ("sparse_mla", "pallas_gpu", "forward"): mla_gpu.Tiles,
    ("sparse_mla", "pallas_gpu", "backward"): mla_gpu.Tiles,
    ("grouped_matmul", "xla", "cpu"): RowTiles,
    ("grouped_matmul", "xla", "elsewhere"): RowTiles,
    ("grouped_matmul", "pallas_gpu", "16 bits, full tiles"): moe_gpu.Blocks,
    ("grouped_matmul", "pallas_gpu", "16 bits"): moe_gpu.Blocks,
    ("grouped_matmul", "pallas_gpu", "32 bits"): moe_gpu.Blocks,
}


def indexed(queries, keys=8192):
    of_queries, of_keys = ((1, queries), I32), ((1, keys), I32)
    return (((1, queries, 32, 128), BF16), ((1, keys, 128), BF16), ((1, queries, 32), F32), of_queries, of_keys,
            of_queries, of_keys)


def grouped(rows, dtype):
    return ((rows, 6144), dtype), ((32, 6144, 2048), dtype), ((32,), I32)


SELECTED = ((1, 16, 64, 576), BF16), ((1, 4096, 576), BF16), ((1, 16, 2048), I32)
PULLED = *SELECTED, ((1, 16, 64), F32), ((1, 16, 64, 512), BF16), ((1, 16, 64), F32)
ATTENTION = {"scale": 1.0, "value_dim": 512}
SELECTION = {"scale": 1.0, "top_k": 2048}
KERNELS = {
    "index_scores, TPU": (indexer_tpu.index_scores, {"scale": 1.0}, indexed(512)),
    "index_scores, GPU": (indexer_gpu.index_scores, {"scale": 1.0}, indexed(512)),
    "select_topk, TPU": (indexer_tpu.select_topk, SELECTION, indexed(256)),
    "select_topk, GPU": (indexer_gpu.select_topk, SELECTION, indexed(256)),
    "select_topk, GPU, decoding": (indexer_gpu.select_topk, SELECTION, indexed(1)),
    "sparse_mla, TPU": (mla_tpu.forward, ATTENTION, SELECTED),
    "sparse_mla, GPU": (mla_gpu.forward, ATTENTION, SELECTED),
    "sparse_mla backward, TPU": (mla_tpu.backward, ATTENTION | {"deterministic": True}, PULLED),
    "sparse_mla backward, GPU": (mla_gpu.backward, ATTENTION | {"deterministic": True}, PULLED),
    "grouped_matmul, GPU, many rows": (moe_gpu.product, {}, grouped(32768, BF16)),
    "grouped_matmul, GPU, few rows": (moe_gpu.product, {}, grouped(64, BF16)),
    "grouped_matmul, GPU, float32": (moe_gpu.product, {}, grouped(8192, F32)),
}


def test_every_entry_is_read_as_its_record():
    entries = {(op, implementation, shapes) for op, forms in blocks._entries().items()
               for implementation, classes in forms.items() for shapes in classes}
    assert entries == set(RECORDS)
    for place, record in RECORDS.items():
        assert isinstance(tuned(record, *place), record)


@pytest.mark.parametrize("place", [place for place in RECORDS if place[1] != "xla"], ids=", ".join)
def test_tiles_suit_their_platform(place):
    """Triton computes with powers of two, a product has 16 rows at least; a register of a TPU is 8 x 128."""
    sizes = tuned(RECORDS[place], *place)._asdict()
    if place[1] == "pallas_tpu":
        assert sizes["queries"] % 8 == 0 and sizes["keys"] % 128 == 0
    else:
        of_warps = {sizes.pop(field, None) for field in ("warps", "stages")}
        assert of_warps == {None} or 1 <= min(of_warps) <= max(of_warps) <= 8
        assert all(size >= 16 and size.bit_count() == 1 for size in sizes.values())


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_takes_its_tiles(name):
    """As far as tracing looks; lowering asks for a device, registers and memory are for `make test-aot`."""
    kernel, options, shapes = KERNELS[name]
    traced = jax.jit(functools.partial(kernel, **options)).trace(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    assert "pallas_call" in str(traced.jaxpr)


def test_tiles_of_the_selection_follow_the_queries():
    assert indexer_gpu.selection_tiles(1).queries == 16 < indexer_gpu.selection_tiles(4096).queries
    # Tiles of keys have to make up whole groups.
    found = indexer_tpu.selection_tiles(4096, 32768)
    assert found == tuned(Tiles, "select_topk", "pallas_tpu") and indexer_tpu.GROUP % found.keys == 0
    assert indexer_tpu.selection_tiles(1, 32768).queries == 8


def test_heights_follow_the_mean_group():
    tiles = RowTiles(8, 128, (8, 5, 4, 1))
    assert heights_of(4096, 32, tiles) == (256, 160, 128, 32)
    assert heights_of(10 ** 6, 32, tiles) == (256, 160, 128, 32)
    assert heights_of(50, 5, tiles) == (8,)
    assert heights_of(4096, 32, tiles._replace(quarters=())) == (64,)


class Sample(NamedTuple):
    size: int
    wide: bool
    parts: tuple[int, ...]


def read(monkeypatch, entry):
    monkeypatch.setattr(blocks, "_entries", lambda: {"op": {"xla": {"all": entry}}})
    return tuned(Sample, "op", "xla")


def test_values_are_kept(monkeypatch):
    assert read(monkeypatch, {"parts": [3, 1], "size": 2, "wide": False}) == Sample(2, False, (3, 1))
    with pytest.raises(ValueError, match="blocks.json: op, xla, cpu: expected an entry, found none"):
        tuned(Sample, "op", "xla", "cpu")


@pytest.mark.parametrize("changed, message", [
    ({"size": 0}, "size: expected a positive integer, found 0"),
    ({"size": True}, "size: expected a positive integer, found True"),
    ({"size": 1.5}, "size: expected a positive integer, found 1.5"),
    ({"wide": 1}, "wide: expected true or false, found 1"),
    ({"parts": [4, 0]}, r"parts: expected a list of positive integers, found \[4, 0\]"),
    ({"parts": 4}, "parts: expected a list of positive integers, found 4"),
    ({"rows": 1}, "rows: expected the fields size, wide, parts, found size, wide, parts, rows"),
])
def test_what_is_wrong_is_named(monkeypatch, changed, message):
    with pytest.raises(ValueError, match=f"blocks.json: op, xla, all: {message}"):
        read(monkeypatch, {"size": 1, "wide": True, "parts": [1]} | changed)


def test_a_missing_field_is_named(monkeypatch):
    with pytest.raises(ValueError, match="all: parts: expected the fields size, wide, parts, found size, wide$"):
        read(monkeypatch, {"size": 1, "wide": True})
