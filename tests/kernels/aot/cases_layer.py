"""Selection and attention of one layer, forward and backward: memory grows with T, never with T times S.

The limits count, per query, what the operations hold beside their arguments and results, and the blocks of fixed size.
"""

from typing import Any

import jax
from case import BF16, Case, array
from cases_lightning_indexer import arguments as indexer_arguments
from cases_sparse_mla import OPTIONS, forward_arguments
from pallas_kernels import select_topk, sparse_mla
from pallas_kernels.lightning_indexer.pallas_gpu import KEY_BUFFER
from pallas_kernels.sparse_mla.pallas_gpu import ROW_GRADIENTS
from targets import Target

TOP_K = 2048
INDICES, INDEX_QUERIES, RESULTS = 4 * TOP_K, 2 * 32 * 128, 2 * 64 * 512  # bytes of a query
# GPU: the backward pass cuts q and the results' gradients into blocks of queries, a copy of each, with the indices both
# as given and cut; float32 log-sum-exp and delta, and a key's gradient twice, before and after a block.
GPU_QUERY = 2 * 64 * 576 + RESULTS + 2 * INDICES + 2 * 4 * 64 + 2 * 4 * 576
# TPU, where 576 columns lie in 640, and 64 heads in 128: q as the kernels take it, forward and backward, q without the
# queries that have no key, and its gradient; log-sum-exp and delta; a latent row. Where a sequence is so long that its
# rows are gathered, it is two arrays like q less.
TPU_QUERY = 4 * 2 * 64 * 640 + INDICES + INDEX_QUERIES + 2 * 4 * 128 + 2 * 640
TPU_FIXED = 16 << 20


def layer(implementation: str) -> Any:
    """The operations as a layer chains them; the gradient of the result comes in."""
    def chain(q_BTIC, k_BSC, w_BTI, q_positions, k_positions, q_segments, k_segments, q_BTHR, kv_BSR, d_out_BTHV):
        indices_BTK = select_topk(q_BTIC, k_BSC, w_BTI, q_positions=q_positions, k_positions=k_positions,
                                  q_segments=q_segments, k_segments=k_segments, scale=128 ** -0.5, top_k=TOP_K,
                                  implementation=implementation)
        attend = lambda q, kv: sparse_mla(q, kv, indices_BTK, implementation=implementation, **OPTIONS)
        out_BTHV, pull = jax.vjp(attend, q_BTHR, kv_BSR)
        return out_BTHV, *pull(d_out_BTHV)

    return chain


def case(target: str, platform: str, implementation: str, length: int) -> Case:
    def limits(target: Target) -> dict[str, float]:
        if platform == "cuda":
            return {"temporaries": length * GPU_QUERY + ROW_GRADIENTS + KEY_BUFFER}
        return {"temporaries": length * TPU_QUERY + TPU_FIXED}

    q, kv, _ = forward_arguments(1, length, length)
    arguments = *indexer_arguments(length, length), q, kv, array((1, length, 64, 512), BF16)
    return Case(f"layer {length} x {length}", platform, layer(implementation), arguments, only=(target,), limits=limits)


CASES = tuple(case(*place, length) for place in (("h200", "cuda", "pallas_gpu"), ("v5p", "tpu", "pallas_tpu"))
              for length in (4096, 32768, 131072))
