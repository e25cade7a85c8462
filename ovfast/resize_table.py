"""Tables of Pillow's BICUBIC resize of 8-bit pictures: taps and fixed-point weights of one axis.

Owns what must agree with Pillow bit for bit: which pixels an output pixel reads, the weights as
22-bit integers, and which pass comes first. Whoever applies the tables computes
clip((2²¹ + Σ coefficient · pixel) >> 22, 0, 255) in int32, one axis at a time.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import PIL
from numpy.typing import NDArray

__all__ = ["PRECISION_BITS", "ResizeTable", "resize_table", "vertical_first"]

PRECISION_BITS = 22
PILLOW_MAJOR = int(PIL.__version__.split(".")[0])
_SUPPORT = 2.0  # of the bicubic filter, in source pixels where nothing shrinks


@dataclass(frozen=True, slots=True, eq=False)
class ResizeTable:
    """How one axis is resampled. Shared by all who ask for the same sizes: never written to.

    Attributes:
        first: (size_out,) int32, the first source position that an output position reads.
        coefficients: (size_out, num_taps) int32 with 22 fractional bits, zero beyond the taps in
            use. Taps of neighbouring output positions lie side by side (strides of a transposed
            array): lanes that make neighbouring pixels read neighbouring words.
    """

    first: NDArray[np.int32]
    coefficients: NDArray[np.int32]


# As Pillow 13.0 Resample.c precompute_coeffs and normalize_coeffs_8bpc: float64, sums in the order
# of the taps, since another order changes last bits and then coefficients.
@lru_cache(maxsize=64)
def resize_table(size_in: int, size_out: int) -> ResizeTable:
    """Makes the table that takes an axis from size_in to size_out pixels.

    Args:
        size_in: pixels before, at least 1.
        size_out: pixels after, at least 1.

    Returns:
        The table; the same object for the same sizes while it is cached.

    Raises:
        ValueError: a size is below 1.
    """
    if min(size_in, size_out) < 1:
        raise ValueError(f"resize of an axis from {size_in} to {size_out}; expected at least 1")
    scale = size_in / size_out
    filter_scale = max(scale, 1.0)
    support = _SUPPORT * filter_scale
    centre = (np.arange(size_out) + 0.5) * scale
    # Casts to integers cut towards zero, as in C.
    first = np.maximum((centre - support + 0.5).astype(np.int32), 0)
    end = np.minimum((centre + support + 0.5).astype(np.int32), size_in)
    taps = np.arange((end - first).max(), dtype=np.int32)[:, None]
    weights = _bicubic((first + taps - centre + 0.5) * (1.0 / filter_scale))
    weights[first + taps >= end] = 0.0
    total = np.zeros(size_out)
    for row in weights:
        total += row
    weights /= total
    weights *= 1 << PRECISION_BITS
    weights += np.copysign(0.5, weights)
    return ResizeTable(first=first, coefficients=weights.astype(np.int32).T)


def _bicubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pillow's bicubic_filter, a = -0.5, every operation in its order."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


# As the installed Pillow's ImagingResample: 8-bit rounding between the passes makes the order show.
def vertical_first(source_hw: tuple[int, int], size_hw: tuple[int, int]) -> bool:
    """Whether Pillow resizes the height before the width; it skips an axis that keeps its size.

    Args:
        source_hw: (height, width) before.
        size_hw: (height, width) after.

    Returns:
        Always False up to Pillow 12; from 13 on True where that order is the cheaper one.
    """
    removed_rows = source_hw[0] - size_hw[0]
    removed_columns = source_hw[1] - size_hw[1]
    return PILLOW_MAJOR >= 13 and removed_rows > 0 and removed_rows > 2 * removed_columns
