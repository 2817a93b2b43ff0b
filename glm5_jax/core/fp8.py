"""The FP8 format of the release: e4m3 weights with one float32 scale per block of a matrix, w = e4m3 * scale."""

import ml_dtypes
import numpy as np

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST = np.float32(448)
BLOCK = (128, 128)
