"""One pass of Pillow's BICUBIC resize: out[n] = clip((2²¹ + Σ_t coefficient[n, t] · pixel) >> 22).

pixel is source[first[n] + t − offset] along the pass's axis, and `fill` where that lies outside the
source: a picture is padded by address, its padded square never built. int32 throughout, so the
bytes are Pillow's; tables come from `ovfast.resize_table`. Two launches resize a picture, or a clip
of any number of frames: they lie one behind another, so that they are rows of one tall picture.

Layout: (height, width, 3) uint8, the pixels of a row side by side, any row stride; before it a
dimension of frames, where there are several. Tables int32.
Rows are handled as bytes: consecutive lanes read and write consecutive bytes, or bytes of
neighbouring pixels where the width shrinks. A vertical pass reads four bytes a thread at once
where row strides and rows are multiples of 16 bytes (widths of 16·k pixels); the coefficients of a
row are the same for all lanes. A horizontal pass uses each coefficient for several rows.

Roofline: memory where it grows or shrinks a little, instructions where it shrinks a lot. 1080p to
384 × 384 is 6.2 MB in and 1.2 MB between the passes (2 µs at 4.2 TB/s), and 32 million taps or one
million warp loads, about 5 µs of the load units of 132 multiprocessors.
"""

import torch
import triton
import triton.language as tl

# Sizes that differ between pictures are not specialised on, or every other picture would compile
# a kernel. The vertical pass keeps those that tell whether loads may be words.
_SIZES = ["R", "T", "offset", "fill", "stride_cm", "stride_ct"]


@triton.jit
def _round_to_bytes(acc):
    return tl.minimum(tl.maximum(acc >> 22, 0), 255).to(tl.uint8)


@triton.jit(do_not_specialize=[*_SIZES, "H", "M"])
def _resample_vertical_kernel(
    source_ptr,
    first_ptr,
    coefficients_ptr,
    out_ptr,
    H,  # rows of a frame of the source
    M,  # rows of a frame of out
    R,  # rows of out, all frames
    N,  # bytes of a row
    T,  # taps
    offset,
    fill,
    stride_sy,
    stride_cm,
    stride_ct,
    stride_oy,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    num_x_blocks = tl.cdiv(N, BLOCK_X)
    r = tl.program_id(0) // num_x_blocks * BLOCK_Y + tl.arange(0, BLOCK_Y)
    x = tl.program_id(0) % num_x_blocks * BLOCK_X + tl.arange(0, BLOCK_X)
    y_mask = r < R
    x_mask = x < N
    frame, y = r // M, r % M
    row = tl.load(first_ptr + y, mask=y_mask, other=0) - offset
    coefficient_ptrs = coefficients_ptr + y * stride_cm
    # int64: pictures of more than 2**31 bytes, where a caller allows them.
    source_row = frame.to(tl.int64) * H + row
    pixel_ptrs = source_ptr + source_row[:, None] * stride_sy + x[None, :]
    begin, end = -row, H - row  # taps that the source has
    acc = tl.full((BLOCK_Y, BLOCK_X), 1 << 21, tl.int32)
    # Unrolled: four loads in flight instead of one.
    for tap in tl.range(0, T, loop_unroll_factor=4):
        coefficient = tl.load(coefficient_ptrs, mask=y_mask, other=0)
        inside = (tap >= begin) & (tap < end)
        pixel = tl.load(pixel_ptrs, mask=inside[:, None] & x_mask[None, :], other=fill)
        acc += coefficient[:, None] * pixel.to(tl.int32)
        coefficient_ptrs += stride_ct
        pixel_ptrs += stride_sy
    out_ptrs = out_ptr + r.to(tl.int64)[:, None] * stride_oy + x[None, :]
    tl.store(out_ptrs, _round_to_bytes(acc), mask=y_mask[:, None] & x_mask[None, :])


@triton.jit(do_not_specialize=[*_SIZES, "W", "N", "stride_sy", "stride_oy"])
def _resample_horizontal_kernel(
    source_ptr,
    first_ptr,
    coefficients_ptr,
    out_ptr,
    W,  # pixels of a row of the source
    R,  # rows of both, all frames
    N,  # bytes of a row of out
    T,  # taps
    offset,
    fill,
    stride_sy,
    stride_cm,
    stride_ct,
    stride_oy,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    num_x_blocks = tl.cdiv(N, BLOCK_X)
    y = tl.program_id(0) // num_x_blocks * BLOCK_Y + tl.arange(0, BLOCK_Y)
    x = tl.program_id(0) % num_x_blocks * BLOCK_X + tl.arange(0, BLOCK_X)
    y_mask = y < R
    x_mask = x < N
    position = x // 3
    channel = x % 3
    column = tl.load(first_ptr + position, mask=x_mask, other=0) - offset
    coefficient_ptrs = coefficients_ptr + position * stride_cm
    row_ptrs = source_ptr + y.to(tl.int64) * stride_sy
    pixel_ptrs = row_ptrs[:, None] + (column * 3 + channel)[None, :]
    begin, end = -column, W - column
    acc = tl.full((BLOCK_Y, BLOCK_X), 1 << 21, tl.int32)
    for tap in tl.range(0, T, loop_unroll_factor=4):
        coefficient = tl.load(coefficient_ptrs, mask=x_mask, other=0)
        inside = (tap >= begin) & (tap < end)
        pixel = tl.load(pixel_ptrs, mask=y_mask[:, None] & inside[None, :], other=fill)
        acc += coefficient[None, :] * pixel.to(tl.int32)
        coefficient_ptrs += stride_ct
        pixel_ptrs += 3
    # Not x: the compiler would see four neighbouring bytes a thread, choose that layout for the
    # whole loop, and pass every tap through shared memory.
    out_ptrs = out_ptr + y.to(tl.int64)[:, None] * stride_oy + (position * 3 + channel)[None, :]
    tl.store(out_ptrs, _round_to_bytes(acc), mask=y_mask[:, None] & x_mask[None, :])


def launch_config(axis: int) -> tuple[int, int, int]:
    """Picks (BLOCK_Y, BLOCK_X, num_warps) for a pass along `axis`; not yet measured on a device.

    Four bytes of out a thread. A vertical pass takes them from one row, so that its coefficients
    are scalars and its loads are words; a horizontal pass from four rows, which share coefficients.

    Args:
        axis: 0 for the vertical pass, 1 for the horizontal one.

    Returns:
        Rows and bytes of a row that one program handles, and its warps.
    """
    return (1, 512, 4) if axis == 0 else (4, 128, 4)


def resample(
    source: torch.Tensor,
    first: torch.Tensor,
    coefficients: torch.Tensor,
    axis: int,
    out: torch.Tensor,
    *,
    offset: int = 0,
    fill: int = 0,
    block: int | None = None,
) -> torch.Tensor:
    """Resamples one axis of a picture, or of all frames of a clip, by a table, into `out`.

    Args:
        source: (height, width, 3) uint8, or (frames, height, width, 3), the rows of a frame behind
            those of the one before; pixels of a row contiguous, any row stride.
        first: (size_out,) int32, the first tap of each position, on a virtual axis. Trusted, as
            the coefficients: checking them would read the device. Wrong ones read no other memory.
        coefficients: (size_out, num_taps) int32 with 22 fractional bits, any strides; fastest
            where the first dimension is the contiguous one, as `resize_table` makes it.
        axis: 0 resamples rows (vertical), 1 columns (horizontal).
        out: source's shape with size_out on `axis`, uint8, pixels of a row contiguous, any row
            stride, frames as of source. Must not overlap the inputs.
        offset: position on the virtual axis of the source's first row or column.
        fill: 0…255, the value at positions of the virtual axis that are outside the source.
        block: largest side of a tile, or None for the shipped tile; the interpreter, slow by the
            program, wants few large ones.

    Returns:
        out.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: a wrong shape, device, stride, axis or fill.
    """
    _check(source, first, coefficients, axis, out, fill)
    rows, row_bytes = out.shape[:-2].numel(), 3 * out.shape[-2]
    if rows == 0 or row_bytes == 0:
        return out
    block_y, block_x, num_warps = launch_config(axis)
    if block is not None:
        block_y, block_x = (min(block, triton.next_power_of_2(size)) for size in (rows, row_bytes))
    # The horizontal pass sees rows alone; only the vertical one needs to know where a frame ends.
    kernel = _resample_vertical_kernel if axis == 0 else _resample_horizontal_kernel
    lengths = (source.shape[-3], out.shape[-3]) if axis == 0 else (source.shape[-2],)
    grid = (triton.cdiv(rows, block_y) * triton.cdiv(row_bytes, block_x),)
    # Without the guard Triton launches on device 0; on CPU tensors it does nothing.
    with torch.cuda.device_of(source):
        kernel[grid](
            source,
            first,
            coefficients,
            out,
            *lengths,
            rows,
            row_bytes,
            coefficients.shape[1],
            offset,
            fill,
            _row_stride(source),
            coefficients.stride(0),
            coefficients.stride(1),
            _row_stride(out),
            BLOCK_Y=block_y,
            BLOCK_X=block_x,
            num_warps=num_warps,
            enable_fp_fusion=True,  # said aloud, though only integers are computed here
        )
    return out


def _row_stride(pixels: torch.Tensor) -> int:
    """From a row to the next, which in frames of one row is that of the next frame."""
    return pixels.stride(0 if pixels.shape[-3] == 1 else -3)


def _check(
    source: torch.Tensor,
    first: torch.Tensor,
    coefficients: torch.Tensor,
    axis: int,
    out: torch.Tensor,
    fill: int,
) -> None:
    if axis not in (0, 1):
        raise ValueError(f"axis is {axis}; expected 0 (vertical) or 1 (horizontal)")
    if not 0 <= fill <= 255:
        raise ValueError(f"fill is {fill}; expected 0 to 255, a value of uint8")
    if source.ndim not in (3, 4) or source.shape[-1] != 3:
        raise ValueError(
            f"source has shape {tuple(source.shape)}; expected (height, width, 3) or (frames,"
            " height, width, 3)"
        )
    if first.ndim != 1:
        raise ValueError(f"first has shape {tuple(first.shape)}; expected (size_out,)")
    size_out = first.shape[0]
    if coefficients.ndim != 2 or coefficients.shape[0] != size_out:
        raise ValueError(
            f"coefficients has shape {tuple(coefficients.shape)}; expected ({size_out}, num_taps),"
            " a row for each element of first"
        )
    out_shape = list(source.shape)
    out_shape[axis - 3] = size_out
    if list(out.shape) != out_shape:
        raise ValueError(f"out has shape {tuple(out.shape)}; expected {tuple(out_shape)}")
    expected = (
        ("source", source, torch.uint8),
        ("first", first, torch.int32),
        ("coefficients", coefficients, torch.int32),
        ("out", out, torch.uint8),
    )
    for name, tensor, dtype in expected:
        if tensor.dtype != dtype:
            raise TypeError(f"{name} is {tensor.dtype}; expected {dtype}. Convert it before")
        if tensor.device != source.device:
            raise ValueError(f"{name} is on {tensor.device}; source is on {source.device}")
    if size_out > 1 and first.stride(0) != 1:
        raise ValueError(f"first has stride {first.stride(0)}; expected 1")
    for name, tensor in (("source", source), ("out", out)):
        if tensor.stride(-1) != 1 or (tensor.shape[-2] > 1 and tensor.stride(-2) != 3):
            raise ValueError(
                f"{name} has strides {tensor.stride()}; expected (any, 3, 1), the pixels of a row"
                " side by side"
            )
        several = tensor.ndim == 4 and tensor.shape[0] > 1 and tensor.numel() > 0
        if several and tensor.stride(0) != tensor.shape[1] * _row_stride(tensor):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}; expected"
                f" the first to be {tensor.shape[1] * _row_stride(tensor)}, a frame behind another"
            )
