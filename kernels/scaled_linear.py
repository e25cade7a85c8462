"""A linear layer in float8: out = (x @ weightᵀ) · x_scales · scales + bias + residual.

Layout: x (M, K), weight (N, K), both float8 e4m3 with K contiguous, any row stride; x_scales (M,)
and scales (N,) float32. out and residual (M, N) float32, float16 or bfloat16, any row stride. The
products are summed in float32 with one rounding on store. Tensor cores of sm_89 and sm_90 keep some
14 bits of a float8 sum, so each 128 products are summed by themselves and added to the rest in
float32.

The sum over K runs in order, 128 at a time, whatever the tile, and is never split: a row's bits do
not depend on how many rows there are.

Roofline: arithmetic, 2·M·N·K FLOP at twice the rate of bfloat16: 4800 rows of 7B's gate and up are
1.3 TFLOP, 0.9 ms at 1.5 PFLOP/s.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ovfast.kernels.decode_tiles import DTYPES, FLOAT8, check_tensor


# M is not specialised: a prompt whose length is a multiple of 16 would compile anew.
@triton.jit(do_not_specialize=["M"])
def _scaled_linear_kernel(
    x_ptr,
    x_scales_ptr,
    weight_ptr,
    scales_ptr,
    bias_ptr,  # None: no bias
    residual_ptr,  # None: no residual
    out_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    stride_rm,
    stride_om,
    EVEN_K: tl.constexpr,  # K is a multiple of BLOCK_K: no mask in the loop
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    num_m = tl.cdiv(M, BLOCK_M)
    num_n = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0)
    # Neighbouring programs share rows and columns, so that L2 serves most of what they read.
    tile_m, tile_n = tl.swizzle2d(tile // num_n, tile % num_n, num_m, num_n, GROUP_M)
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    # Rows past the end repeat the last one: they need no mask in the loop and are not stored.
    # int64: 2**31 elements are 113 thousand rows of width 18944, which a batch can reach.
    x_rows = tl.minimum(offs_m, M - 1).to(tl.int64)
    weight_rows = tl.minimum(offs_n, N - 1).to(tl.int64)
    x_ptrs = x_ptr + x_rows[:, None] * stride_xm + offs_k[None, :]
    weight_ptrs = weight_ptr + weight_rows[None, :] * stride_wn + offs_k[:, None]

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            # Both operands: what lies behind a row may be NaN, and 0 · NaN is NaN.
            x = tl.load(x_ptrs, mask=offs_k[None, :] < K - k, other=0.0)
            weight = tl.load(weight_ptrs, mask=offs_k[:, None] < K - k, other=0.0)
        acc += tl.dot(x, weight, max_num_imprecise_acc=BLOCK_K)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K

    mask_n = offs_n < N
    acc *= tl.load(x_scales_ptr + x_rows)[:, None] * tl.load(scales_ptr + weight_rows)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    mask = (offs_m < M)[:, None] & mask_n[None, :]
    out_rows = offs_m.to(tl.int64)[:, None]
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + out_rows * stride_rm + offs_n[None, :]
        acc += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + out_rows * stride_om + offs_n[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


class Tile(NamedTuple):
    """What one program computes, and with what."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


_BLOCK_K = 128
_GROUP_M = 8
_TILES = (Tile(128, 128, 8, 3), Tile(64, 128, 4, 4))
_NUM_SMS = 132  # of an H100 or H200; another device gets the same tiles


def launch_config(num_rows: int, width: int) -> Tile:
    """Picks the tile for an out of (num_rows, width); not yet measured on a device.

    Args:
        num_rows: of out, at least 1.
        width: of out, at least 1.

    Returns:
        The large tile where it makes a program for every SM.
    """
    large, small = _TILES
    num_tiles = triton.cdiv(num_rows, large.block_m) * triton.cdiv(width, large.block_n)
    return large if num_tiles >= _NUM_SMS else small


def scaled_linear(
    x: torch.Tensor,
    x_scales: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Multiplies float8 rows by a float8 weight.

    Args:
        x: (M, K) float8_e4m3fn, of `quantize_rows`.
        x_scales: (M,) float32.
        weight: (N, K) float8_e4m3fn.
        scales: (N,) float32.
        bias: (N,), dtype of out, or None.
        out: (M, N) float32, float16 or bfloat16, written; must not overlap the inputs, but for the
            residual.
        residual: (M, N), dtype of out, added last; may be `out` itself.
        tile: instead of that of `launch_config`; the result is the same.

    Returns:
        out.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: a wrong shape, device or last-dimension stride.
    """
    _check(x, x_scales, weight, scales, bias, residual, out)
    (num_rows, depth), width = x.shape, weight.shape[0]
    if num_rows == 0:
        return out
    tile = tile or launch_config(num_rows, width)
    grid = (triton.cdiv(num_rows, tile.block_m) * triton.cdiv(width, tile.block_n),)
    # Without the guard Triton launches on device 0; on CPU tensors it does nothing.
    with torch.cuda.device_of(x):
        _scaled_linear_kernel[grid](
            x,
            x_scales,
            weight,
            scales,
            bias,
            residual,
            out,
            num_rows,
            width,
            depth,
            x.stride(0),
            weight.stride(0),
            0 if residual is None else residual.stride(0),
            out.stride(0),
            EVEN_K=depth % _BLOCK_K == 0,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=_BLOCK_K,
            GROUP_M=_GROUP_M,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=True,  # said aloud, since the default changes between releases
        )
    return out


def _check(
    x: torch.Tensor,
    x_scales: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    if out.dtype not in DTYPES:
        raise TypeError(f"out is {out.dtype}; expected one of {DTYPES}")
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (M, K ≥ 1)")
    if weight.ndim != 2 or weight.shape[0] == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected (N ≥ 1, {x.shape[1]})")
    (num_rows, depth), width = x.shape, weight.shape[0]
    expected = (
        ("x", x, (num_rows, depth), FLOAT8),
        ("x_scales", x_scales, (num_rows,), torch.float32),
        ("weight", weight, (width, depth), FLOAT8),
        ("scales", scales, (width,), torch.float32),
        ("bias", bias, (width,), out.dtype),
        ("residual", residual, (num_rows, width), out.dtype),
        ("out", out, (num_rows, width), out.dtype),
    )
    for name, tensor, shape, dtype in expected:
        if tensor is not None:
            check_tensor(name, tensor, shape, dtype, x.device, contiguous=False)
