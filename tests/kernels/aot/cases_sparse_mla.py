"""Attention over selected keys at GLM-5's sizes: 64 heads, latent rows of 512 + 64, 2,048 keys selected."""

import functools
from collections.abc import Callable

from case import BF16, F32, I32, Case, array, no_spills
from pallas_kernels.sparse_mla import pallas_gpu, pallas_tpu
from targets import TARGETS, Target

OPTIONS = {"scale": 256 ** -0.5, "value_dim": 512}
SPARSE_CORES = tuple(target.name for target in TARGETS.values() if target.sparse_cores)
FILLED = 640  # 576 up to the next multiple of 128


def gathered(rows: int) -> Callable[[Target], dict[str, float]]:
    """Limits where rows are gathered by SparseCores: nothing else as large as these rows is kept."""
    return lambda target: {"temporaries": 1.05 * rows * FILLED * 2, "gather_rows/subcore_bundles": 400}


def forward_arguments(batch: int, queries: int, keys: int, width: int = 576) -> tuple:
    return (array((batch, queries, 64, width), BF16), array((batch, keys, width), BF16),
            array((batch, queries, 2048), I32))


def backward_arguments(queries: int, keys: int) -> tuple:
    per_head = array((1, queries, 64), F32)
    return *forward_arguments(1, queries, keys), per_head, array((1, queries, 64, 512), BF16), per_head


CASES = (
    Case("sparse_mla 4096 x 32768", "tpu", functools.partial(pallas_tpu.forward, **OPTIONS),
         forward_arguments(1, 4096, 32768)),
    Case("sparse_mla, decoding 32 x 131072, rows of 640", "tpu", functools.partial(pallas_tpu.forward, **OPTIONS),
         forward_arguments(32, 1, 131072, FILLED), only=SPARSE_CORES, limits=gathered(32 * 2048)),
    Case("sparse_mla 64 x 131072", "tpu", functools.partial(pallas_tpu.forward, **OPTIONS),
         forward_arguments(1, 64, 131072), only=SPARSE_CORES, limits=gathered(64 * 2048 + 131072)),
    Case("sparse_mla backward 4096 x 32768", "tpu",
         functools.partial(pallas_tpu.backward, deterministic=True, **OPTIONS), backward_arguments(4096, 32768)),
    Case("sparse_mla 4096 x 32768", "cuda", functools.partial(pallas_gpu.forward, **OPTIONS),
         forward_arguments(1, 4096, 32768), limits=no_spills("sparse_mla")),
    Case("sparse_mla, decoding 32 x 131072", "cuda", functools.partial(pallas_gpu.forward, **OPTIONS),
         forward_arguments(32, 1, 131072), limits=no_spills("sparse_mla")),
    Case("sparse_mla backward 4096 x 32768", "cuda",
         functools.partial(pallas_gpu.backward, deterministic=True, **OPTIONS), backward_arguments(4096, 32768),
         limits=no_spills("sparse_mla_d_q", "sparse_mla_d_rows", "sparse_mla_sum_rows")),
    Case("sparse_mla backward, any order 4096 x 32768", "cuda",
         functools.partial(pallas_gpu.backward, deterministic=False, **OPTIONS), backward_arguments(4096, 32768),
         limits=no_spills("sparse_mla_d_q", "sparse_mla_d_rows")),
)
