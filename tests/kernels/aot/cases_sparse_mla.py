"""Attention over selected keys at GLM-5's sizes: 64 heads, latent rows of 512 + 64, 2,048 keys selected."""

import functools

from case import BF16, F32, I32, Case, array, no_spills
from pallas_kernels.sparse_mla import pallas_gpu, pallas_tpu

OPTIONS = {"scale": 256 ** -0.5, "value_dim": 512}


def forward_arguments(batch: int, queries: int, keys: int) -> tuple:
    return array((batch, queries, 64, 576), BF16), array((batch, keys, 576), BF16), array((batch, queries, 2048), I32)


def backward_arguments(queries: int, keys: int) -> tuple:
    per_head = array((1, queries, 64), F32)
    return *forward_arguments(1, queries, keys), per_head, array((1, queries, 64, 512), BF16), per_head


CASES = (
    Case("sparse_mla 4096 x 32768", "tpu", functools.partial(pallas_tpu.forward, **OPTIONS),
         forward_arguments(1, 4096, 32768)),
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
