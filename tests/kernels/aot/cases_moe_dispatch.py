"""Grouped products at GLM-5's sizes: 32 experts of one device, 6,144 by 2,048; forward, and the two of the backward."""

from typing import Any

from case import BF16, F32, I32, Case, array
from pallas_kernels.moe_dispatch import pallas_gpu, pallas_tpu
from targets import Target

EXPERTS, WIDTH, EXPERT_WIDTH = 32, 6144, 2048


def forward(platform: str, module: Any, rows: int, dtype: Any = BF16) -> Case:
    return _case(platform, "grouped_matmul", module.product, dtype, (rows, WIDTH), (EXPERTS, WIDTH, EXPERT_WIDTH))


def backward(platform: str, module: Any, rows: int, dtype: Any = BF16) -> tuple[Case, Case]:
    """The gradient of the rows, and that of the matrices."""
    rows_before, rows_after = (rows, WIDTH), (rows, EXPERT_WIDTH)
    return (_case(platform, "grouped_matmul_backward", module.product_transposed, dtype, rows_after,
                  (EXPERTS, WIDTH, EXPERT_WIDTH)),
            _case(platform, "grouped_outer", module.outer, dtype, rows_before, rows_after))


def _case(platform: str, kernel: str, function: Any, dtype: Any, *shapes: tuple[int, ...]) -> Case:
    def limits(target: Target) -> dict[str, float]:
        return {f"{kernel}/spilled": 0} if platform == "cuda" else {}

    name = f"{kernel} {shapes[0][0]} rows" + (" float32" if dtype is F32 else "")
    return Case(name, platform, function, (*(array(shape, dtype) for shape in shapes), array((EXPERTS,), I32)),
                limits=limits)


# A decode step of eight tokens, then 256 and 1,024 rows per expert. libtpu takes its time: there each kernel once more.
CASES = (
    *(forward("tpu", pallas_tpu, rows) for rows in (64, 8192, 32768)),
    *backward("tpu", pallas_tpu, 8192),
    forward("tpu", pallas_tpu, 64, F32),
    *(forward("cuda", pallas_gpu, rows) for rows in (64, 8192, 32768)),
    *(case for rows in (64, 8192, 32768) for case in backward("cuda", pallas_gpu, rows)),
    forward("cuda", pallas_gpu, 8192, F32), *backward("cuda", pallas_gpu, 8192, F32),
)
