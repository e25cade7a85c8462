"""A linear layer with its pointwise neighbours: out = act(x[rows] @ weightᵀ + bias) + residual.

Layout: x (any row stride), weight as the checkpoint has it, (N, K) with K contiguous, so nothing
is packed; residual and out any row stride. `rows` gathers rows of x while they are loaded. Dtypes:
all tensors float32, float16 or bfloat16, the same; rows int32. The products are summed in float32,
float32 inputs without tf32; bias, activation and residual are applied to that sum in this order,
with one rounding on store. Transformers rounds before the activation and before the residual.

The sum over K runs in order, in steps of one BLOCK_K per dtype and into one accumulator, whatever
the tile, and is never split: a row's bits do not depend on how many rows there are. That holds
between tile shapes too, which a gpu test asserts.

Roofline: arithmetic, 2·M·N·K FLOP. A layer of the SigLIP tower is 30.4 MFLOP a token in its four
products, 22 GFLOP a view: 28 µs at 790 TFLOP/s. Expected of this kernel: 35-40 % of that for one
view, whose tiles do not fill the device, 55-65 % for 5 to 10 views, 70 % from 16 on.
"""

import math
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl

from ovfast.kernels.shared_memory import LARGE, shared_bytes

Activation = Literal["gelu_tanh", "gelu_erf"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_ACTIVATIONS = (None, "gelu_tanh", "gelu_erf")

_SQRT_2_OVER_PI = tl.constexpr(math.sqrt(2.0 / math.pi))
_SQRT_HALF = tl.constexpr(math.sqrt(0.5))


# M is not specialised: a count of views that makes it a multiple of 16 would compile anew.
@triton.jit(do_not_specialize=["M"])
def _fused_linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,  # None: no residual
    rows_ptr,  # None: row m of out is row m of x
    out_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    stride_rm,
    stride_om,
    ACTIVATION: tl.constexpr,
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
    # int64: 2**31 elements are 684 views of width 4304, which a batch can reach.
    x_rows = tl.minimum(offs_m, M - 1).to(tl.int64)
    if rows_ptr is not None:
        x_rows = tl.load(rows_ptr + x_rows).to(tl.int64)
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
        acc = tl.dot(x, weight, acc, input_precision="ieee")
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K

    # In halves: the residual or the polynomials of erf beside a whole tile overflow the registers.
    halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
    left, right = tl.split(halves)
    left_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N // 2)
    right_n = left_n + BLOCK_N // 2
    # fmt: off
    _finish(left, bias_ptr, residual_ptr, out_ptr, offs_m, left_n,
            M, N, stride_rm, stride_om, ACTIVATION)
    _finish(right, bias_ptr, residual_ptr, out_ptr, offs_m, right_n,
            M, N, stride_rm, stride_om, ACTIVATION)
    # fmt: on


@triton.jit
def _finish(
    acc,
    bias_ptr,
    residual_ptr,
    out_ptr,
    offs_m,
    offs_n,
    M,
    N,
    stride_rm,
    stride_om,
    ACTIVATION: tl.constexpr,
):
    mask_n = offs_n < N
    acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "gelu_tanh":
        # 0.5·(1 + tanh(z)) is the logistic function of 2z, and exact to float32 at both ends.
        z = _SQRT_2_OVER_PI * (acc + 0.044715 * acc * acc * acc)
        acc = acc / (1.0 + tl.exp(-2.0 * z))
    elif ACTIVATION == "gelu_erf":
        acc = acc * 0.5 * (1.0 + tl.erf(acc * _SQRT_HALF))
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
    block_k: int
    num_warps: int
    num_stages: int


# From 64 rows and four warps up every tile is made of wgmma on sm_90. Not yet measured on a
# device: the second number is a guess of the time an element takes beside the largest tile, which
# reads the fewest bytes an element.
_HALF_TILES = (
    (Tile(128, 256, 64, 8, 3), 1.0),
    (Tile(128, 128, 64, 4, 3), 1.15),
    (Tile(64, 128, 64, 4, 4), 1.35),
    (Tile(64, 64, 64, 4, 5), 1.8),
)
_FLOAT32_TILE = Tile(64, 128, 16, 8, 3)
_NUM_SMS = 132  # of an H100 or H200; another device gets the same tiles
_GROUP_M = 8


def launch_config(num_rows: int, width: int, dtype: torch.dtype, shared_bytes: int = LARGE) -> Tile:
    """Picks the tile that should finish first for an out of (num_rows, width).

    Args:
        num_rows: of out, at least 1.
        width: of out, at least 1.
        dtype: of the tensors.
        shared_bytes: that one block may have: where it is SMALL the largest tile does not fit.

    Returns:
        The tile. float32 has one.
    """
    if dtype == torch.float32:
        return _FLOAT32_TILE

    def time(candidate: tuple[Tile, float]) -> float:
        tile, cost = candidate
        num_tiles = triton.cdiv(num_rows, tile.block_m) * triton.cdiv(width, tile.block_n)
        num_waves: int = triton.cdiv(num_tiles, _NUM_SMS)
        return cost * tile.block_m * tile.block_n * num_waves

    # Two bytes an element, in each stage of the pipeline, and barriers.
    fitting = [
        (tile, cost)
        for tile, cost in _HALF_TILES
        if 2 * (tile.block_m + tile.block_n) * tile.block_k * tile.num_stages < shared_bytes - 1024
    ]
    return min(fitting or _HALF_TILES[-1:], key=time)[0]


def fused_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    activation: Activation | None = None,
    residual: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Multiplies rows by a weight and adds bias, activation and residual in the same pass.

    Args:
        x: (num_rows, K) float32, float16 or bfloat16.
        weight: (N, K), dtype of x.
        bias: (N,), dtype of x.
        activation: of the biased product: "gelu_tanh", "gelu_erf" or None.
        residual: (M, N), dtype of x, added last; may be `out` itself.
        rows: (M,) int32, the row of x that each row of out takes, or None: M is num_rows. Values
            are trusted: checking them would read the device.
        out: (M, N), dtype of x; written in place, or None: allocated. Must not overlap the inputs,
            but for the residual.
        tile: instead of that of `launch_config`; the result is the same.

    Returns:
        out.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: a wrong shape, device, last-dimension stride or activation.
    """
    num_rows = x.shape[0] if rows is None else rows.shape[0]
    if out is None:
        out = x.new_empty((num_rows, weight.shape[0]))
    _check(x, weight, bias, activation, residual, rows, out)
    width, depth = weight.shape
    if num_rows == 0:
        return out
    tile = tile or launch_config(num_rows, width, x.dtype, shared_bytes(x.device))
    grid = (triton.cdiv(num_rows, tile.block_m) * triton.cdiv(width, tile.block_n),)
    # Without the guard Triton launches on device 0; on CPU tensors it does nothing.
    with torch.cuda.device_of(x):
        _fused_linear_kernel[grid](
            x,
            weight,
            bias,
            residual,
            rows,
            out,
            num_rows,
            width,
            depth,
            x.stride(0),
            weight.stride(0),
            0 if residual is None else residual.stride(0),
            out.stride(0),
            ACTIVATION=activation,
            EVEN_K=depth % tile.block_k == 0,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            GROUP_M=_GROUP_M,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=True,  # said aloud, since the default changes between releases
        )
    return out


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    activation: str | None,
    residual: torch.Tensor | None,
    rows: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; expected one of {_ACTIVATIONS}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"x is {x.dtype}; expected one of {_DTYPES}")
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (num_rows, K ≥ 1)")
    if weight.ndim != 2 or weight.shape[0] == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected (N ≥ 1, {x.shape[1]})")
    num_out, width = (x if rows is None else rows).shape[0], weight.shape[0]
    expected = (
        ("weight", weight, (width, x.shape[1]), x.dtype),
        ("bias", bias, (width,), x.dtype),
        ("residual", residual, (num_out, width), x.dtype),
        ("rows", rows, (num_out,), torch.int32),
        ("out", out, (num_out, width), x.dtype),
    )
    for name, tensor, shape, dtype in (("x", x, tuple(x.shape), x.dtype), *expected):
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise TypeError(f"{name} is {tensor.dtype}; expected {dtype}. Convert it before")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}; x is on {x.device}")
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name} has last-dimension stride {tensor.stride(-1)}; expected 1")
