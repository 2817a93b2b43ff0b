"""The FP8 release: e4m3 weights with one float32 scale per block of 128 x 128, w = e4m3 * scale_inv.

A scale is max|w| / 448 of its block, so the largest element of a block is +-448. Weights that were quantised from
bfloat16 therefore come through FP8 -> bfloat16 -> FP8 bit for bit: 448 * scale_inv rounds to the bfloat16 maximum that
the scale was made of, and the rounding of the others, at most 2^-9 of each, is less than e4m3 can see. Scales that were
made of other maxima come back within 2^-8, with the same e4m3 weights.
"""

import dataclasses
from typing import Iterator

import numpy as np

from glm5_jax.core.fp8 import BLOCK, E4M3, LARGEST

SCALE = "_scale_inv"  # added to the name of the weight
# Matrices of the layers that stay as they are: the release quantises every other one.
KEPT = ("mlp.gate.weight", "indexer.weights_proj.weight", "eh_proj.weight")


@dataclasses.dataclass(frozen=True)
class QuantisationError:
    """What quantising did to a tensor: the largest error, and the root mean square error over that of the weights."""

    max_abs: float
    relative_rms: float


def is_quantised(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the FP8 release holds this tensor in e4m3: the matrices inside layers but router, indexer head weights
    and MTP projection; not the embedding, the head, norms and biases."""
    return len(shape) == 2 and name.startswith("model.layers.") and not name.endswith(KEPT)


def scale_shape(shape: tuple[int, ...], block: tuple[int, int] = BLOCK) -> tuple[int, ...]:
    """One scale for each block, those cut off at the edges included."""
    return tuple(-(-size // step) for size, step in zip(shape, block))


def _bands(rows: int, step: int) -> Iterator[tuple[int, slice]]:
    """Bands of whole blocks, so that float32 copies stay small."""
    return ((i, slice(first, min(first + step, rows))) for i, first in enumerate(range(0, rows, step)))


def dequantise(weight: np.ndarray, scale_inv: np.ndarray, dtype: np.dtype, block: tuple[int, int] = BLOCK
               ) -> np.ndarray:
    """e4m3 [rows, columns] and float32 scales [row blocks, column blocks] to `dtype`."""
    rows, columns = weight.shape
    out = np.empty(weight.shape, dtype)
    for i, band in _bands(rows, block[0]):
        out[band] = weight[band].astype(np.float32) * np.repeat(scale_inv[i], block[1])[:columns]
    return out


def quantise(weight: np.ndarray, block: tuple[int, int] = BLOCK) -> tuple[np.ndarray, np.ndarray, QuantisationError]:
    """[rows, columns] to e4m3 of the same shape, float32 scales, and what was lost.

    A block of zeros has the scale 1. Raises ValueError for values that are not finite: e4m3 has no infinity.
    """
    rows, columns = weight.shape
    quantised = np.empty(weight.shape, E4M3)
    scale_inv = np.empty(scale_shape(weight.shape, block), np.float32)
    largest_error, square_error, square = 0.0, 0.0, 0.0
    for i, band in _bands(rows, block[0]):
        exact = weight[band].astype(np.float32)
        largest = np.maximum.reduceat(np.abs(exact).max(0), range(0, columns, block[1]))
        if not np.isfinite(largest).all():
            raise ValueError(f"expected finite values to quantise, found NaN or infinity in rows {band.start} to "
                             f"{band.stop - 1}")
        # Below the smallest normal number a quotient would lose what the weights still have.
        scale_inv[i] = np.where(largest > 0, np.maximum(largest / LARGEST, np.finfo(np.float32).tiny), 1)
        scale = np.repeat(scale_inv[i], block[1])[:columns]
        quantised[band] = np.clip(exact / scale, -LARGEST, LARGEST)
        error = quantised[band].astype(np.float32) * scale - exact
        largest_error = max(largest_error, float(np.abs(error).max()))
        square_error += float(np.square(error, dtype=np.float64).sum())
        square += float(np.square(exact, dtype=np.float64).sum())
    return quantised, scale_inv, QuantisationError(largest_error, (square_error / square) ** 0.5 if square else 0.0)
