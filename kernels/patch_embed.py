"""Patch embedding from bytes: out[v, p] = (Σ_k weight[:, k] · u[v, p, k]) / 127.5 + offset[p].

u = 0…255 is the pixel, exact in every dtype; SigLIP's normalisation u / 127.5 − 1 is the scale here
and −Σ weight in `offset`, beside the bias and the position embedding. A view is a window of a
picture, given as seven numbers: what the window shows beyond the picture is its fill color, so
neither crops nor padding are ever built. One launch embeds the views of all pictures.

Layout: pictures are RGB bytes, row by row, anywhere in one buffer. weight is (hidden_size,
patch_size, ROW) in the order (row, column, channel), so that a row of a patch is 3 · patch_size
neighbouring bytes; each is padded with zeros to ROW, a power of two, and is one step of the dot
products. Dtypes: weight and out float32, float16 or bfloat16; offset float32. Products are summed
in float32, rows of the patch in order, and rounded once on store. A view's bits depend on nothing
else in the launch.

Roofline: arithmetic. A view of 384 × 384 to 729 tokens of width 1152 is 0.99 GFLOP, 1.6 with the
padding of rows and tiles: 2 µs at 790 TFLOP/s, where a layer of the tower takes 31. Loads of single
bytes, once for each tile of outputs, are 390 thousand a warp: 3 µs of 132 load units.
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

MIN_ROW = 16  # the shortest step that tl.dot takes
WINDOW_FIELDS = 7  # byte offset, row stride in bytes, height, width, top, left, fill

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_SCALE = tl.constexpr(1 / 127.5)


@triton.jit
def _patch_embed_kernel(
    pixels_ptr,
    windows_ptr,
    weight_ptr,
    offset_ptr,
    out_ptr,
    N,
    stride_wn,
    stride_vm,
    stride_om,
    SIDE: tl.constexpr,  # tokens
    PATCH: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    M: tl.constexpr = SIDE * SIDE
    num_m_blocks: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    view = (tl.program_id(0) // num_m_blocks).to(tl.int64)
    m = tl.program_id(0) % num_m_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, ROW)
    m_mask = m < M
    n_mask = n < N

    window_ptr = windows_ptr + view * 7
    # int64: the buffer, and a large picture, pass 2**31 bytes. A row of a picture does not.
    stride_y = tl.load(window_ptr + 1)
    height = tl.load(window_ptr + 2).to(tl.int32)
    y = tl.load(window_ptr + 4).to(tl.int32) + m // SIDE * PATCH
    x = tl.load(window_ptr + 5).to(tl.int32) * 3 + m % SIDE * (3 * PATCH)
    row_bytes = tl.load(window_ptr + 3).to(tl.int32) * 3
    fill = tl.load(window_ptr + 6).to(tl.uint8)
    row_ptrs = pixels_ptr + tl.load(window_ptr) + y * stride_y + x
    x_k = x[:, None] + k[None, :]
    weight_ptrs = weight_ptr + n.to(tl.int64)[None, :] * stride_wn + k[:, None]

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(PATCH):
        y_mask = (y >= 0) & (y < height) & m_mask
        x_mask = (x_k >= 0) & (x_k < row_bytes) & (k < 3 * PATCH)[None, :]
        u = tl.load(row_ptrs[:, None] + k[None, :], mask=y_mask[:, None] & x_mask, other=fill)
        w = tl.load(weight_ptrs, mask=n_mask[None, :], other=0.0)
        acc = tl.dot(u.to(w.dtype), w, acc, input_precision="ieee")
        y += 1
        row_ptrs += stride_y
        weight_ptrs += ROW

    mask = m_mask[:, None] & n_mask[None, :]
    offset = tl.load(offset_ptr + m[:, None] * stride_vm + n[None, :], mask=mask, other=0.0)
    out_rows = view * M + m
    out_ptrs = out_ptr + out_rows[:, None] * stride_om + n[None, :]
    tl.store(out_ptrs, (acc * _SCALE + offset).to(out_ptr.dtype.element_ty), mask=mask)


def pack_patch_weight(weight: torch.Tensor) -> torch.Tensor:
    """Puts a patch weight into the order and padding that `patch_embed` reads.

    Args:
        weight: (hidden_size, 3 · patch_size²), columns in (channel, row, column) order.

    Returns:
        (hidden_size, patch_size, ROW), dtype kept: columns of a row in (column, channel) order,
        then zeros up to ROW, the power of two from 3 · patch_size and 16 on.

    Raises:
        ValueError: the columns are not those of a square patch of three channels.
    """
    if weight.ndim != 2 or weight.shape[1] == 0 or weight.shape[1] % 3 != 0:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; expected (hidden_size, 3 · patch_size²)"
        )
    hidden_size, patch = weight.shape[0], math.isqrt(weight.shape[1] // 3)
    if 3 * patch * patch != weight.shape[1]:
        raise ValueError(
            f"weight has {weight.shape[1]} columns; expected 3 · patch_size² of a square patch"
        )
    rows = weight.reshape(hidden_size, 3, patch, patch).permute(0, 2, 3, 1)
    rows = rows.reshape(hidden_size, patch, 3 * patch)
    return F.pad(rows, (0, _row_size(patch) - 3 * patch))


def launch_config(dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Picks (BLOCK_M, BLOCK_N, num_warps, num_stages); not yet measured on a device.

    By the weight's dtype alone, so that a view's bits do not depend on how many there are. The
    loads of pixels are single bytes, whose latency only other programs hide: small tiles, so that
    four fit a multiprocessor and one view makes 216.

    Args:
        dtype: of the weight.

    Returns:
        Tokens and outputs of one program, its warps, and the loads in flight.
    """
    return (32, 64, 8, 2) if dtype == torch.float32 else (64, 64, 4, 3)


def patch_embed(
    pixels: torch.Tensor,
    windows: torch.Tensor,
    weight: torch.Tensor,
    offset: torch.Tensor,
    out: torch.Tensor,
    *,
    patch_size: int,
    image_size: int,
) -> torch.Tensor:
    """Embeds the patches of any number of views of any pictures, into `out`.

    Args:
        pixels: (num_bytes,) uint8, any number of RGB pictures.
        windows: (num_views, 7) int64: byte offset of the picture's first pixel, row stride in
            bytes, height, width, top, left, fill. Pixel (y, x) of a view is the picture's pixel
            (top + y, left + x), or `fill` in all channels where the picture has none. Values are
            trusted: checking them would read the device.
        weight: (hidden_size, patch_size, ROW) float32, float16 or bfloat16, contiguous, of
            `pack_patch_weight`.
        offset: (tokens_per_view, hidden_size) float32: position embedding + bias − Σ weight.
        out: (num_views · tokens_per_view, hidden_size) float32, float16 or bfloat16; written in
            place. Must not overlap the inputs.
        patch_size: side of a patch in pixels.
        image_size: side of a view in pixels; what does not fill a patch is dropped.

    Returns:
        out.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: a wrong shape, device, stride or size.
    """
    _check(pixels, windows, weight, offset, out, patch_size, image_size)
    num_views, (tokens_per_view, hidden_size) = windows.shape[0], offset.shape
    if num_views == 0 or hidden_size == 0:
        return out
    block_m, block_n, num_warps, num_stages = launch_config(weight.dtype)
    grid = (num_views * triton.cdiv(tokens_per_view, block_m), triton.cdiv(hidden_size, block_n))
    # Without the guard Triton launches on device 0; on CPU tensors it does nothing.
    with torch.cuda.device_of(pixels):
        _patch_embed_kernel[grid](
            pixels,
            windows,
            weight,
            offset,
            out,
            hidden_size,
            weight.stride(0),
            offset.stride(0),
            out.stride(0),
            SIDE=image_size // patch_size,
            PATCH=patch_size,
            ROW=weight.shape[2],
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=num_warps,
            num_stages=num_stages,
            enable_fp_fusion=True,  # said aloud, since the default changes between releases
        )
    return out


def _row_size(patch_size: int) -> int:
    row: int = triton.next_power_of_2(3 * patch_size)
    return max(row, MIN_ROW)


def _check(
    pixels: torch.Tensor,
    windows: torch.Tensor,
    weight: torch.Tensor,
    offset: torch.Tensor,
    out: torch.Tensor,
    patch_size: int,
    image_size: int,
) -> None:
    if not 1 <= patch_size <= image_size:
        raise ValueError(
            f"patch_size {patch_size} and image_size {image_size}; expected 1 ≤ patch ≤ image"
        )
    for name, tensor in (("weight", weight), ("out", out)):
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name} is {tensor.dtype}; expected one of {_DTYPES}")
    for name, tensor, ndim in (("pixels", pixels, 1), ("windows", windows, 2)):
        if tensor.ndim != ndim:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {ndim} dimensions")
    num_views, hidden_size = windows.shape[0], weight.shape[0]
    num_tokens = (image_size // patch_size) ** 2
    expected = (
        ("pixels", pixels, tuple(pixels.shape), torch.uint8),
        ("windows", windows, (num_views, WINDOW_FIELDS), torch.int64),
        ("weight", weight, (hidden_size, patch_size, _row_size(patch_size)), weight.dtype),
        ("offset", offset, (num_tokens, hidden_size), torch.float32),
        ("out", out, (num_views * num_tokens, hidden_size), out.dtype),
    )
    for name, tensor, shape, dtype in expected:
        if tensor.dtype != dtype:
            raise TypeError(f"{name} is {tensor.dtype}; expected {dtype}. Convert it before")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}")
        if tensor.device != pixels.device:
            raise ValueError(f"{name} is on {tensor.device}; pixels is on {pixels.device}")
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name} has last-dimension stride {tensor.stride(-1)}; expected 1")
    for name, tensor in (("windows", windows), ("weight", weight)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; expected contiguous")
