"""Gather tables: from which tower rows each visual token is made.

Owns the order of the tokens of one picture or video (base view, map rows, newlines) and the
bilinear shares of shrinking and pooling. What the shapes are is decided by `anyres`.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

NEWLINE = -1  # index of a row that is the learned image_newline vector

Int32Array = NDArray[np.int32]
Float32Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class PackTable:
    """From which tower rows each visual token is made; shared between plans, so never write to it.

    A tower row is view · tokens_per_view + position, counted from the picture's own first view.

    Attributes:
        index: (num_tokens, 4) rows to mix; all -1 where the token is the newline vector.
        weight: (num_tokens, 4) their shares; (1, 0, 0, 0) for a plain copy, zeros for a newline.
        source_rows: (num_sources,) the rows used at all, ascending: what fc1 has to compute.
        index_compact: (num_tokens, 4) as index, but counted in source_rows.
    """

    index: Int32Array
    weight: Float32Array
    source_rows: Int32Array
    index_compact: Int32Array


# A table takes 48 bytes a token: about 0.4 MB for the largest picture, 0.3 MB for 32 frames.
@lru_cache(maxsize=64)
def grid_table(
    cols: int, side: int, kept: tuple[int, int, int, int], final_hw: tuple[int, int]
) -> PackTable:
    """Base view, then the kept and shrunk map with a newline after each of its rows.

    Args:
        cols: crops in a row of the grid.
        side: tokens on a side of a view.
        kept: row0, row1, col0, col1 of the map that unpadding leaves.
        final_hw: the map after shrinking.

    Returns:
        The table, shared by all pictures of this shape.
    """
    row0, row1, col0, col1 = kept
    height, width = final_hw
    y, wy = _bilinear(row1 - row0, height)
    x, wx = _bilinear(col1 - col0, width)
    y, x = y + row0, x + col0
    # (height, width, 2 vertical, 2 horizontal): the four neighbours of each map position
    view = 1 + (y[:, None, :, None] // side) * cols + x[None, :, None, :] // side
    position = (y[:, None, :, None] % side) * side + x[None, :, None, :] % side
    rows = np.full((height, width + 1, 4), NEWLINE, np.int64)
    shares = np.zeros((height, width + 1, 4), np.float32)
    rows[:, :width] = (view * side * side + position).reshape(height, width, 4)
    shares[:, :width] = (wy[:, None, :, None] * wx[None, :, None, :]).reshape(height, width, 4)
    base_rows, base_shares = _copies(side * side)
    index = np.concatenate([base_rows, rows.reshape(-1, 4)])
    return _finish(index, np.concatenate([base_shares, shares.reshape(-1, 4)]))


@lru_cache(maxsize=8)
def video_table(num_frames: int, side: int, final_hw: tuple[int, int]) -> PackTable:
    """Every frame pooled to final_hw, in order of time, then one newline."""
    y, wy = _bilinear(side, final_hw[0])
    x, wx = _bilinear(side, final_hw[1])
    frame = (y[:, None, :, None] * side + x[None, :, None, :]).reshape(-1, 4)
    shares = (wy[:, None, :, None] * wx[None, :, None, :]).reshape(-1, 4)
    rows = np.arange(num_frames, dtype=np.int64)[:, None, None] * side * side + frame
    newline = np.full((1, 4), NEWLINE, np.int64)
    weight = np.concatenate([np.tile(shares, (num_frames, 1)), np.zeros((1, 4), np.float32)])
    return _finish(np.concatenate([rows.reshape(-1, 4), newline]), weight)


@lru_cache(maxsize=8)
def copy_table(tokens_per_view: int, newline: bool) -> PackTable:
    """One whole view, and a newline if wanted."""
    index, weight = _copies(tokens_per_view)
    if newline:
        index = np.concatenate([index, np.full((1, 4), NEWLINE, np.int64)])
        weight = np.concatenate([weight, np.zeros((1, 4), np.float32)])
    return _finish(index, weight)


def _copies(num_rows: int) -> tuple[NDArray[np.int64], Float32Array]:
    index = np.repeat(np.arange(num_rows, dtype=np.int64)[:, None], 4, axis=1)
    weight = np.zeros((num_rows, 4), np.float32)
    weight[:, 0] = 1
    return index, weight


# As torch upsample_bilinear2d: align_corners=False, float32, without antialias when shrinking.
def _bilinear(size_in: int, size_out: int) -> tuple[NDArray[np.int64], Float32Array]:
    """Neighbours and shares of each output position: both (size_out, 2)."""
    scale = np.float32(size_in) / np.float32(max(size_out, 1))
    # One rounding, as the fused multiply-add of torch's CPU and CUDA code; two move a share by
    # up to 7e-6 in large maps.
    exact = np.float64(scale) * (np.arange(size_out) + 0.5) - 0.5
    source = np.maximum(exact.astype(np.float32), np.float32(0))
    first = np.minimum(source.astype(np.int64), max(size_in - 1, 0))
    second = np.minimum(first + 1, max(size_in - 1, 0))
    upper = np.clip(source - first.astype(np.float32), np.float32(0), np.float32(1))
    neighbours = np.stack([first, second], axis=1)
    return neighbours, np.stack([np.float32(1) - upper, upper], axis=1)


def _finish(index: NDArray[np.int64], weight: Float32Array) -> PackTable:
    # Neighbours without a share repeat the first one, or fc1 would compute rows nobody uses.
    index = np.where(weight == 0, index[:, :1], index)
    source_rows = np.unique(index[index != NEWLINE])
    compact = np.searchsorted(source_rows, index)
    compact[index == NEWLINE] = NEWLINE
    return PackTable(
        index=index.astype(np.int32),
        weight=weight,
        source_rows=source_rows.astype(np.int32),
        index_compact=compact.astype(np.int32),
    )
