"""The indexer at GLM-5's sizes: 32 heads of 128 channels, 2,048 keys selected."""

import functools

from case import BF16, F32, I32, Case, array, no_spills
from pallas_kernels.lightning_indexer import pallas_gpu, pallas_tpu
from targets import Target


def arguments(queries: int, keys: int, batch: int = 1) -> tuple:
    return (array((batch, queries, 32, 128), BF16), array((batch, keys, 128), BF16), array((batch, queries, 32), F32),
            array((batch, queries), I32), array((batch, keys), I32), array((batch, queries), I32),
            array((batch, keys), I32))


def operation(function, **options):
    return functools.partial(function, scale=128 ** -0.5, **options)


def decoding_limits(target: Target) -> dict[str, float]:
    """No spills, and scores of 16 queries for the one of each of 128 sequences, with a copy of its filled-up query."""
    return no_spills("index_keys", "select_keys")(target) | {"temporaries": 128 * 16 * (4 * 131072 + 2 * 2 * 32 * 128)}


def scores_limits(target: Target) -> dict[str, float]:
    """1.10 times the bundles in which the matrix units can issue the products of two tiles of 256 x 512 pairs."""
    return {"index_scores/largest_loop": 2 * {"v6e": 4_400, "tpu7x": 4_400}.get(target.name, 8_780)}


CASES = (
    Case("index_scores 4096 x 32768", "tpu", operation(pallas_tpu.index_scores), arguments(4096, 32768),
         limits=scores_limits),
    Case("select_topk 4096 x 32768", "tpu", operation(pallas_tpu.select_topk, top_k=2048), arguments(4096, 32768)),
    Case("select_topk 1024 x 131072", "tpu", operation(pallas_tpu.select_topk, top_k=2048), arguments(1024, 131072)),
    Case("index_scores 4096 x 32768", "cuda", operation(pallas_gpu.index_scores), arguments(4096, 32768),
         limits=no_spills("index_scores")),
    Case("select_topk 4096 x 32768", "cuda", operation(pallas_gpu.select_topk, top_k=2048), arguments(4096, 32768),
         limits=no_spills("index_keys", "select_keys")),
    Case("select_topk, decoding 128 x 131072", "cuda", operation(pallas_gpu.select_topk, top_k=2048),
         arguments(1, 131072, batch=128), limits=decoding_limits),
)
