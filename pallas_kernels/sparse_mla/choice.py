"""Which implementation of sparse latent attention runs on which platform and for which shapes.

The Pallas kernels are compiled for their chips and interpreted in the tests, but have not run on one yet; and a Pallas
call is not split over a mesh by itself. So they are named, not chosen.
"""

from typing import Mapping

from pallas_kernels.blocks import Tiles, tuned
from pallas_kernels.sparse_mla import sparse_core

Shapes = Mapping[str, tuple[int, ...]]


def prefer(platform: str, shapes: Shapes) -> tuple[str, str]:
    """The implementation of the forward pass for a platform and shapes, and the reason."""
    return "xla", "gathers the selected rows of one block of queries at a time"


def refuse(implementation: str, shapes: Shapes) -> str | None:
    """Why a Pallas kernel cannot take these shapes; None where it can."""
    return None


MOST_GATHERED = 4096  # rows of one query that fit the memory of a TensorCore


def form_on_tpu(shapes: Shapes, dtype: str, no_sparse_cores: str | None) -> tuple[str, str]:
    """How "pallas_tpu" computes the forward pass, "gathered" rows or "tiles" of keys, and the reason.

    By the rows that either moves for one sequence: four for each selected key of each query, against at most all keys
    for each block of queries. Tiles read and write all rows once before that, a gather only where it has to fill them
    up to a multiple of 128. `no_sparse_cores` tells why there are none, if so.
    """
    (_, T, _, R), S, K = shapes["q_BTHR"], shapes["kv_BSR"][1], shapes["indices_BTK"][2]
    if no_sparse_cores is not None:
        return "tiles", no_sparse_cores
    if dtype != "bfloat16" or R > sparse_core.WIDEST or K > MOST_GATHERED:
        return "tiles", (f"at most {MOST_GATHERED} bfloat16 rows of {sparse_core.WIDEST} are gathered for a query, not "
                         f"{K} {dtype} rows of {R}")
    together = tuned(Tiles, "sparse_mla", "pallas_tpu").queries  # they share the tiles of keys which they touch
    whole = R % sparse_core.LANES == 0
    gathered, tiles = 4 * T * K + (0 if whole else 2 * S), (-(-T // together) + 2) * S
    reason = f"{gathered:,} rows are moved for a sequence, by tiles {tiles:,}"
    if not whole:
        reason += f"; a gather copies all {S:,} first, for {R} is no multiple of {sparse_core.LANES}"
    return "gathered" if gathered < tiles else "tiles", reason


def prefer_backward(platform: str, shapes: Shapes) -> tuple[str, str]:
    """The implementation of the backward pass for a platform and shapes, and the reason."""
    return "xla", "gathers anew, one block of queries at a time, and adds up in float32"


def refuse_backward(implementation: str, shapes: Shapes) -> str | None:
    """Why a Pallas kernel of the backward pass cannot take these shapes; None where it can."""
    return None
