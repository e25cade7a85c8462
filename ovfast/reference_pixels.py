"""Plain torch and numpy implementations of what reads and writes uint8 pixels.

The oracle of the kernel tests, as `reference` is for the arithmetic of features. Pixels become
floats in `patch_embed` and nowhere else.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

UInt8Array = NDArray[np.uint8]

PIXEL_SCALE = 1 / 127.5
# Columns of the windows that `patch_embed` cuts out of pictures.
OFFSET, STRIDE, HEIGHT, WIDTH, TOP, LEFT, FILL = range(7)


def patch_offset(weight: Tensor, bias: Tensor, position_embedding: Tensor) -> Tensor:
    """What patch_embed adds: position embedding + bias − Σ weight, (tokens_per_view, hidden)."""
    constant = bias.double() - weight.double().sum(dim=1)
    return (position_embedding.double() + constant).float()


def patch_embed(
    pixels: Tensor,
    windows: Tensor,
    weight: Tensor,
    offset: Tensor,
    image_size: int,
    dtype: torch.dtype,
    *,
    upcast: bool = False,
) -> Tensor:
    """Embeds the patches of views straight from the pixels of pictures, which are not padded.

    With u = 0…255 the normalised pixel is u / 127.5 − 1, so the product is Σ w·u / 127.5 − Σ w.

    Args:
        pixels: (num_bytes,) uint8, RGB pictures anywhere in it.
        windows: (num_views, 7) int64, for each view the byte offset of its picture, the bytes from
            a row to the next, the picture's height and width, the view's top and left corner in it
            (negative where it is padded), and the value of pixels outside the picture.
        weight: (hidden_size, 3 · patch²) float32, columns in (channel, row, column) order.
        offset: (tokens_per_view, hidden_size) float32, of `patch_offset`.
        image_size: side of a view in pixels; what does not fill a patch is dropped.
        dtype: of the result.
        upcast: compute and return float64.

    Returns:
        (num_views · tokens_per_view, hidden_size).
    """
    tokens, hidden_size = offset.shape
    kind = torch.float64 if upcast else dtype
    out = torch.empty(len(windows), tokens, hidden_size, dtype=kind, device=pixels.device)
    patch = round((weight.shape[1] // 3) ** 0.5)
    grid = image_size // patch
    for index, window in enumerate(windows.tolist()):
        view = cut_view(pixels, window, image_size)[: grid * patch, : grid * patch]
        patches = view.reshape(grid, patch, grid, patch, 3).permute(0, 2, 4, 1, 3)
        patches = patches.to(torch.float64 if upcast else torch.float32).reshape(tokens, -1)
        if upcast:
            out[index] = offset.double() + (patches @ weight.double().t()) / 127.5
        else:
            out[index] = torch.addmm(offset, patches, weight.t(), alpha=PIXEL_SCALE)
    return out.flatten(0, 1)


def cut_view(pixels: Tensor, window: Sequence[int], side: int) -> Tensor:
    """One view, (side, side, 3) uint8: a copy only where it is padded."""
    height, width, top, left = (window[column] for column in (HEIGHT, WIDTH, TOP, LEFT))
    picture = pixels.as_strided((height, width, 3), (window[STRIDE], 3, 1), window[OFFSET])
    y0, y1 = max(top, 0), min(top + side, height)
    x0, x1 = max(left, 0), min(left + side, width)
    if (y1 - y0, x1 - x0) == (side, side):
        return picture[y0:y1, x0:x1]
    view = pixels.new_full((side, side, 3), window[FILL])
    if y0 < y1 and x0 < x1:
        view[y0 - top : y1 - top, x0 - left : x1 - left] = picture[y0:y1, x0:x1]
    return view


def resample(
    source: Tensor,
    first: Tensor,
    coefficients: Tensor,
    axis: int,
    out: Tensor,
    *,
    offset: int = 0,
    fill: int = 0,
) -> Tensor:
    """One pass of Pillow's bicubic resize, in its integers, over rows (axis 0) or columns (1).

    Of a picture, or of all frames of a clip.

    The axis may be longer than the source: a picture padded by address.

    Args:
        source: (height, width, 3) uint8, or (frames, height, width, 3).
        first: (size_out,) int32, the first tap of each output on the padded axis.
        coefficients: (size_out, num_taps) int32 of 22 fractional bits, 0 where a tap is not used.
        axis: 0 or 1.
        out: uint8, shape of source with size_out on the axis; written in place.
        offset: where the source begins on the padded axis.
        fill: value of the padding.

    Returns:
        out.
    """
    lines = source.movedim(axis - 3, 0).to(torch.int32)
    taps = first[:, None].long() - offset + torch.arange(coefficients.shape[1], device=first.device)
    inside = (taps >= 0) & (taps < len(lines))
    total = torch.full((len(first), *lines.shape[1:]), 1 << 21, dtype=torch.int32).to(first.device)
    for tap in range(coefficients.shape[1]):
        values = lines[taps[:, tap].clamp(0, len(lines) - 1)]
        values[~inside[:, tap]] = fill
        total += coefficients[:, tap].view(-1, *[1] * (source.ndim - 1)) * values
    out.movedim(axis - 3, 0)[:] = (total >> 22).clamp(0, 255).to(torch.uint8)
    return out


def pack_views(
    resized: UInt8Array,
    offset_hw: tuple[int, int],
    grid_hw: tuple[int, int],
    fill: int,
    out: UInt8Array,
) -> None:
    """Cuts a picture, padded to a canvas of whole views, into its crops, row by row.

    Args:
        resized: (height, width, 3) uint8, the picture inside the canvas.
        offset_hw: its (top, left) corner in the canvas.
        grid_hw: rows and columns of crops.
        fill: value of the padding.
        out: (rows · cols, side, side, 3) uint8, written completely.
    """
    side = out.shape[1]
    (top, left), (rows, cols) = offset_hw, grid_hw
    height, width = resized.shape[:2]
    out[...] = fill
    for row in range(rows):
        y0, y1 = max(top, row * side), min(top + height, (row + 1) * side)
        for col in range(cols):
            x0, x1 = max(left, col * side), min(left + width, (col + 1) * side)
            if y0 < y1 and x0 < x1:
                view = out[row * cols + col]
                target = view[y0 - row * side : y1 - row * side, x0 - col * side : x1 - col * side]
                target[...] = resized[y0 - top : y1 - top, x0 - left : x1 - left]
