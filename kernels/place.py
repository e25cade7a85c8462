"""The projector's second layer, which pools its input and places its output with the text.

Row r of out, the language model's input, is one of
  (Σ_{j<4} weight[r, j] · hidden[index[r, j]]) @ linear_weightᵀ + linear_bias   index[r, 0] ≥ 0
  newline                                                                       index[r, 0] = -1
  embed_tokens[token_ids[r]]                                                    index[r, 0] = -2
Pooling may come before this layer because the weights of a row sum to 1. A kept token has weights
(1, 0, 0, 0); taps of weight 0 are not read.

Two kernels, the first only where a row is pooled: mixed in the product's own loop, rows would be
gathered anew for every tile of columns, and an operand in registers makes ptxas wait for each
wgmma of the whole kernel, of kept rows too.

Layout: row-major, any row stride, last dimension contiguous. Dtypes: floats float32, float16 or
bfloat16, all the same; index and token_ids int32, weight float32. Pooling is float32, in the order
of the taps, and rounded once to be an operand of the product, whose sums are float32 (no tf32) and
rounded once on store: a kept row has the bits that fused_linear gives it. Newlines and text rows
are copied. The sum over K has one order, so a row does not depend on what else is placed.

Roofline: arithmetic, 2·R·D² FLOP: 1024 × 768 at width 3584 is 4725 rows, 121 GFLOP, 154 µs at
790 TFLOP/s. Pooling is memory: 32 frames at that width read 167 MB and write 45, 50 µs.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

NEWLINE = tl.constexpr(-1)  # first index of a row that is the newline vector
TEXT = tl.constexpr(-2)  # first index of a row that is a text token's embedding

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _pool_rows_kernel(
    hidden_ptr,
    index_ptr,
    weight_ptr,
    out_ptr,
    D,
    stride_hm,
    stride_im,
    stride_wm,
    stride_om,
    BLOCK_D: tl.constexpr,
):
    # int64: 2**31 elements are 262 thousand rows of width 8192, which a batch can reach.
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = cols < D
    index_row_ptr = index_ptr + row * stride_im
    if tl.load(index_row_ptr) >= 0:
        acc = tl.zeros((BLOCK_D,), dtype=tl.float32)
        for tap in tl.static_range(4):
            source = tl.load(index_row_ptr + tap).to(tl.int64)
            weight = tl.load(weight_ptr + row * stride_wm + tap)
            # Columns to read, as a number: the interpreter cannot broadcast a scalar bool.
            limit = tl.where(weight != 0.0, D, 0)
            x = tl.load(hidden_ptr + source * stride_hm + cols, mask=cols < limit, other=0.0)
            acc += weight * x.to(tl.float32)
        tl.store(out_ptr + row * stride_om + cols, acc.to(out_ptr.dtype.element_ty), mask=mask)


# R is not specialised: a count of tokens that is a multiple of 16 would compile anew.
@triton.jit(do_not_specialize=["R"])
def _project_and_place_kernel(
    hidden_ptr,
    index_ptr,
    linear_weight_ptr,
    linear_bias_ptr,
    newline_ptr,
    token_ids_ptr,
    embed_tokens_ptr,
    out_ptr,
    R,
    D,
    stride_hm,
    stride_im,
    stride_ln,
    stride_em,
    stride_om,
    POOLED: tl.constexpr,  # hidden has been pooled: row r of out is made of row r of hidden
    EVEN_D: tl.constexpr,  # D is a multiple of BLOCK_K: no mask in the loop
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    num_m = tl.cdiv(R, BLOCK_M)
    num_n = tl.cdiv(D, BLOCK_N)
    tile = tl.program_id(0)
    # Neighbouring programs share rows and columns, so that L2 serves most of what they read.
    tile_m, tile_n = tl.swizzle2d(tile // num_n, tile % num_n, num_m, num_n, GROUP_M)
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    rows = offs_m.to(tl.int64)
    in_width = offs_n < D

    first = tl.load(index_ptr + rows * stride_im, mask=offs_m < R, other=-3)
    is_product = first >= 0
    out_ptrs = out_ptr + rows[:, None] * stride_om + offs_n[None, :]
    if tl.max(is_product.to(tl.int32), axis=0) > 0:
        # Rows that are no product read row 0, and columns past the end the last one: they need no
        # mask in the loop and are not stored. Row 0 of what is pooled may never have been written.
        if POOLED:
            source = rows
            is_read = is_product[:, None]
        else:
            source = tl.maximum(first, 0).to(tl.int64)
            is_read = (offs_m >= 0)[:, None]
        columns = tl.minimum(offs_n, D - 1).to(tl.int64)
        a_ptrs = hidden_ptr + source[:, None] * stride_hm + offs_k[None, :]
        b_ptrs = linear_weight_ptr + columns[None, :] * stride_ln + offs_k[:, None]
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, D, BLOCK_K):
            if EVEN_D:
                a = tl.load(a_ptrs, mask=is_read, other=0.0)
                b = tl.load(b_ptrs)
            else:
                # Both operands: what lies behind a row may be NaN, and 0 · NaN is NaN.
                a = tl.load(a_ptrs, mask=is_read & (offs_k[None, :] < D - k), other=0.0)
                b = tl.load(b_ptrs, mask=offs_k[:, None] < D - k, other=0.0)
            acc = tl.dot(a, b, acc, input_precision="ieee")
            a_ptrs += BLOCK_K
            b_ptrs += BLOCK_K
        acc += tl.load(linear_bias_ptr + offs_n, mask=in_width, other=0.0).to(tl.float32)[None, :]
        mask = is_product[:, None] & in_width[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)

    is_newline = first == NEWLINE
    if tl.max(is_newline.to(tl.int32), axis=0) > 0:
        newline = tl.load(newline_ptr + offs_n, mask=in_width)
        tl.store(out_ptrs, newline[None, :], mask=is_newline[:, None] & in_width[None, :])
    is_text = first == TEXT
    if tl.max(is_text.to(tl.int32), axis=0) > 0:
        token = tl.load(token_ids_ptr + rows, mask=is_text, other=0).to(tl.int64)
        text_ptrs = embed_tokens_ptr + token[:, None] * stride_em + offs_n[None, :]
        mask = is_text[:, None] & in_width[None, :]
        tl.store(out_ptrs, tl.load(text_ptrs, mask=mask), mask=mask)


class Tile(NamedTuple):
    """What one program computes, and with what."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# Both are made of wgmma on sm_90. Not yet measured on a device: the second number is a guess of the
# time an element takes beside the larger tile.
_HALF_TILES = (
    (Tile(128, 128, 64, 8, 3), 1.0),
    (Tile(64, 128, 64, 4, 4), 1.2),
)
_FLOAT32_TILE = Tile(64, 64, 16, 8, 3)
_NUM_SMS = 132  # of an H100 or H200; another device gets the same tiles
_GROUP_M = 8


def launch_config(num_rows: int, width: int, dtype: torch.dtype) -> Tile:
    """Picks the tile that should finish first for an out of (num_rows, width).

    Args:
        num_rows: of out, at least 1.
        width: of out, at least 1.
        dtype: of the tensors.

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

    return min(_HALF_TILES, key=time)[0]


def pool_config(width: int) -> tuple[int, int]:
    """Picks (BLOCK_D, num_warps) of the pooling of rows of `width` elements.

    Eight elements a thread: one 128-bit load in half precision, two in float32.
    """
    block_d = min(max(triton.next_power_of_2(width), 32), 1024)
    return block_d, max(block_d // 256, 1)


def pool_rows(
    hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """Mixes rows of hidden, out[r] = Σ_{j<4} weight[r, j] · hidden[index[r, j]].

    Args:
        hidden: (num_sources, D) float32, float16 or bfloat16.
        index: (R, 4) int32; of a row that starts below 0 nothing is written.
        weight: (R, 4) float32; a tap of weight 0 is not read.
        out: (R, D), dtype of hidden.

    Returns:
        out.
    """
    num_rows, width = out.shape
    block_d, num_warps = pool_config(width)
    with torch.cuda.device_of(hidden):
        _pool_rows_kernel[(num_rows, triton.cdiv(width, block_d))](
            hidden,
            index,
            weight,
            out,
            width,
            hidden.stride(0),
            index.stride(0),
            weight.stride(0),
            out.stride(0),
            BLOCK_D=block_d,
            num_warps=num_warps,
            enable_fp_fusion=True,  # said aloud, since the default changes between releases
        )
    return out


def project_and_place(
    hidden: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    linear_weight: torch.Tensor,
    linear_bias: torch.Tensor,
    newline: torch.Tensor,
    token_ids: torch.Tensor,
    embed_tokens: torch.Tensor,
    out: torch.Tensor,
    *,
    has_pooled: bool,
) -> torch.Tensor:
    """Writes the language model's input: visual tokens, newlines and text rows, into `out`.

    Args:
        hidden: (num_sources, D) float32, float16 or bfloat16: the projector's first layer after
            its activation.
        index: (R, 4) int32, rows of hidden; a row that starts with -1 is the newline, with -2 a
            text row. Values are trusted: checking them would read the device.
        weight: (R, 4) float32, a row sums to 1; a tap of weight 0 is not read. Newlines and text
            rows may have any.
        linear_weight: (D, D), dtype of hidden.
        linear_bias: (D,), dtype of hidden.
        newline: (D,), dtype of hidden.
        token_ids: (R,) int32, rows of embed_tokens; read for text rows alone.
        embed_tokens: (V, D), dtype of hidden.
        out: (R, D), dtype of hidden; written in place. Must not overlap the inputs.
        has_pooled: whether any row has more than one tap; if not, weight is not read.

    Returns:
        out.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: a wrong shape, device or last-dimension stride.
    """
    # fmt: off
    _check(hidden, index, weight, linear_weight, linear_bias, newline, token_ids, embed_tokens, out)
    # fmt: on
    num_rows, width = out.shape
    if num_rows == 0:
        return out
    if has_pooled:
        hidden = pool_rows(hidden, index, weight, hidden.new_empty((num_rows, width)))
    tile = launch_config(num_rows, width, hidden.dtype)
    grid = (triton.cdiv(num_rows, tile.block_m) * triton.cdiv(width, tile.block_n),)
    # Without the guard Triton launches on device 0; on CPU tensors it does nothing.
    with torch.cuda.device_of(hidden):
        _project_and_place_kernel[grid](
            hidden,
            index,
            linear_weight,
            linear_bias,
            newline,
            token_ids,
            embed_tokens,
            out,
            num_rows,
            width,
            hidden.stride(0),
            index.stride(0),
            linear_weight.stride(0),
            embed_tokens.stride(0),
            out.stride(0),
            POOLED=has_pooled,
            EVEN_D=width % tile.block_k == 0,
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
    hidden: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    linear_weight: torch.Tensor,
    linear_bias: torch.Tensor,
    newline: torch.Tensor,
    token_ids: torch.Tensor,
    embed_tokens: torch.Tensor,
    out: torch.Tensor,
) -> None:
    if hidden.dtype not in _DTYPES:
        raise TypeError(f"hidden is {hidden.dtype}; expected one of {_DTYPES}")
    if hidden.ndim != 2 or hidden.shape[1] == 0:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}; expected (num_sources, D ≥ 1)")
    width, dtype = hidden.shape[1], hidden.dtype
    if out.ndim != 2:
        raise ValueError(f"out has shape {tuple(out.shape)}; expected (R, {width})")
    if embed_tokens.ndim != 2:
        raise ValueError(f"embed_tokens has shape {tuple(embed_tokens.shape)}; expected (V, D)")
    num_rows = out.shape[0]
    expected = (
        ("hidden", hidden, tuple(hidden.shape), dtype),
        ("index", index, (num_rows, 4), torch.int32),
        ("weight", weight, (num_rows, 4), torch.float32),
        ("linear_weight", linear_weight, (width, width), dtype),
        ("linear_bias", linear_bias, (width,), dtype),
        ("newline", newline, (width,), dtype),
        ("token_ids", token_ids, (num_rows,), torch.int32),
        ("embed_tokens", embed_tokens, (embed_tokens.shape[0], width), dtype),
        ("out", out, (num_rows, width), dtype),
    )
    for name, tensor, shape, wanted in expected:
        if tensor.dtype != wanted:
            raise TypeError(f"{name} is {tensor.dtype}; expected {wanted}. Convert it before")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}; hidden is on {hidden.device}")
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name} has last-dimension stride {tensor.stride(-1)}; expected 1")
